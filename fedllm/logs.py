"""How log lines look: text for people, or one JSON object a line for machines (``FEDLLM_LOG=json``).

A JSON line has ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, ``error`` (the traceback) where there is
one, and what is known of the place: ``run`` (name), ``run_id`` (Flower's), ``round``, ``node``, ``phase``, ``event``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, get_args

from fedllm.errors import ConfigError

VARIABLE = "FEDLLM_LOG"
"""Environment variable with the format, which the processes that Flower starts inherit."""

Format = Literal["text", "json"]
FIELDS = ("run", "run_id", "round", "node", "phase", "event")

_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*")

_bound: ContextVar[dict[str, str | int] | None] = ContextVar("fedllm_log_fields", default=None)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON, with the fields of :func:`bound` and of the call's ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a JSON object without line breaks."""
        line: dict[str, object] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **(_bound.get() or {}),
            **{name: vars(record)[name] for name in FIELDS if name in vars(record)},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextmanager
def bound(**fields: str | int) -> Iterator[None]:
    """Add fields of :data:`FIELDS` to every JSON line that this thread writes inside the ``with`` block."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def wanted_format() -> Format:
    """The format that the environment asks for; text if it does not.

    Raises:
        ConfigError: ``FEDLLM_LOG`` is something else than text or json.
    """
    value = os.environ.get(VARIABLE) or "text"
    for known in get_args(Format):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"{VARIABLE}: expected {' or '.join(get_args(Format))}, found {value!r}")


def set_up(text: str = "%(message)s", level: int = logging.INFO) -> None:
    """Let fedllm's logger write to standard error unless it or the root has a handler, and set its level.

    In JSON all handlers of this process write JSON, those of Flower's logger too.

    Args:
        text: format string of lines for people.
        level: least level of fedllm's lines.
    """
    log = logging.getLogger("fedllm")
    log.setLevel(level)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(text))
        log.addHandler(handler)
    if wanted_format() == "json":
        write_json(log, logging.getLogger(), logging.getLogger("flwr"))


def write_json(*loggers: logging.Logger) -> None:
    """Let the handlers of these loggers write JSON."""
    for handler in (handler for log in loggers for handler in log.handlers):
        # Flower's handler overrides `format` and never looks at its formatter.
        handler.format = JsonFormatter().format  # type: ignore[method-assign]


def echo(line: str) -> None:
    """Print a line ``PART: TEXT`` that a supervised process has printed; in JSON ``part`` is a field of it."""
    if wanted_format() == "text":
        print(line, flush=True)
        return
    part, _, text = line.partition(": ")
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        level = _LEVEL.match(text)
        told = {
            "time": _time(time.time()),
            "level": level[1] if level else "INFO",
            "logger": part,
            "message": text[level.end() :] if level else text,
        }
    print(json.dumps({**told, "part": part}), flush=True)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
