"""One server step a round on a flat vector: FAGH as published, SOFIM, and momentum FedSGD, the control of both.

An update object asks for what it wants of the clients (``request``), takes in what they found, and returns the change
of the parameters. It needs torch only, so any federation, or a plain script, can drive it, as :class:`.rank_k.Fagh`::

    update = Fagh()
    for _ in range(rounds):
        direction = update.request()
        gradient, row = …                    # means over the clients at w; row = H @ direction, or None
        w += update.step(gradient, row, direction, loss)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from fedllm.strategies.second_order.damping import Losses
from fedllm.strategies.second_order.moments import Moment
from fedllm.strategies.second_order.rank_one import rank_one_direction
from fedllm.strategies.second_order.sofim import gradient_direction, momentum_direction
from fedllm.strategies.second_order.stability import StabilityWatch
from fedllm.strategies.second_order.vectors import norm
from torch import Tensor

FIRST_COORDINATE = 0


class FedSgdMomentum:
    """w ← w − η m̂ with the bias-corrected mean m̂ of gradients: FAGH without curvature, at learning rate η/ρ.

    Args:
        eta: learning rate.
        beta1: decay of the mean, 0 ≤ β₁ < 1.

    Raises:
        ValueError: η is not positive, or β₁ lies outside [0, 1).
    """

    def __init__(self, *, eta: float, beta1: float = 0.9) -> None:
        self.eta = positive("eta", eta)
        self._momentum = Moment(beta1)
        self._watch = StabilityWatch(eta, beta1, "eta", "lower it")
        self.diagnostics: dict[str, float] = {}

    def step(self, gradient: Tensor, losses: Losses | float | None = None) -> Tensor:
        """The change of the parameters ``[d]``; the losses are watched for instability only."""
        self._momentum.update(gradient)
        step = self._momentum.corrected()
        self.diagnostics = {"momentum-norm": norm(step)}
        step.mul_(-self.eta)
        if losses := by_client(losses):
            self._watch.observe(losses)
            self._watch.stepped(losses, gradient, step)
        return step

    def state_dict(self) -> dict[str, Any]:
        """The momentum, and what is watched."""
        return {"momentum": self._momentum.state_dict(), "watch": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])
        self._watch.load_state_dict(state["watch"])


class Sofim:
    """w ← w − η (M̂ M̂ᵀ + ρI)⁻¹ x with x the momentum or the gradient (arXiv 2403.02833).

    Args:
        eta: η > 0; while ‖M̂‖² ≪ ρ the learning rate is η/ρ, and no step is longer than η/(2√ρ) for x = M̂.
        rho: ρ > 0.
        beta1: decay of M, 0 ≤ β₁ < 1.
        direction: x. ``momentum`` is what the authors' DP-FedSOFIM code does; ``gradient`` with the uncorrected M is
            the other reading of the sources.

    Raises:
        ValueError: η or ρ is not positive, or β₁ lies outside [0, 1).
    """

    def __init__(
        self,
        *,
        eta: float = 0.5,
        rho: float = 0.5,
        beta1: float = 0.9,
        direction: Literal["momentum", "gradient"] = "momentum",
    ) -> None:
        self.eta, self.rho = positive("eta", eta), positive("rho", rho)
        self.direction = direction
        self._momentum = Moment(beta1)
        self._watch = (
            StabilityWatch(eta / rho, beta1, "eta/(rho + |M|^2)")
            if direction == "momentum"
            else StabilityWatch(eta / rho, 0.0)
        )
        self.diagnostics: dict[str, float] = {}

    def step(self, gradient: Tensor, losses: Losses | float | None = None) -> Tensor:
        """The change of the parameters ``[d]``; the losses are watched for instability only."""
        value = self._momentum.update(gradient)
        rate = self.eta / self.rho
        if self.direction == "momentum":
            step = self._momentum.corrected()
            length = norm(step)
            rate = self.eta / (self.rho + length * length)
            momentum_direction(step, self.rho, out=step).mul_(-self.eta)
        else:
            length = norm(value)
            step = gradient_direction(gradient.to(value), value, self.rho).mul_(-self.eta)
        self.diagnostics = {"momentum-norm": length}
        if losses := by_client(losses):
            self._watch.observe(losses)
            self._watch.stepped(losses, gradient, step, rate)
        return step

    def state_dict(self) -> dict[str, Any]:
        """The momentum, and what is watched."""
        return {"momentum": self._momentum.state_dict(), "watch": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])
        self._watch.load_state_dict(state["watch"])


class FaghPaper:
    """FAGH as published (arXiv 2403.11041), made safe: w ← w − η (|v̂ v̂ᵀ/v̂₀| + ρI)⁻¹ m̂ with v the first Hessian row.

    Args:
        eta: η > 0; on all but one direction this is momentum FedSGD at learning rate η/ρ.
        rho: ρ > 0.
        beta1: decay of the gradients' mean, 0 ≤ β₁ < 1.
        beta2: decay of the rows' mean, 0 ≤ β₂ < 1.

    Raises:
        ValueError: η or ρ is not positive, or a β lies outside [0, 1).
    """

    def __init__(self, *, eta: float = 0.1, rho: float = 1.0, beta1: float = 0.9, beta2: float = 0.9) -> None:
        self.eta, self.rho = positive("eta", eta), positive("rho", rho)
        self._momentum, self._row = Moment(beta1), Moment(beta2)
        self._watch = StabilityWatch(eta / rho, beta1)
        self.diagnostics: dict[str, float] = {}

    def request(self) -> int:
        """The coordinate whose Hessian row is wanted: the first one."""
        return FIRST_COORDINATE

    def step(
        self,
        gradient: Tensor,
        row: Tensor | None = None,
        direction: Tensor | int | None = FIRST_COORDINATE,
        losses: Losses | float | None = None,
    ) -> Tensor:
        """The change of the parameters ``[d]``; see :meth:`.rank_k.Fagh.step`.

        The losses are watched for instability only.
        """
        momentum = self._momentum.update(gradient)
        if row is not None:
            self._row.update(row)
        step = self._solve(momentum)
        losses = by_client(losses)
        if losses:
            self._watch.observe(losses)
            self._watch.stepped(losses, gradient, step)
        return step

    def _solve(self, momentum: Tensor) -> Tensor:
        value = self._row.value
        if value is None:
            self.diagnostics = {"rho": self.rho}
            return self._momentum.corrected().mul_(-self.eta / self.rho)
        # With v̂ = c v the curvature is c v vᵀ/v₀: dividing the pivot by c spares a corrected copy of v.
        pivot = float(value[FIRST_COORDINATE]) / self._row.correction
        factor = -self.eta * self._momentum.correction
        found = rank_one_direction(momentum, value, pivot, self.rho, factor=factor)
        self.diagnostics = {"rho": self.rho, "pivot": float(value[FIRST_COORDINATE]) * self._row.correction}
        if math.isfinite(found.eigenvalue):
            self.diagnostics["eigenvalue"] = found.eigenvalue
        return found.vector

    def state_dict(self) -> dict[str, Any]:
        """Both means, and what is watched."""
        return {
            "momentum": self._momentum.state_dict(),
            "row": self._row.state_dict(),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])
        self._row.load_state_dict(state["row"])
        self._watch.load_state_dict(state["watch"])


def positive(name: str, value: float) -> float:
    """The value, if it is positive.

    Raises:
        ValueError: it is not.
    """
    if not value > 0:
        raise ValueError(f"{name} is {value:g}, expected a positive number")
    return value


def by_client(losses: Losses | float | None) -> dict[str, tuple[float, float]]:
    """Losses by client; a single number is that of one nameless client."""
    return {"": (1.0, float(losses))} if isinstance(losses, float | int) else dict(losses or {})
