"""Exponential moving averages with bias correction, kept in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fedllm.strategies.second_order.vectors import working_dtype
from torch import Tensor


class Moment:
    """m ← β m + (1 − β) x, started at zero; the corrected moment is m / (1 − β^t) (Kingma & Ba, 2015, §3).

    Args:
        beta: decay, 0 ≤ β < 1.

    Attributes:
        value: m ``[d]``, float32 or float64; None before the first update.
        count: updates so far, t.

    Raises:
        ValueError: β lies outside [0, 1).
    """

    def __init__(self, beta: float) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta:g}, expected 0 ≤ beta < 1")
        self.beta = beta
        self.count = 0
        self.value: Tensor | None = None

    @property
    def correction(self) -> float:
        """The factor 1 / (1 − β^t) that removes the bias towards the zero start; t ≥ 1."""
        return 1.0 / (1.0 - self.beta**self.count)

    def update(self, x: Tensor) -> Tensor:
        """Take in one vector ``[d]``; returns the uncorrected moment, which stays owned by this object.

        Raises:
            ValueError: the vector's length differs from that of the moment.
        """
        if self.value is None:
            self.value = torch.zeros(len(x), dtype=working_dtype(x.dtype), device=x.device)
        if x.shape != self.value.shape:
            raise ValueError(f"the vector has {len(x)} entries, the moment {len(self.value)}")
        self.count += 1
        return self.value.lerp_(x.to(self.value.dtype), 1 - self.beta)

    def corrected(self) -> Tensor:
        """The corrected moment as a new vector; at least one update is needed."""
        assert self.value is not None
        return self.value * self.correction

    def state_dict(self) -> dict[str, Any]:
        """The moment and its count."""
        return {"count": self.count} | ({} if self.value is None else {"value": self.value})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.count = int(state["count"])
        value = state.get("value")
        self.value = None if value is None else value.clone()
