"""Frozen weights in whatever form they are stored, unpacked a few rows at a time.

The largest layer of a 13-billion-parameter model has 200 MiB when unpacked as a whole, more than all activations of a
dual pass over a short text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_UNPACKED = 2**23  # weights that are unpacked at a time; 16 MiB in bfloat16


@runtime_checkable
class Packed(Protocol):
    """A linear layer of any other package that can unpack its weight."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dequantize(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` − 1 of the weight ``[out, in]`` in the dtype of the layer's products."""
        ...


@dataclass(frozen=True)
class FrozenWeight:
    """A weight ``[out, in]``.

    Attributes:
        outputs: its rows.
        step: rows that are unpacked at a time.
        unpack: from the first row and the one after the last to these rows.
    """

    outputs: int
    step: int
    unpack: Callable[[int, int], Tensor]

    def dense(self) -> Tensor:
        """The whole weight."""
        return self.unpack(0, self.outputs)


class Products:
    """Products with a frozen weight in one dtype; unpacked once for all of them where that is small and safe."""

    def __init__(self, weight: FrozenWeight, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype
        # With a graph this object lives until the backward pass and would keep the unpacked weight; without one it is
        # freed right after the product and its derivative.
        self._keep = not torch.is_grad_enabled() and weight.step >= weight.outputs
        self._kept: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b."""
        size, step = self._weight.outputs, self._weight.step
        if step >= size:
            return F.linear(x, self._rows(0, size), bias)
        output = x.new_empty((*x.shape[:-1], size))
        for first in range(0, size, step):
            some = slice(first, min(first + step, size))
            part = None if bias is None else bias[some]
            output[..., some] = F.linear(x, self._rows(some.start, some.stop), part)
        return output

    def backward(self, gradient: Tensor) -> Tensor:
        """G W."""
        size, step = self._weight.outputs, self._weight.step
        total: Tensor | None = None
        for first in range(0, size, step):
            last = min(first + step, size)
            part = gradient[..., first:last] @ self._rows(first, last)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _rows(self, first: int, last: int) -> Tensor:
        if self._kept is not None:
            return self._kept
        rows = self._weight.unpack(first, last).to(self._dtype)
        if self._keep:
            self._kept = rows
        return rows


def weight_of(module: nn.Module) -> FrozenWeight | None:
    """The frozen weight of a linear layer; None: it is no such layer, or is trained."""
    own: Any = module
    if type(module).__module__.partition(".")[0] == "bitsandbytes":
        return _bitsandbytes_weight(own)
    if isinstance(module, Packed):
        return FrozenWeight(own.out_features, _step(own.in_features), own.dequantize)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad:
        return None
    # The attribute is read anew at every product: in a functional call it is another tensor.
    if isinstance(module, Conv1D):
        return FrozenWeight(weight.shape[1], weight.shape[1], lambda first, last: own.weight.t())
    if type(module).forward is nn.Linear.forward:
        return FrozenWeight(weight.shape[0], weight.shape[0], lambda first, last: own.weight)
    return None


def _step(inputs: int) -> int:
    return max(1, _UNPACKED // inputs)


def _bitsandbytes_weight(module: Any) -> FrozenWeight | None:
    bitsandbytes = importlib.import_module("bitsandbytes")
    functional = importlib.import_module("bitsandbytes.functional")
    outputs, inputs = module.out_features, module.in_features
    if isinstance(module, bitsandbytes.nn.Linear4bit):

        def rows_of_4bit(first: int, last: int) -> Tensor:
            data, state = module.weight.data, module.weight.quant_state
            if (first, last) == (0, outputs):
                found: Tensor = functional.dequantize_4bit(data, state)
                return found
            packed = data.reshape(-1)[first * inputs // 2 : last * inputs // 2].view(-1, 1)
            scales = state.absmax[first * inputs // state.blocksize : last * inputs // state.blocksize]
            part = functional.QuantState(
                scales, torch.Size((last - first, inputs)), state.code, state.blocksize, state.quant_type, state.dtype
            )  # fmt: skip
            found = functional.dequantize_4bit(packed, part)
            return found

        state = module.weight.quant_state
        # A block of equal scale must not cross a row, and scales that are quantised themselves cannot be cut.
        divisible = state is not None and not state.nested and inputs % state.blocksize == 0
        return FrozenWeight(outputs, _step(inputs) if divisible else outputs, rows_of_4bit)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt) and module.weight.dtype == torch.int8:

        def rows_of_8bit(first: int, last: int) -> Tensor:
            # The scales move from the weight to the layer's state at its first own forward.
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found: Tensor = functional.int8_vectorwise_dequant(
                module.weight.data[first:last], scales[first:last]
            )
            return found

        return FrozenWeight(outputs, _step(inputs), rows_of_8bit)
    return None
