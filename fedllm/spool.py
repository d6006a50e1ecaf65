"""Replies that wait for their turn: a bounded number of bytes in memory, the rest in temporary files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from flwr.app import Array, ArrayRecord, Message

from fedllm.records import records_of

logger = logging.getLogger(__name__)


class ReplySpool:
    """Holds replies by index; above ``memory_bytes`` the tensors' bytes go to disk until they are taken.

    A strategy sees replies in the order in which they were asked for, so that its result cannot depend on who finished
    first. The price is that early replies of late positions must wait somewhere; this class bounds what that costs.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._held: dict[int, Message] = {}
        self._in_memory: dict[int, int] = {}
        self._files: dict[int, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, index: int) -> bool:
        return index in self._held

    @property
    def indices(self) -> list[int]:
        """The indices that are held, ascending."""
        return sorted(self._held)

    def put(self, index: int, message: Message) -> None:
        """Keep a reply; it must not be used elsewhere until it is taken."""
        self._held[index] = message
        size = sum(len(array.data) for array in _arrays(message))
        if size and sum(self._in_memory.values()) + size > self._memory_bytes:
            try:
                self._to_disk(index, message)
                return
            except OSError as error:
                logger.warning(
                    "a waiting reply stays in memory, its spool file could not be written: %s", error
                )
        self._in_memory[index] = size

    def take(self, index: int) -> Message:
        """Hand a reply out, complete, and forget it."""
        message = self._held.pop(index)
        self._in_memory.pop(index, None)
        path = self._files.pop(index, None)
        if path is not None:
            _fill(message, path)
            path.unlink()
        return message

    def _to_disk(self, index: int, message: Message) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fedllm-spool-")
        path = Path(self._folder.name) / str(index)
        with path.open("wb") as file:
            for array in _arrays(message):
                file.write(len(array.data).to_bytes(8))
                file.write(array.data)
        for array in _arrays(message):
            array.data = b""
        self._files[index] = path


def _arrays(message: Message) -> Iterator[Array]:
    for record in records_of(message, ArrayRecord).values():
        yield from record.values()


def _fill(message: Message, path: Path) -> None:
    with path.open("rb") as file:
        for array in _arrays(message):
            array.data = file.read(int.from_bytes(file.read(8)))
