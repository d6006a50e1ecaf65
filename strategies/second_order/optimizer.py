"""Between named tensors and flat vectors: updates of a vector as server optimisers of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from fedllm.strategies.second_order.damping import Losses
from torch import Tensor


class GradientUpdate(Protocol):
    """A server step from a mean gradient, see :mod:`.updates`.

    Attributes:
        diagnostics: numbers that tell of the last step, by name.
    """

    diagnostics: dict[str, float]

    def step(self, gradient: Tensor, losses: Losses | None = None) -> Tensor:
        """The change of the parameters ``[d]``, a new vector; the losses are those of the clients, where known."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        ...


class GradientOptimizer:
    """A :class:`fedllm.strategy.ServerOptimizer` that gives mean gradients, flattened, to an update.

    Args:
        update: takes the step.
        pseudo: 0: the folded replies are gradients; else they are adapters, see :func:`mean_gradient`.
    """

    def __init__(self, update: GradientUpdate, pseudo: float = 0.0) -> None:
        self._update = update
        self._pseudo = pseudo
        self._losses: Losses = {}

    def watch(self, losses: Losses) -> None:
        """Let the next step know the losses of the replies that it is made of, which may still be coming in."""
        self._losses = losses

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """What the update tells of its last step."""
        return self._update.diagnostics

    def __repr__(self) -> str:
        """The update that takes the steps."""
        return type(self._update).__name__

    def step(
        self, server_round: int, current: Mapping[str, Tensor], folded: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The next global model, float32 or as it was."""
        gradient = mean_gradient(current, folded, self._pseudo)
        return moved_in_place(current, self._update.step(gradient, self._losses))

    def state_dict(self) -> dict[str, Any]:
        """The update's state."""
        return self._update.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._update.load_state_dict(state)


def flatten(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """One vector of the tensors in the order of ``like``; float32, or float64 where that has nothing narrower."""
    return _filled(tensors.__getitem__, like)


def flatten_out(tensors: dict[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """:func:`flatten`, taking the tensors out: each is freed as soon as it is copied."""
    return _filled(tensors.pop, like)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of a vector with the names and shapes of ``like``."""
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def moved(current: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
    """The parameters after a step, a flat vector."""
    return {name: current[name] + part for name, part in unflatten(step, current).items()}


def moved_in_place(current: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
    """The same in the memory of the step, where that is of the parameters' dtype."""
    return {
        name: part.add_(current[name]) if part.dtype == current[name].dtype else current[name] + part
        for name, part in unflatten(step, current).items()
    }


def mean_gradient(current: Mapping[str, Tensor], folded: dict[str, Tensor], pseudo: float) -> Tensor:
    """The gradient that folded replies stand for, a flat vector.

    Args:
        current: the parameters that the clients were sent.
        folded: mean of the replies; its tensors are taken out.
        pseudo: 0: the replies are gradients. Else they are parameters after local steps, and their distance to those
            that were sent, divided by this, is the gradient; with the clients' learning rate times their steps it has
            a gradient's size.
    """
    if not pseudo:
        return flatten_out(folded, current)
    return _filled(lambda name: (current[name].double() - folded.pop(name)) / pseudo, current)


def _filled(tensor_of: Callable[[str], Tensor], like: Mapping[str, Tensor]) -> Tensor:
    wide = all(tensor.dtype == torch.float64 for tensor in like.values())
    sizes = [tensor.numel() for tensor in like.values()]
    vector = torch.empty(sum(sizes), dtype=torch.float64 if wide else torch.float32)
    for name, part in zip(like, torch.split(vector, sizes), strict=True):
        part.copy_(tensor_of(name).reshape(-1))
    return vector
