"""LoRA layers that change their rank in place, or step aside: one base model serves adapters of every form.

A *form* tells which modules an adapter holds and with which rank. A layer keeps the α/r that the configuration gave it
whatever its rank (see :mod:`fedllm.lora_targets`), so that the product B·A means the same on every node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fedllm.errors import ModelError

Form = Mapping[str, int]
"""Rank by module, as :attr:`AdapterLayers.own` names them; a module that is not there is not adapted."""

_ADAPTER = "default"


@dataclass(frozen=True)
class _Slot:
    """One adapted module; its factors outlive the time in which the layer does not use them."""

    layer: Any
    name_a: str
    name_b: str
    factor_a: nn.Linear
    factor_b: nn.Linear

    @property
    def a(self) -> nn.Parameter:
        return cast(nn.Parameter, self.factor_a.weight)

    @property
    def b(self) -> nn.Parameter:
        return cast(nn.Parameter, self.factor_b.weight)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def in_use(self) -> bool:
        return _ADAPTER in self.layer.lora_A

    def take(self, rank: int | None) -> None:
        if rank is None:
            # peft passes a layer by whose ModuleDict lacks the active adapter: no product, no activation is kept.
            for factors in (self.layer.lora_A, self.layer.lora_B):
                if _ADAPTER in factors:
                    del factors[_ADAPTER]
            return
        if rank != self.rank:
            self.factor_a.weight = _resized(self.a, (rank, self.factor_a.in_features))
            self.factor_b.weight = _resized(self.b, (self.factor_b.out_features, rank))
            self.factor_a.out_features = self.factor_b.in_features = rank
            self.layer.r[_ADAPTER] = rank
            self.layer.lora_alpha[_ADAPTER] = self.layer.scaling[_ADAPTER] * rank
        if not self.in_use:
            self.layer.lora_A[_ADAPTER], self.layer.lora_B[_ADAPTER] = self.factor_a, self.factor_b
            self.factor_a.train(self.layer.training)
            self.factor_b.train(self.layer.training)


class AdapterLayers:
    """The LoRA layers of a peft model.

    Args:
        model: a freshly built peft model.
        names: PEFT state-dict names by ``id`` of the parameter.

    Attributes:
        own: the form that the configuration gave the adapter, by module name within the base model.
    """

    def __init__(self, model: Any, names: Mapping[int, str]) -> None:
        self._slots: dict[str, _Slot] = {}
        for module, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                factor_a, factor_b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
                name_a, name_b = names[id(factor_a.weight)], names[id(factor_b.weight)]
                self._slots[module] = _Slot(layer, name_a, name_b, factor_a, factor_b)  # type: ignore[arg-type]
        self.own: Form = {module: slot.rank for module, slot in self._slots.items()}

    @property
    def form(self) -> dict[str, int]:
        """The form that the layers have now."""
        return {module: slot.rank for module, slot in self._slots.items() if slot.in_use}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The factors in use by PEFT state-dict name."""
        used = [slot for slot in self._slots.values() if slot.in_use]
        return {slot.name_a: slot.a for slot in used} | {slot.name_b: slot.b for slot in used}

    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
        """``lora_A``, ``lora_B`` and α/r of the modules that are adapted now."""
        return {
            module: (slot.a, slot.b, float(slot.layer.scaling[_ADAPTER]))
            for module, slot in self._slots.items()
            if slot.in_use
        }

    def form_of(self, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The form of an adapter, told by the shapes of its factors.

        Factors that contradict each other are found by :func:`check_state` against :meth:`shapes` of this form.

        Raises:
            ModelError: the adapter holds no factor of this model, or one without a single row or column.
        """
        form: dict[str, int] = {}
        for module, slot in self._slots.items():
            a, b = state.get(slot.name_a), state.get(slot.name_b)
            if a is not None or b is not None:
                form[module] = _rank_of(a, b, self.own[module])
        if not form:
            raise ModelError(f"the adapter holds no factor of this model's {len(self._slots)} LoRA modules")
        for module, rank in form.items():
            if rank < 1:
                raise ModelError(f"{module}: adapter of rank {rank}, expected at least 1")
        return form

    def shapes(self, form: Form) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's factors by PEFT state-dict name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, rank in form.items():
            slot = self._slots[module]
            shapes[slot.name_a] = (rank, slot.factor_a.in_features)
            shapes[slot.name_b] = (slot.factor_b.out_features, rank)
        return shapes

    def take(self, form: Form) -> None:
        """Give every layer the rank of a form; layers of the same rank keep their parameters, untouched.

        A factor that changes its rank becomes a new parameter whose values are undefined until a state is loaded.
        """
        for module, slot in self._slots.items():
            slot.take(form.get(module))

    def describe(self, form: Form, settings: Any) -> None:
        """Write a form into a ``peft.LoraConfig``, so that peft builds the adapter with it."""
        if dict(form) == dict(self.own):
            return
        settings.target_modules = sorted(form)
        # A pattern of peft matches the end of a name, too; full names match nothing but themselves.
        settings.rank_pattern = {
            re.escape(module): rank for module, rank in form.items() if rank != settings.r
        }
        settings.alpha_pattern = {
            re.escape(module): self._slots[module].layer.scaling[_ADAPTER] * rank
            for module, rank in form.items()
            if rank != settings.r
        }


def check_state(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Check an adapter before a single value is copied.

    Args:
        state: tensors by PEFT state-dict name.
        shapes: what they must be.
        model: name of the model, for messages.

    Raises:
        ModelError: a key is missing or unknown, a shape or rank differs, or a value is not finite.
    """
    missing = [name for name in shapes if name not in state]
    extra = [name for name in state if name not in shapes]
    if missing or extra:
        raise ModelError(
            f"the adapter is not of this model ({model}): {_count(missing, 'missing')}; {_count(extra, 'unexpected')}"
        )
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(_describe_shapes(name, tuple(tensor.shape), shape))
        if not tensor.is_floating_point():
            raise ModelError(f"adapter tensor {name}: expected floating point, found {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"adapter tensor {name} holds values that are not finite (NaN or Inf)")


def _rank_of(a: torch.Tensor | None, b: torch.Tensor | None, fallback: int) -> int:
    if b is not None and b.dim() == 2:
        return int(b.shape[1])
    if a is not None and a.dim() == 2:
        return int(a.shape[0])
    return fallback


def _resized(parameter: nn.Parameter, shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(parameter.new_zeros(shape), requires_grad=parameter.requires_grad)


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


def _describe_shapes(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    rank_axis = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    two_axes = len(found) == len(expected) == 2
    if rank_axis is not None and two_axes and found[1 - rank_axis] == expected[1 - rank_axis]:
        return f"{name}: adapter of rank {found[rank_axis]}, expected rank {expected[rank_axis]}"
    return f"{name}: adapter tensor of shape {found}, expected {expected}"
