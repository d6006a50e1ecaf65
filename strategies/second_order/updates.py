"""One server step a round on a flat vector: FAGH, SOFIM, and momentum FedSGD, which both are measured against.

An update object asks for what it wants of the clients (:meth:`Fagh.request`), takes in what they found, and returns the
change of the parameters. It needs torch only, so any federation, or a plain script, can drive it::

    update = Fagh()
    for _ in range(rounds):
        direction = update.request()
        gradient, row = …                    # means over the clients at w; row = H @ direction, or None
        w += update.step(gradient, row, direction, loss)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from fedllm.strategies.second_order.damping import AdaptiveDamping, Losses, paired_means
from fedllm.strategies.second_order.limited_memory import CurvatureMemory
from fedllm.strategies.second_order.metric import SecondMoment
from fedllm.strategies.second_order.moments import Moment
from fedllm.strategies.second_order.rank_one import rank_one_direction
from fedllm.strategies.second_order.sofim import gradient_direction, momentum_direction
from fedllm.strategies.second_order.stability import StabilityWatch
from fedllm.strategies.second_order.vectors import dots, norm, working_dtype
from torch import Tensor

logger = logging.getLogger(__name__)

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

    def step(self, gradient: Tensor) -> Tensor:
        """The change of the parameters ``[d]``."""
        self._momentum.update(gradient)
        return self._momentum.corrected().mul_(-self.eta)

    def state_dict(self) -> dict[str, Any]:
        """The momentum."""
        return {"momentum": self._momentum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])


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
        self.diagnostics: dict[str, float] = {}

    def step(self, gradient: Tensor) -> Tensor:
        """The change of the parameters ``[d]``."""
        value = self._momentum.update(gradient)
        if self.direction == "momentum":
            mean = self._momentum.corrected()
            self.diagnostics = {"momentum-norm": norm(mean)}
            return momentum_direction(mean, self.rho, out=mean).mul_(-self.eta)
        self.diagnostics = {"momentum-norm": norm(value)}
        return gradient_direction(gradient.to(value), value, self.rho).mul_(-self.eta)

    def state_dict(self) -> dict[str, Any]:
        """The momentum."""
        return {"momentum": self._momentum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])


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
        """The change of the parameters ``[d]``; see :meth:`Fagh.step`. The losses are watched for instability only."""
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
        """Both means."""
        return {"momentum": self._momentum.state_dict(), "row": self._row.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._momentum.load_state_dict(state["momentum"])
        self._row.load_state_dict(state["row"])


class Fagh:
    """Rank-k FAGH (ours): w ← w − η (|H_a| + ρD)⁻¹ m̂ with k Hessian–vector products for H_a.

    Curvature comes from two sources. Every round asks for the product with one direction, the last product itself in
    the metric, orthogonalised against what is in memory: a Krylov sequence, which finds the steepest directions first.
    And when the same clients answer twice in a row, the last step and the change of the mean gradient are a pair too,
    as in quasi-Newton methods (Dennis & Moré, 1977); it costs no message.

    Args:
        eta: η > 0; η/ρ is the learning rate outside of the directions in memory, see docs/second_order.md.
        rho: ρ > 0; where it begins with adaptive damping.
        beta1: decay of the gradients' mean, 0 ≤ β₁ < 1.
        beta2: decay of the mean of products whose direction is asked for again, 0 ≤ β₂ < 1.
        memory: k, the products that are kept; 0: none are asked for (the control: no curvature).
        secants: whether steps and changes of the gradient count among the products; not with ``memory`` 0.
        metric: D is the identity, or the gradients' second moment (:class:`.metric.SecondMoment`).
        beta_metric: decay of the second moment, 0 ≤ β < 1.
        tau: floor of the second moment in units of the root mean square gradient.
        damping: ρ is fixed, or follows the cohort's loss (:class:`.damping.AdaptiveDamping`).

    Raises:
        ValueError: η, ρ or τ is not positive, k is negative, or a β lies outside [0, 1).
    """

    def __init__(
        self,
        *,
        eta: float = 1.0,
        rho: float = 50.0,
        beta1: float = 0.7,
        beta2: float = 0.9,
        memory: int = 20,
        secants: bool = True,
        metric: Literal["identity", "second-moment"] = "second-moment",
        beta_metric: float = 0.99,
        tau: float = 0.1,
        damping: Literal["adaptive", "fixed"] = "adaptive",
    ) -> None:
        if memory < 0:
            raise ValueError(f"memory is {memory}, expected at least 0")
        self.eta = positive("eta", eta)
        self.adaptive = damping == "adaptive"
        self.secants = secants and memory > 0
        self._damping = AdaptiveDamping(positive("rho", rho))
        self._momentum = Moment(beta1)
        self._watch = StabilityWatch(eta / rho, beta1)
        self._memory = CurvatureMemory(memory, beta=beta2) if memory else None
        self._metric = SecondMoment(beta_metric, tau) if metric == "second-moment" else None
        self._step: Tensor | None = None
        self._predicted = 0.0
        self._losses: dict[str, tuple[float, float]] = {}
        self._gradient: Tensor | None = None
        self.diagnostics: dict[str, float] = {}

    @property
    def rho(self) -> float:
        """The damping now."""
        return self._damping.rho

    def request(self) -> Tensor | None:
        """The unit direction ``[d]`` whose Hessian product is wanted; None: only the gradient is."""
        if self._memory is None or self._step is None:
            return None
        krylov = self._memory.newest_product(self._metric)
        return self._memory.orthogonal(self._step if krylov is None else krylov)

    def step(
        self,
        gradient: Tensor,
        row: Tensor | None = None,
        direction: Tensor | int | None = None,
        losses: Losses | float | None = None,
    ) -> Tensor:
        """One server step.

        Args:
            gradient: mean gradient ``[d]`` at the current parameters.
            row: mean of the Hessians times ``direction``, ``[d]``; None: unknown.
            direction: what was asked for, as the clients got it; a number j stands for e_j.
            losses: mean loss at the current parameters: a number, or weight and loss by client.

        Returns:
            The change of the parameters ``[d]``.
        """
        losses = by_client(losses)
        if self._memory is not None:
            self._memory.grow_old()
        self._add_secant(gradient, losses)
        if self._takes_back(losses):
            return self._second_try()
        self._momentum.update(gradient)
        if self._metric is not None:
            self._metric.update(gradient)
        if self._memory is not None and row is not None and direction is not None:
            self._memory.add(_dense(direction, row), row)
        self._losses = losses
        needed = losses and (self.adaptive or self.secants)
        self._gradient = gradient.to(working_dtype(gradient.dtype), copy=True) if needed else None
        self._step = self._solve()
        if losses and not self.adaptive:
            self._watch.observe(losses)
            self._watch.stepped(losses, gradient, self._step)
        return self._step.clone()

    def _add_secant(self, gradient: Tensor, losses: Losses) -> None:
        """Learn the curvature along the last step, if the same clients with the same weights tell both gradients."""
        if not self.secants or self._memory is None or self._step is None or self._gradient is None:
            return
        if _weights(losses) == _weights(self._losses) and bool(torch.isfinite(gradient).all()):
            length = norm(self._step)
            if length > 0:  # of unit length, like the directions that are asked for
                self._memory.add(self._step / length, (gradient - self._gradient) / length)

    def _takes_back(self, losses: Losses) -> bool:
        """Whether the last step made the loss rise too much; adapts the damping on the way."""
        if not self.adaptive or self._step is None or self._gradient is None:
            return False
        means = paired_means(self._losses, losses)
        return means is not None and self._damping.judge(*means, self._predicted) == "reject"

    def _second_try(self) -> Tensor:
        """Undo the last step and take a shorter one from where it began."""
        assert self._step is not None
        undone = self._step
        self._step = self._solve()
        logger.info("the last step raised the loss and is taken back; rho is now %.3g", self.rho)
        return self._step - undone

    def _solve(self) -> Tensor:
        """The step from the means that are held."""
        mean = self._momentum.corrected()
        memory = CurvatureMemory(1) if self._memory is None else self._memory
        found = memory.direction(mean, self.rho, self._metric)
        step = found.vector.mul_(-self.eta)
        if self.adaptive and self._gradient is not None:
            slope = float(dots([self._gradient], step))
            self._predicted = -slope - self.eta**2 * found.curvature / 2
        self.diagnostics = {"rho": self.rho, "pairs": float(len(memory))}
        if len(found.eigenvalues):
            self.diagnostics |= {
                "eigenvalue": float(found.eigenvalues[-1]),
                "least-eigenvalue": float(found.eigenvalues[0]),
            }
        return step

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        parts: dict[str, Any] = {"momentum": self._momentum, "damping": self._damping}
        optional = {"memory": self._memory, "metric": self._metric}
        parts |= {name: part for name, part in optional.items() if part is not None}
        vectors = {"step": self._step, "gradient": self._gradient}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            **{name: vector for name, vector in vectors.items() if vector is not None},
            "predicted": self._predicted,
            "losses": {name: list(pair) for name, pair in self._losses.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for name, part in (
            ("momentum", self._momentum),
            ("damping", self._damping),
            ("memory", self._memory),
            ("metric", self._metric),
        ):
            if part is not None:
                part.load_state_dict(state[name])
        self._step = None if "step" not in state else state["step"].clone()
        self._gradient = None if "gradient" not in state else state["gradient"].clone()
        self._predicted = float(state["predicted"])
        self._losses = {name: (pair[0], pair[1]) for name, pair in state["losses"].items()}


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


def _weights(losses: Losses) -> dict[str, float]:
    return {name: weight for name, (weight, _) in losses.items()}


def _dense(direction: Tensor | int, like: Tensor) -> Tensor:
    if isinstance(direction, Tensor):
        return direction
    unit = torch.zeros_like(like)
    unit[direction] = 1
    return unit
