"""A diagonal metric from the gradients' second moment, in which the rest of the space is damped alike (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from fedllm.strategies.second_order.moments import Moment
from fedllm.strategies.second_order.vectors import blocks, wide
from torch import Tensor

_LARGEST = 1e18  # squares of what lies beyond would not fit float32


class SecondMoment:
    """D = √ŝ + τ r with ŝ the corrected mean of g² and r = √mean(ŝ): Adam's scaling, with a floor in its own units.

    Damping ρD instead of ρI lets a step of η/ρ mean the same for every coordinate and every model: about η/ρ a
    coordinate, as Adam's learning rate does (Kingma & Ba, 2015). Its use as the metric of FAGH's damping is ours.

    Args:
        beta: decay of the mean of squares, 0 ≤ β < 1.
        tau: floor in units of the root mean square gradient, positive.

    Raises:
        ValueError: β or τ lies outside its bounds.
    """

    def __init__(self, beta: float, tau: float) -> None:
        if not tau > 0:
            raise ValueError(f"tau is {tau:g}, expected a positive number")
        self.tau = tau
        self._squares = Moment(beta)
        self._floor = 1.0

    def update(self, gradient: Tensor) -> None:
        """Take in a gradient ``[d]``."""
        squares = self._squares.update(gradient.clamp(-_LARGEST, _LARGEST).square_())
        mean = squares.mean(dtype=torch.float64).item() * self._squares.correction
        # Gradients of zero have no scale; any positive one will do, as the step is zero too.
        self._floor = self.tau * mean**0.5 or 1.0

    def block(self, part: slice) -> Tensor:
        """D of a block, float64 and positive."""
        assert self._squares.value is not None
        return wide(self._squares.value[part]).mul_(self._squares.correction).sqrt_().add_(self._floor)

    def length(self, vector: Tensor) -> float:
        """√(xᵀDx) of a vector ``[d]``."""
        parts = blocks(len(vector))
        return math.sqrt(
            sum((wide(vector[part]).square_() * self.block(part)).sum().item() for part in parts)
        )

    def state_dict(self) -> dict[str, Any]:
        """The mean of squares and the floor."""
        return {"squares": self._squares.state_dict(), "floor": self._floor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._squares.load_state_dict(state["squares"])
        self._floor = float(state["floor"])
