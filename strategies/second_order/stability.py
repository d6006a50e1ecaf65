"""When a fixed step is too long for the curvature: what the losses tell of it, and a warning with the numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fedllm.strategies.second_order.damping import Losses, paired_means
from fedllm.strategies.second_order.vectors import dots, norm
from torch import Tensor

logger = logging.getLogger(__name__)


class StabilityWatch:
    """Measures the curvature along each step from the losses before and after it, and warns once.

    Gradient descent with a mean of gradients of decay β is stable along a direction of curvature κ only for a learning
    rate below 2 (1 + β) / ((1 − β) κ) (Polyak's heavy ball, in which the mean's factor 1 − β is the step's).

    Args:
        rate: learning rate η/ρ; a step may have its own.
        beta: β.
        name: what the learning rate is made of, in words.
        advice: what to do about it.
    """

    def __init__(
        self, rate: float, beta: float, name: str = "eta/rho", advice: str = "raise rho, or lower eta"
    ) -> None:
        self.rate = rate
        self.bound = 2 * (1 + beta) / (1 - beta)
        self._name, self._advice = name, advice
        self._warned = False
        self._before: dict[str, tuple[float, float]] = {}
        self._slope = self._squared_length = 0.0

    def observe(self, losses: Losses) -> None:
        """Compare the losses with those before the last step; those that are not finite tell no curvature."""
        means = paired_means(self._before, _finite(losses))
        if means is None or self._squared_length == 0:
            return
        before, now = means
        curvature = 2 * (now - before - self._slope) / self._squared_length
        if now > before and self.rate * curvature > self.bound and not self._warned:
            self._warned = True
            logger.warning(
                "the learning rate %s = %.3g is unstable: the loss rose from %.4g to %.4g and the curvature along the "
                "last step is about %.3g; with this momentum %s must stay below %.3g: %s",
                self._name, self.rate, before, now, curvature, self._name, self.bound / curvature, self._advice,
            )  # fmt: skip

    def stepped(
        self,
        losses: Losses,
        gradient: Tensor,
        step: Tensor,
        rate: float | None = None,
        length: float | None = None,
    ) -> None:
        """Note where a step is taken from.

        Args:
            losses: the losses there.
            gradient: the gradient there ``[d]``.
            step: ``[d]``.
            rate: its learning rate, if it has its own.
            length: its length in the metric in which it is steepest; Euclidean if not given.
        """
        self.rate = self.rate if rate is None else rate
        self._before = _finite(losses)
        self._slope = float(dots([gradient], step))
        length = norm(step) if length is None else length
        self._squared_length = length * length

    def state_dict(self) -> dict[str, Any]:
        """What the next comparison needs, and whether there has been a warning."""
        return {
            "warned": self._warned,
            "rate": self.rate,
            "before": {name: list(pair) for name, pair in self._before.items()},
            "slope": self._slope,
            "squared-length": self._squared_length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._warned, self.rate = bool(state["warned"]), float(state["rate"])
        self._before = {name: (pair[0], pair[1]) for name, pair in state["before"].items()}
        self._slope, self._squared_length = float(state["slope"]), float(state["squared-length"])


def _finite(losses: Losses) -> dict[str, tuple[float, float]]:
    return {name: pair for name, pair in losses.items() if math.isfinite(pair[1])}
