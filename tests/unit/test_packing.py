import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedllm import client
from fedllm.errors import ReplyError
from fedllm.packing import pack, unpack
from fedllm.records import decode, encode

CODECS = ("fp32", "fp16", "bf16", "int8", "raw")


def content(codec="fp32", count=3):
    torch.manual_seed(count)
    tensors = {f"block.{number}.weight": torch.randn(number + 1, 4) for number in range(count)}
    return RecordDict(
        {"arrays": encode(tensors, codec), "extra": ArrayRecord([np.arange(3), np.zeros((0, 2))]),
         "config": ConfigRecord({"round": 1}), "metrics": MetricRecord({"loss": 0.5})}
    )  # fmt: skip


def described(record):
    return [
        (name, array.dtype, tuple(array.shape), array.stype, array.data) for name, array in record.items()
    ]


@given(codec=st.sampled_from(CODECS), count=st.integers(0, 5))
def test_unpacked_is_what_was_packed_bit_for_bit_and_in_order(codec, count):
    before = content(codec, count)
    packed = pack(before)
    assert all(len(packed[name]) <= 1 for name in ("arrays", "extra"))
    assert unpack(packed)
    for name in ("arrays", "extra"):
        assert described(packed[name]) == described(before[name])
    assert packed["config"] == before["config"]
    assert packed["metrics"] == before["metrics"]


def test_packing_leaves_the_original_as_it_was():
    before = content()
    pack(before)
    assert len(before["arrays"]) == 3


def test_a_content_that_was_not_packed_is_left_alone():
    single = RecordDict({"arrays": ArrayRecord({"packed": Array(np.ones(2))}), "config": ConfigRecord()})
    assert not unpack(pack(single))
    np.testing.assert_array_equal(single["arrays"]["packed"].numpy(), np.ones(2))


def damaged(change):
    packed = pack(content())
    data = change(packed["arrays"]["packed"].data)
    return RecordDict(
        {"arrays": ArrayRecord({"packed": Array("uint8", (len(data),), "fedllm.packed", data)})}
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: data[:20],
        lambda data: b"",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: (2).to_bytes(8, "little") + b"{}",
        lambda data: (4).to_bytes(8, "little") + b"[[1]",
        lambda data: (3).to_bytes(8, "little") + b"[1]",
        lambda data: data[:8] + data[8:].replace(b'"numpy.ndarray", ', b'"numpy.ndarray", -', 1),
        lambda data: data[:8] + b"\xff" + data[9:],
    ],
)
def test_what_cannot_be_unpacked_is_an_error_that_names_the_record(change):
    with pytest.raises(ReplyError, match="'arrays'"):
        unpack(damaged(change))


@pytest.mark.parametrize("packed", [True, False])
def test_a_client_answers_as_it_was_asked(packed):
    seen = []

    @client._unpacked
    def answer(message, context):
        seen.append(decode(message.content["arrays"]))
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    before = content()
    message = Message(pack(before) if packed else before, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "id"
    reply = answer(message, None)
    assert len(reply.content["arrays"]) == (1 if packed else 3)
    assert seen[0].keys() == before["arrays"].keys()
    unpack(reply.content)
    assert described(reply.content["arrays"]) == described(before["arrays"])
