"""A packed job or answer as frames of a gRPC stream of any length, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedllm import __version__
from fedllm.errors import WorkerError
from fedllm.node.messages import Packed
from fedllm.node.worker_pb2 import Failure, Frame, Opening

PIECE_BYTES = 1 << 20
"""Far below gRPC's default limit of 4 MiB for a message."""


def to_frames(packed: Packed) -> Iterator[Frame]:
    """Frames of a job or an answer."""
    yield Frame(
        opening=Opening(
            version=__version__,
            head_bytes=len(packed.head),
            data_bytes=sum(map(len, packed.data)),
        )
    )
    for piece in _pieces(packed.head):
        yield Frame(head=piece)
    for array in packed.data:
        for piece in _pieces(array):
            yield Frame(data=piece)


def from_frames(frames: Iterable[Frame]) -> tuple[bytes, memoryview]:
    """Head and array bytes of what comes in; another version is refused before anything of it is read.

    Raises:
        WorkerError: the other side has another version of fedllm, or broke off.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None or first.WhichOneof("kind") != "opening":
        raise WorkerError("the stream does not begin with an opening")
    opening = first.opening
    if opening.version != __version__:
        raise WorkerError(
            f"this worker has fedllm {__version__}, the process of the Flower app {opening.version}; install one "
            "version for both and start the node again"
        )
    head, data = bytearray(), bytearray()
    for frame in source:
        head += frame.head
        data += frame.data
    if (len(head), len(data)) != (opening.head_bytes, opening.data_bytes):
        raise WorkerError(
            f"expected {opening.head_bytes} + {opening.data_bytes} bytes, but the stream ended after "
            f"{len(head)} + {len(data)}"
        )
    return bytes(head), memoryview(data)


def failure(error: BaseException, *, retry: bool = False) -> Frame:
    """A frame that ends the stream with an error; ``retry``: the job was not begun."""
    return Frame(failure=Failure(kind=type(error).__name__, reason=str(error), retry=retry))


def _pieces(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        yield bytes(view[start : start + PIECE_BYTES])
