"""Packets on the wire: every codec, every size, against the generated code; and frames that break the contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import SplitError
from fedllm.split import frames as frames_module
from fedllm.split.codec import ACTIVATION_CODECS, num_bytes, to_buffers
from fedllm.split.frames import Packet, failure_frame, read_packets, to_frames
from fedllm.split.split_pb2 import Frame

LIMIT = 1 << 24


def around(packet, codec="fp32"):
    (found,) = read_packets(to_frames(packet, codec), LIMIT)
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 7),
    width=st.integers(1, 40),
    codec=st.sampled_from(ACTIVATION_CODECS),
    chunk=st.integers(1, 500),
)
def test_any_shape_survives(batch, length, width, codec, chunk):
    value = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(batch * length).view(batch, length) % 2 == 0
    labels = torch.tensor([3, -100, 70_000])
    original, frames_module.CHUNK_BYTES = frames_module.CHUNK_BYTES, chunk
    try:
        found = around(
            Packet("step", 4, {"hidden": value, "mask": mask, "labels": labels}, {"n": 2.5}, {"a": "b"}),
            codec,
        )
    finally:
        frames_module.CHUNK_BYTES = original
    assert (found.kind, found.step, found.numbers, found.texts) == ("step", 4, {"n": 2.5}, {"a": "b"})
    assert torch.equal(found.tensors["mask"], mask.long())
    assert torch.equal(found.tensors["labels"], labels)
    hidden = found.tensors["hidden"]
    assert hidden.shape == value.shape
    if codec == "fp32":
        assert torch.equal(hidden, value)
    elif codec == "int8" and value.numel():
        steps = value.abs().amax(dim=-1, keepdim=True) / 127
        assert bool(((hidden - value).abs() <= 0.5001 * steps).all())
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}[codec]
        assert torch.equal(hidden, value.to(dtype).float())


@pytest.mark.parametrize("codec", ACTIVATION_CODECS)
def test_bytes_are_as_predicted(codec):
    value = torch.randn(2, 5, 16)
    assert sum(map(len, to_buffers(value, codec))) == num_bytes(value.shape, codec)
    assert num_bytes(value.shape, codec) == {"fp32": 640, "bf16": 320, "fp16": 320, "int8": 200}[codec]


def test_frames_are_those_of_the_proto_file():
    packet = Packet("step", 1, {"hidden": torch.arange(300_000.0)})
    decoded = [Frame.FromString(raw) for raw in to_frames(packet)]
    assert decoded[0].header.kind == "step"
    assert b"".join(frame.chunk for frame in decoded[1:]) == torch.arange(300_000.0).numpy().tobytes()
    again = [frame.SerializeToString() for frame in decoded]
    (found,) = read_packets(again, LIMIT)
    assert torch.equal(found.tensors["hidden"], packet.tensors["hidden"])


def test_a_row_of_zeros_stays_zero_in_int8():
    assert torch.equal(
        around(Packet("s", 1, {"x": torch.zeros(2, 3)}), "int8").tensors["x"], torch.zeros(2, 3)
    )


def test_large_finite_values_are_no_infinity():
    value = torch.full((4,), 3e38)
    assert torch.equal(around(Packet("s", 1, {"x": value})).tensors["x"], value)


def broken(kind):
    value = torch.ones(2, 600)
    if kind == "nan":
        value[1, 3] = float("nan")
    if kind == "inf":
        value[1, 3] = float("inf")
    frames = list(to_frames(Packet("step", 7, {"hidden": value})))
    if kind == "truncated":
        return frames[:1]
    if kind == "oversized":
        return [*frames, frames[1]]
    if kind == "too many bytes":
        return [frames[0], Frame(chunk=b"\0" * 5000).SerializeToString()]
    if kind == "length":
        return [frames[0], frames[1][:-3]]
    if kind == "garbage":
        return [b"\xff\xff\xff"]
    if kind == "header in the middle":
        return [frames[0], frames[0]]
    if kind == "failure":
        return [frames[0], failure_frame("the other side is out of memory")]
    if kind == "empty chunk":
        return [frames[0], b"\x12\x00"]
    if kind == "codec":
        frame = Frame.FromString(frames[0])
        frame.header.tensors[0].codec = "fp8"
        return [frame.SerializeToString()]
    if kind == "huge":
        frame = Frame.FromString(frames[0])
        frame.header.tensors[0].shape[0] = 1 << 50
        return [frame.SerializeToString()]
    return frames


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "step 7, tensor 'hidden': values are not finite"),
        ("inf", "not finite"),
        ("truncated", "ended after 0 of 4,800 bytes"),
        ("oversized", "found a chunk"),
        ("too many bytes", r"more bytes than the 4,800 that its shape \(2, 600\) has"),
        ("length", "says that it has"),
        ("garbage", "cannot be read"),
        ("header in the middle", "expected a chunk of it"),
        ("failure", "^the other side is out of memory$"),
        ("empty chunk", "a chunk of 0 bytes"),
        ("codec", "unknown codec 'fp8'"),
        ("huge", "expected at most"),
    ],
)
def test_a_broken_stream_is_told(kind, message):
    with pytest.raises(SplitError, match=message):
        list(read_packets(broken(kind), LIMIT))


def test_a_dtype_that_does_not_travel():
    with pytest.raises(SplitError, match="complex64 does not travel"):
        list(to_frames(Packet("s", 1, {"x": torch.zeros(2, dtype=torch.complex64)})))
