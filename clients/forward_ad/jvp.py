"""Loss and directional derivatives in one dual forward pass, with no graph but that of the heads.

The heads of a classifier are differentiated exactly: they come last, so that their graph holds little more than the
pooled features, and their gradient would otherwise be the largest noise by far, since they hold most of the trainable
values. Below them the pass runs without a graph; what a layer computes is freed as soon as the next one has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Tensors = Mapping[str, Tensor]
Objective = Callable[[Tensors], Tensor]
"""From tensors that stand in for those of the model to the loss, a scalar."""


@dataclass(frozen=True)
class DualPass:
    """What one batch told.

    Attributes:
        loss: at the point.
        jvps: ⟨∇loss, v_k⟩ ``[K]``, float64 on the CPU.
        heads: exact gradients of the heads by name.
    """

    loss: float
    jvps: Tensor
    heads: dict[str, Tensor]


def dual_pass(
    objective: Objective,
    point: Tensors,
    tangents: Sequence[Tensors],
    heads: Mapping[str, nn.Parameter] | None = None,
    model: nn.Module | None = None,
    at_once: int = 1,
) -> DualPass:
    """The loss, its derivatives along K tangents, and the exact gradient of the heads.

    With ``at_once`` = 1 every tangent costs a dual pass, two inferences; with more, ``vmap`` shares the primal between
    them: (1 + n) inferences for n tangents, and n times the memory of their tangents.

    Args:
        objective: the loss as a function of the perturbed tensors.
        point: the perturbed tensors; may be empty, if there are no tangents either.
        tangents: K mappings with the names, shapes and dtypes of ``point``.
        heads: parameters that are differentiated exactly; they belong to the last modules to run.
        model: whose modules hold the heads.
        at_once: tangents that share a pass.
    """
    loss, slopes, gradients = 0.0, [], {}
    groups: list[Sequence[Tensors]] = [
        tangents[first : first + at_once] for first in range(0, len(tangents), at_once)
    ]
    for number, group in enumerate(groups or [[]]):
        exact = heads if heads and number == 0 else None
        with torch.no_grad(), _graph_from(model, exact) if exact else nullcontext():
            value, along = _derivatives(objective, point, group)
            slopes.append(along.detach().to("cpu", torch.float64))
            if number == 0:
                loss = float(value.detach())
            if exact:
                found = torch.autograd.grad(value, list(exact.values()))
                gradients = dict(zip(exact, found, strict=True))
    return DualPass(loss, torch.cat(slopes), gradients)


def _derivatives(objective: Objective, point: Tensors, group: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    if not group or not point:
        value = objective(point)
        return value, value.new_zeros(len(group))

    if len(group) == 1:
        # Faster than torch.func, whose layers of transforms are needed for vmap only.
        with forward_ad.dual_level():
            make, unpack = cast(Any, forward_ad.make_dual), cast(Any, forward_ad.unpack_dual)
            value, slope = unpack(objective({name: make(v, group[0][name]) for name, v in point.items()}))
            return value, value.new_zeros(1) if slope is None else slope.reshape(1)

    def along(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, slope = cast(Any, torch.func.jvp)(objective, (dict(point),), (tangent,))
        return value, slope

    stacked = {name: torch.stack([tangent[name] for tangent in group]) for name in point}
    value, slopes = cast(Any, torch.vmap)(along, out_dims=(None, 0), randomness="same")(stacked)
    return value, slopes


@contextmanager
def _graph_from(model: nn.Module | None, heads: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Record a graph from the first head that runs; the caller's ``no_grad`` block ends the recording."""
    assert model is not None
    own = {id(parameter) for parameter in heads.values()}
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs: torch._C._set_grad_enabled(True))
        for module in model.modules()
        if any(id(parameter) in own for parameter in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class LossOf(nn.Module):
    """A model's loss on a batch as a function of some of its parameters, called by :meth:`at`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        names: Mapping[str, str],
    ) -> None:
        """Keep the model.

        Args:
            model: with its adapter.
            loss: of the model and a batch.
            names: from the names of tensors in messages to those of the model's parameters.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.names = {name: f"model.{parameter}" for name, parameter in names.items()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss with the model's own parameters."""
        return self.loss(self.model, batch)

    def at(self, batch: dict[str, Tensor]) -> Objective:
        """The loss on a batch as a function of the tensors that stand in for parameters."""

        def objective(tensors: Tensors) -> Tensor:
            stand_ins = {self.names[name]: tensor for name, tensor in tensors.items()}
            value: Tensor = torch.func.functional_call(self, stand_ins, (batch,))
            return value

        return objective


def parameter_names(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The model's names of parameters that messages name otherwise."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: known[id(parameter)] for name, parameter in parameters.items()}
