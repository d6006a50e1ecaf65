"""Packets (a kind, a step, tensors, numbers) as frames of a gRPC stream, and back.

Frames are those of ``split.proto``. Its generated classes would copy an activation three times on each side; a chunk
is therefore written and read here, as the one field that it is, and only headers go through the generated code::

    python -m pip install grpcio-tools==1.70.0   # generated code runs with this grpcio and protobuf 5.29, and newer
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedllm/split/split.proto
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from torch import Tensor

from fedllm.errors import SplitError
from fedllm.split.codec import ActivationCodec, codec_of, from_buffer, num_bytes, to_buffers
from fedllm.split.split_pb2 import Failure, Frame, Header, TensorInfo

CHUNK_BYTES = 1 << 20
_CHUNK_TAG = b"\x12"  # field 2 of Frame, length-delimited
_MAX_TENSORS, _MAX_DIMENSIONS = 16, 4


@dataclass(frozen=True)
class Packet:
    """One thing said on a stream.

    Attributes:
        kind: what it is, see :mod:`fedllm.split.server`.
        step: local step within the round, from 1; 0 outside of steps.
        tensors: by name.
        numbers: by name.
        texts: by name.
    """

    kind: str
    step: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def to_frames(packet: Packet, codec: ActivationCodec = "fp32") -> Iterator[bytes]:
    """Serialised frames of a packet; floating-point tensors travel in the given codec."""
    codecs = {name: codec_of(tensor, codec) for name, tensor in packet.tensors.items()}
    infos = [
        TensorInfo(name=name, codec=codecs[name], shape=list(tensor.shape))
        for name, tensor in packet.tensors.items()
    ]
    header = Header(
        kind=packet.kind, step=packet.step, tensors=infos, numbers=packet.numbers, texts=packet.texts
    )
    yield Frame(header=header).SerializeToString()
    for name, tensor in packet.tensors.items():
        for buffer in to_buffers(tensor, codecs[name]):
            for start in range(0, len(buffer), CHUNK_BYTES):
                chunk = buffer[start : start + CHUNK_BYTES]
                yield b"".join((_CHUNK_TAG, _varint(len(chunk)), chunk))


def failure_frame(reason: str) -> bytes:
    """A frame that ends the stream with an error."""
    return Frame(failure=Failure(reason=reason)).SerializeToString()


def read_packets(frames: Iterable[bytes], max_bytes: int) -> Iterator[Packet]:
    """Packets of a stream of serialised frames.

    Args:
        frames: as they arrive.
        max_bytes: the largest packet that is taken; its memory is reserved when its header has been checked.

    Raises:
        SplitError: a frame that is no frame, a chunk without header, a packet that is cut short, has too many bytes,
            or holds values that are not finite; or the other side reported a failure.
    """
    stream = iter(frames)
    for raw in stream:
        header = _header(raw)
        infos = _checked(header, max_bytes)
        tensors = {
            name: _tensor(stream, name, shape, codec, header) for name, (shape, codec) in infos.items()
        }
        yield Packet(header.kind, header.step, tensors, dict(header.numbers), dict(header.texts))


def _header(raw: bytes) -> Header:
    try:
        frame = Frame.FromString(raw)
    except DecodeError as error:
        raise SplitError(f"a frame of {len(raw)} bytes cannot be read: {error}") from None
    if frame.HasField("failure"):
        raise SplitError(frame.failure.reason)
    if not frame.HasField("header"):
        raise SplitError("expected the header of a packet, found a chunk: frames are lost or out of order")
    return frame.header


def _checked(header: Header, max_bytes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    if len(header.tensors) > _MAX_TENSORS:
        raise SplitError(f"{header.kind}: {len(header.tensors)} tensors, expected at most {_MAX_TENSORS}")
    infos: dict[str, tuple[tuple[int, ...], str]] = {}
    total = 0
    for info in header.tensors:
        shape = tuple(int(size) for size in info.shape)
        if len(shape) > _MAX_DIMENSIONS or (info.codec == "int8" and not shape):
            raise SplitError(f"{header.kind}, tensor {info.name!r}: unexpected shape {shape}")
        total += num_bytes(shape, info.codec)
        infos[info.name] = (shape, info.codec)
    if total > max_bytes:
        raise SplitError(
            f"step {header.step}: a packet of {total:,} bytes ({header.kind}), expected at most {max_bytes:,}"
        )
    return infos


def _tensor(stream: Iterator[bytes], name: str, shape: tuple[int, ...], codec: str, header: Header) -> Tensor:
    where = f"step {header.step}, tensor {name!r}"
    expected = num_bytes(shape, codec)
    buffer, filled = bytearray(expected), 0
    while filled < expected:
        raw = next(stream, None)
        if raw is None:
            raise SplitError(f"{where}: the stream ended after {filled:,} of {expected:,} bytes")
        chunk = _chunk(raw, where)
        if filled + len(chunk) > expected:
            raise SplitError(f"{where}: more bytes than the {expected:,} that its shape {shape} has")
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    try:
        return from_buffer(buffer, shape, codec)
    except SplitError as error:
        raise SplitError(f"{where}: {error}") from None


def _chunk(raw: bytes, where: str) -> memoryview:
    """The bytes of a chunk's frame, without a copy."""
    if raw[:1] != _CHUNK_TAG:
        _raise_failure(raw)
        raise SplitError(f"{where}: expected a chunk of it, found another frame")
    length, position = 0, 1
    for shift in range(0, 35, 7):
        if position >= len(raw):
            break
        byte = raw[position]
        position += 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    chunk = memoryview(raw)[position:]
    if not length or length != len(chunk):
        raise SplitError(f"{where}: a chunk of {len(chunk):,} bytes says that it has {length:,}")
    return chunk


def _raise_failure(raw: bytes) -> None:
    try:
        frame = Frame.FromString(raw)
    except DecodeError:
        return
    if frame.HasField("failure"):
        raise SplitError(frame.failure.reason)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
