"""Activations and their gradients as bytes: fp32, bf16, fp16, int8 with a scale per row, and integers as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fedllm.errors import SplitError

ActivationCodec = Literal["fp32", "bf16", "fp16", "int8"]
ACTIVATION_CODECS: tuple[str, ...] = get_args(ActivationCodec)

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INTEGERS = {"int32": torch.int32, "uint8": torch.uint8}
_INTEGER_CODECS = {torch.int64: "int32", torch.int32: "int32", torch.bool: "uint8", torch.uint8: "uint8"}


def codec_of(tensor: Tensor, floats: ActivationCodec) -> str:
    """The codec that carries a tensor: the given one for floating point, an integer one for ids and masks.

    Raises:
        SplitError: a dtype that does not travel.
    """
    if tensor.is_floating_point():
        return floats
    if tensor.dtype not in _INTEGER_CODECS:
        raise SplitError(
            f"a tensor of {tensor.dtype} does not travel; expected floats, ids, labels or a mask"
        )
    return _INTEGER_CODECS[tensor.dtype]


def num_bytes(shape: Sequence[int], codec: str) -> int:
    """Bytes of a tensor on the wire; int8 adds four for the scale of every row (the last axis is a row).

    Raises:
        SplitError: no such codec.
    """
    count = math.prod(shape)
    if codec == "int8":
        return count + 4 * (count // shape[-1] if count else 0)
    dtype = _FLOATS.get(codec) or _INTEGERS.get(codec)
    if dtype is None:
        raise SplitError(f"unknown codec {codec!r}; known: {', '.join([*ACTIVATION_CODECS, *_INTEGERS])}")
    return count * dtype.itemsize


def to_buffers(tensor: Tensor, codec: str) -> list[memoryview]:
    """The bytes of a tensor, little-endian, as views that need no copy where the tensor has them already."""
    value = tensor.detach().cpu()
    if codec == "int8":
        rows = value.float().reshape(-1, value.shape[-1]) if value.numel() else value.float().reshape(0, 1)
        scales = rows.abs().amax(dim=1, keepdim=True) / 127
        # A row of zeros has scale 0; dividing by 1 instead keeps its codes 0 without a NaN.
        codes = (rows / torch.where(scales > 0, scales, 1.0)).round_().to(torch.int8)
        return [_view(scales), _view(codes)]
    return [_view(value.to(_FLOATS.get(codec) or _INTEGERS[codec]))]


def from_buffer(buffer: bytearray, shape: Sequence[int], codec: str) -> Tensor:
    """The tensor of its bytes: float32 for every floating codec, int64 for ids.

    Raises:
        SplitError: a value is NaN or infinite.
    """
    if codec == "int8":
        count = math.prod(shape)
        rows = count // shape[-1] if count else 0
        scales = torch.frombuffer(buffer, dtype=torch.float32, count=rows) if rows else torch.zeros(0)
        codes = torch.frombuffer(buffer, dtype=torch.int8, offset=4 * rows) if count else torch.zeros(0)
        value = (
            (codes.float().view(rows, -1) * scales[:, None]).view(*shape) if count else torch.zeros(*shape)
        )
    else:
        dtype = _FLOATS.get(codec) or _INTEGERS[codec]
        flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.zeros(0, dtype=dtype)
        value = flat.view(*shape)
        if codec in _INTEGERS:
            return value.long()
    value = value.float()
    # One pass instead of two: a sum is NaN or infinite if any value is; only then is it worth to look.
    if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
        raise SplitError("values are not finite (NaN or Inf)")
    return value


def _view(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().view(-1)
    array = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.data.cast("B")
