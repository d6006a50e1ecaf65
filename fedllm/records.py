"""Tensors to Flower records and back, and the checks that a reply must pass.

Flower's ``ArrayRecord`` carries NumPy arrays only: a bfloat16 tensor raises. An :class:`flwr.app.Array` is however just
``(dtype, shape, stype, data)``, so the codecs below put their own bytes in ``data`` and their name in ``stype``:

=======  ==========================  ==============================================================
codec    ``stype``                   ``data``
=======  ==========================  ==============================================================
fp32     ``numpy.ndarray``           ``.npy`` bytes, readable by any Flower app
fp16     ``numpy.ndarray``           the same in half precision
raw      ``fedllm.raw``              little-endian fp32 without a header, for a handful of scalars
bf16     ``fedllm.bf16``             little-endian 16-bit words
int8     ``fedllm.int8``             one fp32 scale per row (dim 0), then int8 values
=======  ==========================  ==============================================================

A lossy codec may carry the *difference* to a reference that both sides hold (``stype`` ends in ``+delta``), so that
its error is relative to the update and not to the weights.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from fedllm.errors import ReplyError

Codec = Literal["fp32", "bf16", "fp16", "int8", "raw"]
Tensors = Mapping[str, torch.Tensor]
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=]?[a-zA-Z]\d{1,2})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), ?\}"
)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES = "num-examples"
MODEL_VERSION = "model-version"
"""Key of a node's description, see :func:`fedllm.model_version.model_version`."""
SERVER_ROUND, SEED, UPLOAD_CODEC = "server-round", "seed", "upload-codec"
CLIENT, CLIENT_PARAMETERS = "client", "client-parameters"
"""Keys of a training message's configuration; the parameters are a JSON object."""
OWNED = "owned"
"""Key of a training message's configuration: names of the tensors that this client trains and returns."""
DIRECTION = "direction"
"""Array record of a training message: the server's last step, new adapter minus old."""
FROZEN = "frozen"
"""Array record of a message: factors of products that act beside the adapter and are not trained."""
SCALARS = "jvps"
"""Name of the array of a reply that carries projections of the gradient instead of tensors, ``[tangents]``."""
ASK_IMPORTANCE, IMPORTANCE = "ask-importance", "importance"
"""Key of a training message's configuration that asks for the importance of the adapted modules, and the array
record of the reply that tells it."""
ReplyKind = Literal["adapter", "gradient"]
ADAPTER: ReplyKind = "adapter"
GRADIENT: ReplyKind = "gradient"
"""What the arrays of a training reply are: a client update says what it ``sends``, a strategy what it ``reads``."""
HESSIAN_DIRECTION, HESSIAN_ROW = "hessian-direction", "hessian-row"
"""Array records of a training message and its reply: a direction, in which absent tensors are zero, and the Hessian of
the client's loss times it."""
CORRECTION, MEAN_GRADIENT = "correction", "mean-gradient"
"""Array records of a training message and its reply: what a client adds to its local gradients, and their mean
without it."""
NUM_TARGETS = "num-targets"
"""Metric of a reply: how many predictions its loss and gradient are means over, for example label tokens."""
LOSS_NOT_FINITE = "loss-not-finite"
"""Metric of a reply, 1, in the place of its loss: at the model that the client was sent it is not finite. The arrays
are gradients of zero, or the adapter as it was sent, and count for nothing; a strategy that cannot take back its last
step refuses the reply."""
ATTACK, ATTACK_PARAMETERS = "attack", "attack-parameters"
"""Keys of a training message's configuration that order a simulated client to attack; the parameters are JSON."""
SIMULATED = "simulated"
"""Key of a node's description: whether it is one of Flower's simulated clients."""
WORKERS = "workers"
"""Key of a simulated node's description: how many clients the simulation can run at the same time."""
MAX_EXAMPLES = 10**9
"""More examples than any client can train on in a round; a reply that claims more is refused."""

_NUMPY, _BF16, _INT8, _DELTA = "numpy.ndarray", "fedllm.bf16", "fedllm.int8", "+delta"
_RAW = "fedllm.raw"
_EXACT = ("fp32", "raw")
_MAX_HEADER = 512
_STYPES = {"bfloat16": {_BF16}, "int8": {_INT8}, "float32": {_NUMPY, _RAW}}
_CODEC_DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "raw": "float32",
}


def encode(tensors: Tensors, codec: Codec = "fp32", reference: Tensors | None = None) -> ArrayRecord:
    """Encode tensors for the wire.

    Args:
        tensors: any floating dtype and device.
        codec: how values are stored.
        reference: tensors of the same keys and shapes that the receiver holds bit for bit; a lossy codec then
            carries the difference to them. Ignored for fp32 and raw.
    """
    record: dict[str, Array] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu", torch.float32)
        relative = reference is not None and codec not in _EXACT
        if relative:
            assert reference is not None
            value = value - reference[name].to("cpu", torch.float32)
        record[name] = _encode_one(value, codec, relative)
    return ArrayRecord(record)


def encode_like(tensors: Tensors, dtypes: Mapping[str, str]) -> ArrayRecord:
    """Encode tensors as NumPy arrays of given dtypes (default float32), integers rounded.

    A model of a stock Flower app keeps its dtypes from round to round, those of its integer buffers too.
    """
    record: dict[str, Array] = {}
    for name, tensor in tensors.items():
        dtype = np.dtype(dtypes.get(name, "float32"))
        values = tensor.detach().cpu().numpy()
        record[name] = Array(np.asarray(np.rint(values) if dtype.kind in "iu" else values, dtype=dtype))
    return ArrayRecord(record)


def _encode_one(value: torch.Tensor, codec: Codec, relative: bool) -> Array:
    shape = tuple(value.shape)
    suffix = _DELTA if relative else ""
    if codec in ("fp32", "fp16"):
        array = value.to(torch.float16 if codec == "fp16" else torch.float32).numpy()
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return Array(str(array.dtype), shape, _NUMPY + suffix, buffer.getvalue())
    if codec == "raw":
        return Array("float32", shape, _RAW, value.contiguous().numpy().astype("<f4", copy=False).tobytes())
    if codec == "bf16":
        words = value.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return Array("bfloat16", shape, _BF16 + suffix, words.astype("<u2", copy=False).tobytes())
    count = max(shape[0], 1) if len(shape) > 1 else 1
    rows = value.reshape(count, value.numel() // count)
    # A row of zeros has scale 0; dividing by 1 instead keeps its codes 0 without a NaN.
    scales = rows.abs().amax(dim=1, keepdim=True) / 127 if rows.numel() else rows.new_zeros(count, 1)
    codes = (rows / torch.where(scales > 0, scales, 1.0)).round().clamp(-127, 127).to(torch.int8)
    data = scales.numpy().astype("<f4", copy=False).tobytes() + codes.numpy().tobytes()
    return Array("int8", shape, _INT8 + suffix, data)


def decode(record: ArrayRecord, reference: Tensors | None = None) -> dict[str, torch.Tensor]:
    """Decode a record to float32 CPU tensors (float64 and integer arrays keep their dtype).

    Args:
        record: as made by :func:`encode`, or by any Flower app from NumPy or torch.
        reference: what the sender's differences are relative to.

    Raises:
        ReplyError: bytes that do not fit the announced shape, an unknown encoding, or a difference without reference.
    """
    return {name: _decode_one(name, array, reference) for name, array in record.items()}


def _decode_one(name: str, array: Array, reference: Tensors | None) -> torch.Tensor:
    stored = _stored_values(name, array)
    half = stored.dtype in (torch.float16, torch.bfloat16)
    value = stored.to(torch.float32) if half else stored
    if array.stype.endswith(_DELTA):
        if reference is None or name not in reference:
            raise ReplyError(f"{name!r} carries a difference, but there is nothing that it is relative to")
        if reference[name].shape != value.shape:
            raise ReplyError(
                f"{name!r} has shape {tuple(value.shape)}, expected {tuple(reference[name].shape)}"
            )
        value = reference[name].to(torch.float32) + value
    return value


def _stored_values(name: str, array: Array) -> torch.Tensor:
    """The stored numbers in their own dtype; int8 codes are scaled."""
    shape, stype = tuple(array.shape), array.stype.removesuffix(_DELTA)
    if stype == _NUMPY:
        return _from_npy(name, array)
    count = math.prod(shape)
    rows = max(shape[0], 1) if len(shape) > 1 else 1
    expected = {_RAW: 4 * count, _BF16: 2 * count, _INT8: 4 * rows + count}.get(stype)
    if expected is None:
        raise ReplyError(
            f"{name!r} is encoded as {array.stype!r}, expected numpy.ndarray, fedllm.raw, "
            "fedllm.bf16 or fedllm.int8"
        )
    if any(side < 0 for side in shape) or len(array.data) != expected:
        raise ReplyError(f"{name!r} of shape {shape} has {len(array.data)} bytes, expected {expected}")
    if stype == _RAW:
        return torch.from_numpy(np.frombuffer(array.data, dtype="<f4").astype(np.float32)).reshape(shape)
    if stype == _BF16:
        words = np.frombuffer(array.data, dtype="<u2").astype(np.uint16)
        return torch.from_numpy(words).view(torch.bfloat16).reshape(shape)
    scales = np.frombuffer(array.data, dtype="<f4", count=rows).astype(np.float32)
    codes = np.frombuffer(array.data, dtype=np.int8, offset=4 * rows).astype(np.float32)
    return torch.from_numpy(codes.reshape(rows, count // rows) * scales[:, None]).reshape(shape)


def _from_npy(name: str, array: Array) -> torch.Tensor:
    """Read ``.npy`` bytes of real numbers; what they say must agree with what the array announces."""
    try:
        dtype = np.dtype(array.dtype)
        if dtype.kind not in "fiub":
            raise ReplyError(f"{name!r} has dtype {array.dtype}, expected real numbers")
        buffer = io.BytesIO(array.data)
        major, minor = np.lib.format.read_magic(buffer)
        if (major, minor) not in ((1, 0), (2, 0)):
            raise ValueError(f"format {major}.{minor} of .npy files")
        length = int.from_bytes(buffer.read(2 if major == 1 else 4), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        stored, fortran, shape = _parse_header(buffer.read(length))
        if stored != dtype:
            raise ReplyError(f"{name!r} holds {stored}, but announces {array.dtype}")
        flat = np.frombuffer(array.data, dtype=stored, offset=buffer.tell())
        values = flat.reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise ReplyError(f"{name!r} is not a readable array: {error}") from error
    # The buffer of `bytes` is read-only, which torch cannot share.
    return torch.from_numpy(values.astype(stored.newbyteorder("="), copy=True))


def _parse_header(header: bytes) -> tuple[np.dtype[np.generic], bool, tuple[int, ...]]:
    """Read the header of a ``.npy`` file by a fixed pattern: NumPy's reader evaluates it as Python."""
    match = _NPY_HEADER.fullmatch(header.decode("latin1").strip())
    if match is None:
        raise ValueError("a header that NumPy does not write")
    descr, fortran, shape = match.groups()
    return np.dtype(descr), fortran == "True", tuple(int(side) for side in shape.split(",") if side.strip())


def wire_bytes(record: ArrayRecord) -> int:
    """Bytes of the tensors in a record as they travel."""
    return sum(len(array.data) for array in record.values())


@dataclass(frozen=True)
class ArraySpec:
    """What a reply must carry under one name: the shape and the dtypes that may hold it."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


ReplySpec = Mapping[str, ArraySpec]


def spec_of(record: ArrayRecord, codec: Codec | None = None) -> dict[str, ArraySpec]:
    """The specification of a reply that has the keys and shapes of what was sent.

    Args:
        record: the arrays that were sent.
        codec: how the reply is to be encoded; None: in the dtype in which each array was sent.
    """
    return {
        name: ArraySpec(tuple(array.shape), frozenset({_CODEC_DTYPES[codec] if codec else array.dtype}))
        for name, array in record.items()
    }


def check_arrays(record: ArrayRecord, spec: ReplySpec) -> None:
    """Check the arrays of a reply without keeping a decoded copy.

    Raises:
        ReplyError: a missing or extra key, a wrong shape, rank or dtype, or a NaN or Inf; the key is named.
    """
    if missing := [name for name in spec if name not in record]:
        raise ReplyError(f"{len(missing)} arrays are missing, the first is {missing[0]!r}")
    if extra := [name for name in record if name not in spec]:
        raise ReplyError(f"{len(extra)} arrays were not asked for, the first is {extra[0]!r}")
    for name, expected in spec.items():
        array = record[name]
        if tuple(array.shape) != expected.shape:
            raise ReplyError(_shape_message(name, tuple(array.shape), expected.shape))
        if array.dtype not in expected.dtypes:
            raise ReplyError(
                f"{name!r} has dtype {array.dtype}, expected {' or '.join(sorted(expected.dtypes))}"
            )
        if (stype := array.stype.removesuffix(_DELTA)) not in _STYPES.get(array.dtype, {_NUMPY}):
            raise ReplyError(f"{name!r} of dtype {array.dtype} is encoded as {stype!r}")
        stored = _stored_values(name, array)
        if tuple(stored.shape) != expected.shape:
            raise ReplyError(_shape_message(name, tuple(stored.shape), expected.shape))
        # Aggregation is in float32 or wider: what overflows there is as bad as an infinity.
        if stored.is_floating_point() and not bool(
            (finite := torch.isfinite(stored.to(torch.float32))).all()
        ):
            raise ReplyError(f"{name!r} has {int((~finite).sum())} values that are NaN or infinite")


def _shape_message(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    for marker, axis in (("lora_A", 0), ("lora_B", -1)):
        if marker in name and len(found) == len(expected) == 2 and found[axis] != expected[axis]:
            return f"{name!r} has rank {found[axis]}, expected rank {expected[axis]} (shape {found} for {expected})"
    return f"{name!r} has shape {found}, expected {expected}"


def check_num_examples(metrics: Mapping[str, object], key: str = NUM_EXAMPLES) -> int:
    """The number of examples that a reply claims, if it can be believed.

    Raises:
        ReplyError: absent, not a whole number, not positive, not finite, or above :data:`MAX_EXAMPLES`.
    """
    value = metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReplyError(f"{key!r} is {value!r}, expected a positive whole number")
    if not math.isfinite(value) or value <= 0 or value != int(value):
        raise ReplyError(f"{key!r} is {value!r}, expected a positive whole number")
    if value > MAX_EXAMPLES:
        raise ReplyError(f"{key!r} is {value!r}, more than any client can have ({MAX_EXAMPLES})")
    return int(value)


def records_of(message: Message, kind: type[Record]) -> dict[str, Record]:
    """The records of one kind in a message.

    Flower's ``content.array_records`` builds a reference cycle with every access, which keeps the tensors alive until
    the garbage collector runs.
    """
    return {name: record for name, record in message.content.items() if isinstance(record, kind)}


def release(message: Message) -> None:
    """Free the tensors of a reply that has been folded in, whoever still holds the message."""
    for name in records_of(message, ArrayRecord):
        del message.content[name]


def only_metrics(message: Message) -> MetricRecord:
    """The one metric record of a reply.

    Raises:
        ReplyError: none, or more than one.
    """
    records = list(records_of(message, MetricRecord).values())
    if len(records) != 1:
        raise ReplyError(f"the reply has {len(records)} metric records, expected 1")
    return records[0]


def only_arrays(message: Message) -> ArrayRecord:
    """The one array record of a reply or request that carries the model.

    Raises:
        ReplyError: none, or more than one without one of the name ``arrays``.
    """
    records = records_of(message, ArrayRecord)
    if ARRAYS in records:
        return records[ARRAYS]
    if len(records) != 1:
        raise ReplyError(f"the message has {len(records)} array records, expected one named {ARRAYS!r}")
    return next(iter(records.values()))


def check_reply(message: Message, spec: ReplySpec | None, weight_key: str = NUM_EXAMPLES) -> None:
    """Check everything about a reply that could harm the global model.

    Args:
        message: a reply without error.
        spec: what its arrays must be; None for replies without arrays (evaluation).
        weight_key: the metric that weighs the reply.

    Raises:
        ReplyError: the first thing that is wrong.
    """
    metrics = only_metrics(message)
    check_num_examples(metrics, weight_key)
    for key, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        if not all(math.isfinite(entry) for entry in values):
            raise ReplyError(f"metric {key!r} is {value!r}, expected a finite number")
    if spec is None:
        return
    if LOSS_NOT_FINITE in metrics:
        raise ReplyError(
            "the loss at the model that was sent is not finite; the steps that led there were too long"
        )
    check_arrays(only_arrays(message), spec)
