"""How much adapted weights matter, without a gradient of any base weight (HSplitLoRA, arXiv 2505.02795).

For y = W x holds Σ_j w_j ∂L/∂w_j = ⟨W, ∂L/∂W⟩ = Σ over tokens of ∂L/∂y · (W x): the output of the frozen layer times
the gradient that arrives there. It costs no matrix product and works on quantised weights. Reading the numerator as the
modulus of the sum, and measuring the cost of a weight by the bytes of one rank of its adapter, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

BYTES_PER_RANK = 16.0
"""Of a float32 parameter with its gradient and Adam's moments."""


class WeightImportance:
    """Gradient–weight products of a model's LoRA layers, summed over the backward passes that it watches.

    Args:
        model: layers with a ``base_layer`` are watched, as peft makes them; their names are those in this model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if hasattr(module, "base_layer")
        }
        self._products = dict.fromkeys(self._layers, 0.0)
        self._seen: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take in the backward passes of the forward passes inside."""
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, layer in self._layers.items():
            base = layer.base_layer
            handles.append(base.register_forward_hook(_keeping(outputs, name)))
            handles.append(layer.register_forward_hook(self._multiplying(outputs, name, base)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self) -> dict[str, float]:
        """|⟨W, ∂L/∂W⟩| over the bytes that a rank of W's adapter costs, for every layer that had a gradient."""
        return {
            name: abs(self._products[name]) / _cost(self._layers[name])
            for name in self._layers
            if name in self._seen
        }

    def _multiplying(self, outputs: dict[str, Tensor], name: str, base: Any) -> Any:
        bias = getattr(base, "bias", None)

        def after(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            product = outputs.pop(name)
            if not output.requires_grad:
                return

            def take(gradient: Tensor) -> None:
                plain = product if bias is None else product - bias.detach()
                self._products[name] += float((gradient.float() * plain.float()).sum())
                self._seen.add(name)

            output.register_hook(take)  # type: ignore[no-untyped-call]

        return after


def _keeping(outputs: dict[str, Tensor], name: str) -> Any:
    def after(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[name] = output.detach()

    return after


def _cost(layer: Any) -> float:
    return BYTES_PER_RANK * float(layer.in_features + layer.out_features)
