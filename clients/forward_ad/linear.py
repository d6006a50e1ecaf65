"""Frozen linear layers whose forward-mode derivative costs one matrix product, whatever holds their weights.

PyTorch's forward rule of a linear layer, y' = x' Wᵀ + x W'ᵀ, multiplies the input by a matrix of zeros when the weight
is frozen: a dual forward costs three products instead of two. And the layers of bitsandbytes lose tangents altogether
(``Linear4bit`` on a CPU) or round the input to integers (``Linear8bitLt``), which has no derivative. Here y' = x' Wᵀ,
with W dequantised for the two products and freed after them.
"""

from __future__ import annotations

from typing import Any

import torch
from fedllm.clients.forward_ad.exchange import Forward
from fedllm.clients.forward_ad.weights import Products, weight_of
from torch import Tensor, nn


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with a constant W; forward and reverse mode, under ``vmap`` and :mod:`torch.func` too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Products) -> Tensor:
        """The product; ``x`` is ``[..., in]``."""
        return weight.forward(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the weight as it is stored: unpacked weights that wait for the backward pass would fill the memory."""
        ctx.weight = inputs[2]
        ctx.shape = output.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, _weight: None) -> Tensor | None:
        """Tangent of the output from those of the input and the bias, either of which may be absent."""
        if x is None:
            return None if bias is None else bias.expand(ctx.shape)
        tangent: Tensor = ctx.weight.forward(x, bias)
        return tangent

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of the input and the bias."""
        if gradient is None:
            return None, None, None
        of_x = ctx.weight.backward(gradient) if ctx.needs_input_grad[0] else None
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None


def frozen_linear(module: nn.Module) -> Forward | None:
    """A forward function by :class:`FrozenLinear` for a frozen linear layer; None for any other module.

    ``nn.Linear``, transformers' ``Conv1D``, ``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes, and any
    :class:`~fedllm.clients.forward_ad.weights.Packed` layer, also where they are the base layers of low-rank adapters.
    A layer whose weight is trainable keeps its own rule, since its tangent is real.
    """
    weight = weight_of(module)
    if weight is None:
        return None
    layer: Any = module

    def forward(x: Tensor) -> Tensor:
        dtype = getattr(layer, "compute_dtype", None) or x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        output: Tensor = FrozenLinear.apply(x.to(dtype), bias, Products(weight, dtype))  # type: ignore[no-untyped-call]
        return output.to(x.dtype)

    return forward
