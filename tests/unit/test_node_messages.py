"""Flower's records come through the worker's socket with every bit and every type as they were."""

import math
import struct
import subprocess
import sys

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import __version__
from fedllm.errors import WorkerError
from fedllm.node import frames
from fedllm.node.frames import from_frames, to_frames
from fedllm.node.messages import Packed, pack_answer, pack_job, unpack_answer, unpack_job
from fedllm.node.worker_pb2 import Frame, Opening

NAMES = st.text(max_size=6)
INTS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(width=64)
NUMBERS = st.one_of(INTS, FLOATS, st.lists(INTS, max_size=3), st.lists(FLOATS, max_size=3))
VALUES = st.one_of(
    NUMBERS, st.booleans(), st.text(max_size=9), st.binary(max_size=9),
    st.lists(st.booleans(), max_size=3), st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.binary(max_size=3), max_size=3),
)  # fmt: skip
ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "bfloat16", "int8", ""]),
    st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "fedllm.int8"]),
    st.binary(max_size=40),
)
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAYS, max_size=3).map(ArrayRecord),
    st.dictionaries(NAMES, NUMBERS, max_size=4).map(MetricRecord),
    st.dictionaries(NAMES, VALUES, max_size=4).map(ConfigRecord),
)
CONTENTS = st.dictionaries(NAMES, RECORDS, max_size=4).map(RecordDict)
SETTINGS = st.dictionaries(NAMES, st.one_of(st.booleans(), st.integers(-5, 5), FLOATS, NAMES), max_size=4)


def exact(value):
    """Equal exactly if type and bits are: NaN equals itself here, and 1, 1.0 and True differ."""
    if isinstance(value, list):
        return [exact(entry) for entry in value]
    return (type(value), struct.pack("<d", value) if isinstance(value, float) else value)


def plain(content):
    return [
        (
            name,
            type(record),
            [
                (key, (v.dtype, tuple(v.shape), v.stype, v.data) if isinstance(v, Array) else exact(v))
                for key, v in record.items()
            ],
        )
        for name, record in content.items()
    ]


def through(packed):
    """What the other side reads, after gRPC has had it as bytes."""
    return from_frames(Frame.FromString(frame.SerializeToString()) for frame in to_frames(packed))


@given(CONTENTS)
@settings(max_examples=150, deadline=None)
def test_an_answer_comes_back_bit_for_bit(content):
    assert plain(unpack_answer(*through(pack_answer(content)))) == plain(content)


@given(CONTENTS, SETTINGS, SETTINGS, st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_a_job_comes_through_bit_for_bit(content, node_config, run_config, number):
    message = Message(content, dst_node_id=1, message_type="train")
    context = Context(number, 2**64 - 1 - number, node_config, RecordDict(), run_config)
    job = unpack_job(*through(pack_job("train", message, context)))
    assert (job.action, job.message.metadata.message_type) == ("train", "train")
    assert plain(job.message.content) == plain(content)
    assert (job.context.run_id, job.context.node_id) == (number, 2**64 - 1 - number)
    for found, sent in ((job.context.node_config, node_config), (job.context.run_config, run_config)):
        assert [(k, exact(v)) for k, v in found.items()] == [(k, exact(v)) for k, v in sent.items()]
    reply = Message(RecordDict(), reply_to=job.message)
    assert math.isfinite(reply.metadata.ttl)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 10_007])
def test_data_of_any_size_travels_in_pieces(monkeypatch, size):
    monkeypatch.setattr(frames, "PIECE_BYTES", 8)
    data = bytes(i % 251 for i in range(size))
    content = RecordDict(
        {"a": ArrayRecord({"x": Array("uint8", (size,), "s", data), "y": Array("", (), "", b"")})}
    )
    packed = pack_answer(content)
    assert all(len(frame.data) <= 8 and len(frame.head) <= 8 for frame in to_frames(packed))
    assert unpack_answer(*through(packed))["a"]["x"].data == data


def test_another_version_is_refused_and_both_are_named():
    opening = Frame(opening=Opening(version="9.9.9", head_bytes=3, data_bytes=10**15))
    with pytest.raises(WorkerError, match=rf"worker has fedllm {__version__}.*app 9\.9\.9"):
        from_frames([opening])


def test_what_is_cut_short_or_no_message_is_refused():
    packed = pack_answer(RecordDict({"a": ArrayRecord({"x": Array("uint8", (4,), "s", b"1234")})}))
    whole = list(to_frames(packed))
    with pytest.raises(WorkerError, match=r"ended after \d+ \+ 0"):
        from_frames(whole[:-1])
    with pytest.raises(WorkerError, match="does not begin"):
        from_frames(whole[1:])
    with pytest.raises(WorkerError, match="cut short"):
        unpack_answer(packed.head, memoryview(b"123"))
    with pytest.raises(WorkerError, match="belong to no array"):
        unpack_answer(packed.head, memoryview(b"12345"))
    with pytest.raises(WorkerError, match="no Records"):
        unpack_answer(*through(Packed(b"\xff\xff")))


def test_the_app_imports_nothing_heavy():
    program = """
import sys, fedllm.client_app
heavy = {"torch", "transformers", "peft", "pydantic", "datasets", "safetensors", "ray"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
