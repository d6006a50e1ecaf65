"""What a process keeps because it was dear to make: bounded in number by kind, in bytes for all kinds together."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar

from fedllm.errors import ConfigError

log = logging.getLogger(__name__)
V = TypeVar("V")

_lock = threading.RLock()  # one for all kinds: what is made for one of them may make room among the others
_clock = count()
_kinds: list[Kept[Any]] = []
_limit: int | None = None


@dataclass
class _Entry(Generic[V]):
    value: V
    bytes: int
    used: int


class Kept(Generic[V]):
    """Values of one kind by key; what was used least recently goes first.

    Args:
        kind: for the log, for example ``model``.
        size: bytes that a value takes.

    Attributes:
        loads: values made so far, because they were not there or no longer.
    """

    def __init__(self, kind: str, size: Callable[[V], int]) -> None:
        self.loads = 0
        self._kind, self._size = kind, size
        self._entries: dict[str, _Entry[V]] = {}
        self._known: dict[str, int] = {}  # bytes by key, also of what is gone: room is made before a value is
        _kinds.append(self)

    def get(self, key: str, make: Callable[[], V], at_most: int) -> V:
        """The value of a key; made, and others forgotten first, if it is not there.

        Under a limit a value that was never made before is taken to be as large as the largest so far.

        Args:
            key: of the value.
            make: called without arguments; what it raises is passed on, and nothing is kept.
            at_most: values of this kind that are kept, this one included.
        """
        with _lock:
            if key not in self._entries:
                while len(self._entries) >= at_most:
                    self._drop(min(self._entries, key=self._used))
                _make_room(self._known.get(key, max(self._known.values(), default=0)))
                value = make()
                self.loads += 1
                self._known[key] = self._size(value)
                self._entries[key] = _Entry(value, self._known[key], 0)
            entry = self._entries[key]
            entry.used = next(_clock)
            _make_room(0, spare=entry)
            return entry.value

    def discard(self, value: V) -> None:
        """Forget a value if it is there: the next that asks for it gets a new one."""
        with _lock:
            for key in [key for key, entry in self._entries.items() if entry.value is value]:
                self._drop(key)

    def clear(self) -> None:
        """Forget all values of this kind."""
        with _lock:
            self._entries.clear()

    def values(self) -> list[V]:
        """What is kept now, by last use; does not wait for a value that is being made."""
        return [entry.value for entry in sorted(self._entries.values(), key=lambda entry: entry.used)]

    def __len__(self) -> int:
        return len(self._entries)

    def _used(self, key: str) -> int:
        return self._entries[key].used

    def _drop(self, key: str) -> None:
        del self._entries[key]
        gc.collect()  # modules refer to each other in circles


def limit_kept_bytes(limit: int | None) -> None:
    """Keep at most so many bytes in this process, of all kinds together; None: no limit.

    The value used last stays in any case, even if it alone is larger.

    Raises:
        ConfigError: not a positive number.
    """
    global _limit
    if limit is not None and limit <= 0:
        raise ConfigError(f"the memory limit is {limit} bytes, expected a positive number")
    _limit = limit


def kept_bytes() -> int:
    """Bytes of everything that this process keeps."""
    return sum(entry.bytes for kind in list(_kinds) for entry in list(kind._entries.values()))


def _make_room(needed: int, spare: _Entry[Any] | None = None) -> None:
    """Forget what was used least recently, except ``spare``, until so many more bytes are within the limit."""
    while _limit is not None and kept_bytes() + needed > _limit:
        candidates = [
            (entry.used, kind, key)
            for kind in _kinds
            for key, entry in kind._entries.items()
            if entry is not spare
        ]
        if not candidates:
            return
        _, kind, key = min(candidates, key=lambda candidate: candidate[0])
        log.info(
            "memory limit of %d bytes: forgot a %s of %d bytes", _limit, kind._kind, kind._entries[key].bytes
        )
        kind._drop(key)
