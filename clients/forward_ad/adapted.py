"""A frozen linear layer and its low-rank adapter as one function, forward and backward.

As separate operations an adapter costs five passes over tensors of the layer's output, each with a tangent, and PyTorch
takes a slow path wherever a tangent is known to be zero.
"""

from __future__ import annotations

from typing import Any

import torch
from fedllm.clients.forward_ad.exchange import Forward
from fedllm.clients.forward_ad.weights import Products, weight_of
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


class AdaptedLinear(torch.autograd.Function):
    """x Wᵀ + b + s (d Aᵀ) Bᵀ with a constant W, where d is x after dropout."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, dropped: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Products, scale: float
    ) -> Tensor:
        """The sum; ``x`` is ``[..., in]``, A ``[rank, in]`` and B ``[out, rank]``, computed in their own dtype."""
        low = F.linear(F.linear(dropped.to(a.dtype), a), b)
        return weight.forward(x, bias) + (low * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the small factors and the input."""
        _, dropped, a, b, _, ctx.weight, ctx.scale = inputs
        ctx.save_for_forward(dropped, a, b)
        ctx.save_for_backward(dropped, a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(
        ctx: Any,
        x: Tensor | None,
        dropped: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        *_: None,
    ) -> Tensor | None:
        """Tangent of the output from those that are there."""
        point, factor_a, factor_b = ctx.saved_tensors
        inner = None if dropped is None else F.linear(dropped.to(factor_a.dtype), factor_a)
        if a is not None:
            inner = _sum(inner, F.linear(point.to(a.dtype), a))
        low = None if inner is None else F.linear(inner, factor_b)
        if b is not None:
            low = _sum(low, F.linear(F.linear(point.to(factor_a.dtype), factor_a), b))
        total = None if low is None else (low * ctx.scale).to(point.dtype)
        if bias is not None:
            total = bias.expand(*point.shape[:-1], -1) if total is None else total + bias
        return total if x is None else _sum(total, ctx.weight.forward(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs and the factors."""
        if gradient is None:
            return (None,) * 7
        point, a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        inner = flat.to(b.dtype) @ b * ctx.scale
        rows = point.flatten(0, -2).to(a.dtype)
        return (
            ctx.weight.backward(gradient) if wanted[0] else None,
            (inner @ a).to(point.dtype).view_as(point) if wanted[1] else None,
            inner.t() @ rows if wanted[2] else None,
            flat.t().to(b.dtype) @ (rows @ a.t()) * ctx.scale if wanted[3] else None,
            flat.sum(0) if wanted[4] else None,
            None,
            None,
        )


def _sum(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


def adapted_linear(module: nn.Module) -> Forward | None:
    """A forward function by :class:`AdaptedLinear` for peft's plain LoRA on a frozen linear layer; None: it is not."""
    if not isinstance(module, LoraLayer):
        return None
    layer: Any = module
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    name = active[0]
    base, second = layer.get_base_layer(), layer.lora_B[name]
    frozen = weight_of(base)
    if frozen is None or not isinstance(second, nn.Linear) or second.bias is not None:
        return None

    def forward(x: Tensor) -> Tensor:
        # The attributes are read anew at every product: in a functional call they are other tensors.
        dtype = getattr(base, "compute_dtype", None) or x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        x = x.to(dtype)
        output: Tensor = AdaptedLinear.apply(
            x,
            layer.lora_dropout[name](x),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            bias,
            Products(frozen, dtype),
            layer.scaling[name],
        )
        return output

    return forward
