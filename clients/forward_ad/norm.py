"""Layer normalisation whose forward-mode derivative is exact in half precision.

PyTorch's rule takes the cube of 1/σ in the dtype of the input, which overflows in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from fedllm.clients.forward_ad.exchange import Forward
from torch import Tensor, nn


class FrozenLayerNorm(torch.autograd.Function):
    """(x − µ)/σ · w + b over the last dimension with constant w and b, in float32 or wider inside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """The normalised input."""
        standard, _ = _standardise(x, eps)
        scaled = standard * weight
        return (scaled if bias is None else scaled + bias).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the input."""
        x, weight, _, ctx.eps = inputs
        ctx.save_for_forward(x, weight)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        """Tangent of the output."""
        point, weight = ctx.saved_tensors
        tangent: Tensor = _project(x, point, ctx.eps) * weight
        return tangent.to(point.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the input."""
        point, weight = ctx.saved_tensors
        return _project(gradient * weight, point, ctx.eps).to(point.dtype), None, None, None


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def _project(vector: Tensor, x: Tensor, eps: float) -> Tensor:
    """The symmetric derivative of standardisation at x, applied to a vector."""
    standard, inverse = _standardise(x, eps)
    vector = vector.to(standard.dtype)
    aligned = (standard * vector).mean(-1, keepdim=True)
    return (vector - vector.mean(-1, keepdim=True) - standard * aligned) * inverse


def frozen_layer_norm(module: nn.Module) -> Forward | None:
    """A forward function by :class:`FrozenLayerNorm` for a frozen ``nn.LayerNorm``; None for any other module."""
    if not isinstance(module, nn.LayerNorm) or module.weight is None or len(module.normalized_shape) != 1:
        return None
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None

    def forward(x: Tensor) -> Tensor:
        output: Tensor = FrozenLayerNorm.apply(x, module.weight, module.bias, module.eps)  # type: ignore[no-untyped-call]
        return output

    return forward
