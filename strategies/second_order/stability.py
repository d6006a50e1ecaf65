"""When a fixed step is too long for the curvature: what the losses tell of it, and a warning with the numbers."""

from __future__ import annotations

import logging

from fedllm.strategies.second_order.damping import Losses, paired_means
from fedllm.strategies.second_order.vectors import dots, norm
from torch import Tensor

logger = logging.getLogger(__name__)


class StabilityWatch:
    """Measures the curvature along each step from the losses before and after it, and warns once.

    Gradient descent with a mean of gradients of decay β is stable along a direction of curvature κ only for a learning
    rate below 2 (1 + β) / ((1 − β) κ) (Polyak's heavy ball, in which the mean's factor 1 − β is the step's).

    Args:
        rate: learning rate η/ρ.
        beta: β.
    """

    def __init__(self, rate: float, beta: float) -> None:
        self.rate = rate
        self.bound = 2 * (1 + beta) / (1 - beta)
        self._warned = False
        self._before: dict[str, tuple[float, float]] = {}
        self._slope = self._squared_length = 0.0

    def observe(self, losses: Losses) -> None:
        """Compare the losses with those before the last step."""
        means = paired_means(self._before, losses)
        if means is None or self._squared_length == 0:
            return
        before, now = means
        curvature = 2 * (now - before - self._slope) / self._squared_length
        if now > before and self.rate * curvature > self.bound and not self._warned:
            self._warned = True
            logger.warning(
                "the learning rate eta/rho = %.3g is unstable: the loss rose from %.4g to %.4g and the curvature along "
                "the last step is about %.3g; with this momentum eta/rho must stay below %.3g: raise rho, or lower eta",
                self.rate, before, now, curvature, self.bound / curvature,
            )  # fmt: skip

    def stepped(self, losses: Losses, gradient: Tensor, step: Tensor) -> None:
        """Note the losses and the slope where a step is taken from."""
        self._before = dict(losses)
        self._slope = float(dots([gradient], step))
        self._squared_length = norm(step) ** 2
