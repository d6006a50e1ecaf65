"""Low-rank products that act beside a model's adapter and are not trained.

FLoRA (arXiv 2409.05976) merges what was learnt so far into the base weights. A quantised base would have to be
quantised again, and a base that several clients of one process share cannot be changed for one of them; the same
function comes out of adding the product's output to that of the LoRA layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional

from fedllm.errors import ModelError
from fedllm.lora.pairs import pair_names


@contextmanager
def frozen_products(model: torch.nn.Module, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let products act beside the adapter of a peft model while the context lasts.

    Args:
        model: with LoRA layers of the adapter ``default``, whose α/r scales the products too.
        factors: ``lora_A`` [r, k] and ``lora_B`` [d, r] by PEFT state-dict name, of any rank; none: nothing happens.

    Raises:
        ModelError: a name that is half a pair, or belongs to no LoRA layer of the model.
    """
    names = pair_names(factors)
    if names.heads:
        raise ModelError(f"frozen products: {names.heads[0]!r} is not one of two factors")
    layers = dict(model.named_modules()) if names.modules else {}
    with ExitStack() as stack:
        for module, pair in names.modules.items():
            layer: Any = layers.get(module)
            if not hasattr(layer, "lora_A"):
                raise ModelError(f"frozen products: the model has no LoRA layer {module!r}")
            hook = _adding(factors[pair.lora_A], factors[pair.lora_B], layer.scaling["default"])
            stack.callback(layer.register_forward_hook(hook).remove)
        yield


def _adding(factor_a: torch.Tensor, factor_b: torch.Tensor, scale: float) -> Any:
    def add(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        a, b = (factor.to(x.device, torch.float32) for factor in (factor_a, factor_b))
        product = functional.linear(functional.linear(x.to(a.dtype), a), b)
        return output + (scale * product).to(output.dtype)

    return add
