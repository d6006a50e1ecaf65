"""What a supervised process prints: kept in a rotating file, echoed if wanted, and searched for why it ended."""

from __future__ import annotations

import logging.handlers
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fedllm.flower import plain

_FILE_BYTES, _FILES = 10_000_000, 4
_KEPT_LINES = 200
_MAX_REASON = 400
_FLOWER_EXIT = re.compile(r"Exit Code: (\d+)")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
_NOISE = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL)?\s*:?\s*$|For more information, visit")
_BAD = re.compile(r"^(ERROR|CRITICAL)\s*:|^error: |.*: error: ")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*")


class PartLog:
    """The output of one part, over all of its restarts.

    Args:
        path: of the newest file; older ones have a number behind it, 10 MB each.
        name: stands before an echoed line.
        echo: gets every line, or None.
    """

    def __init__(self, path: Path, name: str, echo: Callable[[str], None] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.handlers.RotatingFileHandler(
            path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8", errors="replace"
        )
        self._name, self._echo = name, echo
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._written = time.monotonic()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A new process starts: what its predecessor printed is no reason for its end."""
        with self._lock:
            self._last.clear()

    def write(self, line: bytes) -> None:
        """Take one line."""
        text = plain(line.decode(errors="replace")).rstrip()
        with self._lock:
            self._last.append(text)
            self._written = time.monotonic()
        # The handler survives a full disk: it reports the error and goes on.
        self._file.handle(logging.makeLogRecord({"msg": text}))
        if self._echo is not None:
            try:
                self._echo(f"{self._name}: {text}")
            except OSError:
                self._echo = None  # nobody reads any more; the process must not block for that

    def settle(self, quiet: float = 0.2, longest: float = 1.0) -> None:
        """Wait until the last words of a process that has just ended have arrived."""
        ends = time.monotonic() + longest
        while time.monotonic() < ends and time.monotonic() - self._written < quiet:
            time.sleep(0.05)

    def lines(self) -> list[str]:
        """The last lines of the present process."""
        with self._lock:
            return list(self._last)

    def reason(self) -> str:
        """Why the process ended, in one line: Flower's message, else the last exception, else the last error."""
        return reason_in(self.lines())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def reason_in(lines: list[str]) -> str:
    """The reason for an end among the last lines of a process's output."""
    for index in range(len(lines) - 1, -1, -1):
        if _FLOWER_EXIT.search(lines[index]):
            return _shorten(_paragraph(lines[index + 1 :]))
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return _shorten(line)
    bad = [line for line in lines if _BAD.match(line) and not _NOISE.search(line)]
    return _shorten(bad[-1]) if bad else ""


def _paragraph(lines: list[str]) -> str:
    """Flower's explanation behind an exit code, up to its link."""
    found: list[str] = []
    for line in lines:
        if "For more information, visit" in line:
            break
        if text := _LEVEL.sub("", line).strip():
            found.append(text)
    return " ".join(found)


def _shorten(text: str) -> str:
    text = _LEVEL.sub("", text).strip()
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} …"
