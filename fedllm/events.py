"""What happens in a run, as events: the bus, the sinks that are always there, and the reader.

An event is a flat JSON object with ``event`` (its name), ``time`` (unix seconds) and the fields below. Bytes
and seconds are plain numbers; a value that is not finite is ``null``. ``events.jsonl`` has one event a line.

=================== ========================================================================================
event               fields
=================== ========================================================================================
run-started         run, strategy, client, task, rounds, first_round (1, or k+1 when resumed after round k),
                    config (flat mapping), version, parameters (trained ones), adapter_bytes
waiting-for-nodes   have, need
node-joined         node, device, cpus, memory_bytes, num_examples, version, model_version, label_counts (only if the
                    node shares it)
node-rejected       node, reason
round-started       round, nodes (names of those asked to train)
node-replied        round, phase ("train" or "evaluate"), node, bytes_up, bytes_down, seconds (computing time
                    of the node), elapsed (since the round's start, server's clock), num_examples, loss,
                    metrics (optional mapping)
node-dropped        round, phase, node, kind ("unreachable", "timeout", "client-error", "invalid", "unreadable",
                    "inconsistent"), reason
aggregated          round, replies, asked, num_examples, loss, seconds, update_norm
evaluated           round (0: before training), where ("server" or "clients"), metrics (mapping), seconds
planned             round, phase ("warm-up" or "plan"), weights (names of the candidates, in order), nodes (by name:
                    bits, batch_size, steps, ranks by weight, predicted bytes and seconds, under_training, value),
                    refused (reason by name); it holds until the next one
round-timed         round, seconds (of the slowest node by the time model), nodes (seconds by name)
verdict             round, defence, by node: kept, scores (larger: more trusted), factors (0: rejected), weights (only
                    of kept replies that do not count as many examples as they claim); VERT adds distances (above 1:
                    outside of what is expected) by node and predictor
step-taken-back     round, reason: the step before this round, with which the global model was left worse
round-skipped       round, reason
checkpointed        round, path, bytes, seconds
checkpoint-failed   round, reason
round-finished      round, seconds
run-resumed         round (the last one kept), path (of the checkpoint)
run-finished        rounds, seconds, metrics (of the final model)
run-failed          reason
warning             message
=================== ========================================================================================

A process that was killed in round 3 and resumed after round 2 leaves events of two rounds 3 in the file. What
follows the newest ``run-resumed`` replaces all rounds above its round, as :class:`fedllm.history.RunHistory`
does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fedllm import logs
from fedllm.errors import FedLLMError
from fedllm.history import RunHistory
from fedllm.narration import summary_line

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class EventSink(Protocol):
    """Where events go. A sink that raises is switched off; the run goes on."""

    def emit(self, event: Mapping[str, Any]) -> None:
        """Take one event; it must not be changed."""

    def close(self) -> None:
        """Write what is left and let go of files and connections."""


class EventBus:
    """Stamps events and hands them to every sink, from whatever thread they come."""

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks = list(sinks)
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> Event:
        """Send an event to all sinks.

        Args:
            event: a name of the table in :mod:`fedllm.events`.
            fields: its fields; tensors, NumPy values, paths and sets become JSON values.

        Returns:
            The event as the sinks got it.
        """
        stamped: Event = {"event": event, "time": time.time(), **to_jsonable(fields)}
        with self._lock:
            for sink in list(self._sinks):
                try:
                    sink.emit(stamped)
                except Exception:
                    logger.exception(
                        "event sink %s failed at %r and is off for the rest of the run",
                        type(sink).__name__,
                        event,
                    )
                    self._sinks.remove(sink)
                    _close(sink)
        return stamped

    def close(self) -> None:
        """Close all sinks; the bus may not be used afterwards."""
        with self._lock:
            while self._sinks:
                _close(self._sinks.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(sink: EventSink) -> None:
    try:
        sink.close()
    except Exception:
        logger.exception("event sink %s failed to close", type(sink).__name__)


def to_jsonable(value: Any) -> Any:
    """Turn a value into what JSON can hold.

    Tensors and NumPy values become numbers and lists, NaN and infinities ``None``, paths and everything else
    their string: an odd field of an event is no reason to stop a run.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return [to_jsonable(entry) for entry in sorted(value, key=str)]
    if isinstance(value, Iterable) and not isinstance(value, bytes) and not hasattr(value, "tolist"):
        return [to_jsonable(entry) for entry in value]
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    return str(value)


class JsonlSink:
    """Appends events to a file, one JSON object a line, flushed one by one.

    A line that a killed process left unfinished is cut off before the first new one is written.

    Raises:
        FedLLMError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._file = path.open("ab", buffering=0)
            self._good = path.stat().st_size
        except OSError as error:
            raise FedLLMError(f"cannot write events to {path}: {error.strerror or error}") from None

    def emit(self, event: Mapping[str, Any]) -> None:
        """Append one line; after a full disk the next event is tried again."""
        line = (json.dumps(event, allow_nan=False) + "\n").encode()
        try:
            self._file.write(line)
            self._good += len(line)
        except OSError as error:
            logger.error("an event could not be written to %s: %s", self._file.name, error)
            # Half a line must not stand before the next event.
            with contextlib.suppress(OSError):
                self._file.truncate(self._good)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        logger.warning("%s ends in an unfinished line, which is cut off", path)
        with path.open("r+b") as file:
            file.truncate(end)


class LogSink:
    """Writes one line a round, and what went wrong, through :mod:`logging`."""

    _LEVELS: Mapping[str, int] = {
        "run-failed": logging.ERROR,
        "warning": logging.WARNING,
        "node-rejected": logging.WARNING,
        "node-dropped": logging.WARNING,
        "round-skipped": logging.WARNING,
        "step-taken-back": logging.WARNING,
        "checkpoint-failed": logging.WARNING,
    }

    def __init__(self, log: logging.Logger = logger) -> None:
        self._log = log
        self._history = RunHistory()

    def emit(self, event: Mapping[str, Any]) -> None:
        """Log the event's line, if it has one."""
        self._history.update(event)
        line = summary_line(self._history, event)
        if line is not None:
            place = {name: event[name] for name in logs.FIELDS if name in event}
            self._log.log(self._LEVELS.get(event["event"], logging.INFO), "%s", line, extra=place)

    def close(self) -> None:
        """Nothing to let go of."""


def read_events(path: Path) -> list[Event]:
    """All events of a file, oldest first; an unfinished last line is left out.

    Raises:
        FedLLMError: the file cannot be read, or a finished line is not an event.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FedLLMError(f"cannot read events from {path}: {error.strerror or error}") from None
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [parse_event(line, path, number) for number, line in enumerate(lines, start=1)]


def parse_event(line: bytes, path: Path, number: int) -> Event:
    """One line of ``events.jsonl``.

    Raises:
        FedLLMError: the line is not a JSON object with ``event`` and ``time``.
    """
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or not {"event", "time"} <= event.keys():
        raise FedLLMError(
            f"{path}, line {number}: expected a JSON object with event and time, found {line[:60]!r}; "
            "remove the line to read the rest"
        )
    return event
