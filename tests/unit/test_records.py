"""Codecs against their definition, and every kind of bad reply."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import ReplyError
from fedllm.records import check_arrays, check_num_examples, check_reply, decode, encode, spec_of, wire_bytes

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def tensor(shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize(
    ("codec", "tolerance"), [("fp32", 0.0), ("fp16", 2**-10), ("bf16", 2**-8), ("int8", 1 / 127)]
)
def test_codec_round_trip_within_its_resolution(codec, tolerance, shape, seed, scale):
    if codec == "fp16" and scale != 1.0:
        scale = 1.0  # half precision has no room for the others
    value = tensor(shape, seed, scale)
    (back,) = decode(encode({"w": value}, codec)).values()
    assert back.dtype == torch.float32
    assert back.shape == value.shape
    if value.numel():
        # int8 is relative to the largest value of the row, the floating codecs to each value.
        rows = value.reshape(value.shape[0] if value.ndim > 1 else 1, -1)
        reference = rows.abs().amax(1, keepdim=True).expand_as(rows) if codec == "int8" else rows.abs()
        slack = 1e-7 if codec == "fp16" else 0.0
        assert ((back.reshape(rows.shape) - rows).abs() <= tolerance * reference + slack).all()


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_difference_makes_the_error_relative_to_the_update(codec):
    reference = {"w": tensor((8, 16), 1, 100.0)}
    new = {"w": reference["w"] + tensor((8, 16), 2, 1e-3)}
    plain = decode(encode(new, codec))["w"]
    relative = decode(encode(new, codec, reference), reference)["w"]
    assert (relative - new["w"]).abs().max() < 0.02 * (plain - new["w"]).abs().max()


def test_difference_without_reference_is_refused():
    record = encode({"w": torch.ones(3)}, "int8", {"w": torch.zeros(3)})
    with pytest.raises(ReplyError, match="nothing that it is relative to"):
        decode(record)


def test_bytes_on_the_wire():
    value = {"w": torch.zeros(64, 1024)}
    full = wire_bytes(encode(value))
    assert wire_bytes(encode(value, "bf16")) / full == pytest.approx(0.5, abs=0.01)
    assert wire_bytes(encode(value, "int8")) / full == pytest.approx(0.25, abs=0.01)


def test_bf16_is_what_torch_rounds_to():
    value = tensor((5, 7))
    assert torch.equal(decode(encode({"w": value}, "bf16"))["w"], value.to(torch.bfloat16).float())


def test_any_flower_app_reads_fp32():
    value = tensor((3, 4))
    assert np.array_equal(encode({"w": value})["w"].numpy(), value.numpy())


def test_flower_records_are_read():
    record = ArrayRecord(
        {"a": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))), "b": Array(np.arange(3))}
    )
    decoded = decode(record)
    assert decoded["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert decoded["b"].dtype == torch.int64


def test_objects_are_never_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    record = ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", buffer.getvalue())})
    with pytest.raises(ReplyError, match="dtype object, expected real numbers"):
        decode(record)


SENT = encode(
    {"layer.lora_A.weight": torch.ones(4, 6), "layer.lora_B.weight": torch.zeros(6, 4), "bias": torch.ones(3)}
)


def changed(**changes):
    arrays = {name: value.clone() for name, value in decode(SENT).items()}
    for name, value in changes.items():
        name = {"a": "layer.lora_A.weight", "b": "layer.lora_B.weight"}.get(name, name)
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    return encode(arrays)


BAD_ARRAYS = {
    "missing": (changed(bias=None), "1 arrays are missing, the first is 'bias'"),
    "extra": (changed(more=torch.ones(1)), "not asked for, the first is 'more'"),
    "shape": (changed(bias=torch.ones(1, 3)), r"'bias' has shape \(1, 3\), expected \(3,\)"),
    "rank of A": (changed(a=torch.ones(2, 6)), "has rank 2, expected rank 4"),
    "rank of B": (changed(b=torch.ones(6, 8)), "has rank 8, expected rank 4"),
    "nan": (
        changed(bias=torch.tensor([1.0, float("nan"), 2])),
        "'bias' has 1 values that are NaN or infinite",
    ),
    "inf": (changed(bias=torch.tensor([1.0, float("inf"), 2])), "NaN or infinite"),
    "dtype": (ArrayRecord({**SENT, "bias": Array(np.ones(3))}), "dtype float64, expected float32"),
    "lying shape": (
        ArrayRecord(
            {**SENT, "bias": Array("float32", (3,), "numpy.ndarray", SENT["layer.lora_A.weight"].data)}
        ),
        r"has shape \(4, 6\), expected \(3,\)",
    ),
    "truncated": (
        ArrayRecord({**SENT, "bias": Array("float32", (3,), "numpy.ndarray", SENT["bias"].data[:-2])}),
        "not a readable array",
    ),
    "garbage": (
        ArrayRecord({**SENT, "bias": Array("float32", (3,), "numpy.ndarray", b"xx")}),
        "not a readable array",
    ),
    "encoding": (ArrayRecord({**SENT, "bias": Array("float32", (3,), "zip", b"xx")}), "encoded as 'zip'"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(name):
    record, message = BAD_ARRAYS[name]
    with pytest.raises(ReplyError, match=message):
        check_arrays(record, spec_of(SENT))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_truncated_codec_is_refused(codec):
    record = encode(decode(SENT), codec)
    record["bias"].data = record["bias"].data[:-1]
    with pytest.raises(ReplyError, match="bytes, expected"):
        check_arrays(record, spec_of(SENT, codec))


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_nan_is_seen_through_every_codec(codec):
    arrays = decode(SENT)
    arrays["bias"] = torch.tensor([float("nan"), 1, 2])
    with pytest.raises(ReplyError, match="NaN"):
        check_arrays(encode(arrays, codec), spec_of(SENT, codec))


def test_good_arrays_pass():
    check_arrays(changed(bias=torch.zeros(3)), spec_of(SENT))
    check_arrays(encode(decode(SENT), "int8"), spec_of(SENT, "int8"))


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), 1.5, 10**12, None, "7", True])
def test_unbelievable_num_examples(value):
    with pytest.raises(ReplyError, match="num-examples"):
        check_num_examples({"num-examples": value} if value is not None else {})


def test_reply_with_nan_loss_or_no_metrics_is_refused():
    sent = Message(RecordDict(), dst_node_id=1, message_type="train")
    nan = Message(RecordDict({"m": MetricRecord({"num-examples": 3, "loss": float("nan")})}), reply_to=sent)
    with pytest.raises(ReplyError, match="'loss'"):
        check_reply(nan, None)
    with pytest.raises(ReplyError, match="0 metric records"):
        check_reply(Message(RecordDict(), reply_to=sent), None)


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def with_header(header):
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 12


@pytest.mark.parametrize(
    "data",
    [
        npy(np.full(3, 1e300)),
        npy(np.full(3, 1 + 2j)),
        npy(np.ones(3, dtype=bool)),
        npy(np.array(["a", "b", "c"])),
        with_header("{"),
        with_header("[" * 400),
        with_header("-" * 9000 + "1"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }"),
    ],
    ids=["wider", "complex", "bool", "text", "torn", "nested", "long", "huge"],
)
def test_bytes_that_are_not_what_they_announce(data):
    with pytest.raises(ReplyError, match="'bias'"):
        check_arrays(
            ArrayRecord({**SENT, "bias": Array("float32", (3,), "numpy.ndarray", data)}), spec_of(SENT)
        )


def test_values_that_overflow_in_float32_are_infinite():
    wide = ArrayRecord({"w": Array(np.array([1.0, 2.0]))})
    reply = ArrayRecord({"w": Array(np.array([1.0, 1e300]))})
    with pytest.raises(ReplyError, match="NaN or infinite"):
        check_arrays(reply, spec_of(wide))


def test_a_codec_that_was_not_asked_for():
    arrays = encode(decode(SENT), "bf16")
    with pytest.raises(ReplyError, match="dtype bfloat16, expected float32"):
        check_arrays(arrays, spec_of(SENT, "fp32"))
    disguised = ArrayRecord({**SENT, "bias": Array("float32", (3,), "fedllm.bf16", b"\0" * 6)})
    with pytest.raises(ReplyError, match=r"encoded as 'fedllm.bf16'"):
        check_arrays(disguised, spec_of(SENT))
