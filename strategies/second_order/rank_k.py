"""Rank-k FAGH (ours): one server step a round from gradients and the last Hessian–vector products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from fedllm.strategies.second_order.damping import AdaptiveDamping, Losses, paired_means
from fedllm.strategies.second_order.limited_memory import CurvatureMemory
from fedllm.strategies.second_order.metric import SecondMoment
from fedllm.strategies.second_order.moments import Moment
from fedllm.strategies.second_order.stability import StabilityWatch
from fedllm.strategies.second_order.updates import by_client, positive
from fedllm.strategies.second_order.vectors import dots, norm, working_dtype
from torch import Tensor


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
        self.taken_back = ""
        self.diagnostics: dict[str, float] = {}

    @property
    def rho(self) -> float:
        """The damping now."""
        return self._damping.rho

    @property
    def can_take_back(self) -> bool:
        """Whether there is a step that the next losses may undo."""
        return self.adaptive and self._step is not None and self._gradient is not None

    @property
    def failures(self) -> int:
        """Steps in a row that were taken back."""
        return self._damping.failures

    @property
    def last_step(self) -> Tensor:
        """The step that was taken last ``[d]``, from where it began; not to be written to."""
        assert self._step is not None
        return self._step

    def request(self) -> Tensor | None:
        """The unit direction ``[d]`` whose Hessian product is wanted; None: only the gradient is."""
        if self._memory is None or self._step is None:
            return None
        krylov = self._memory.newest_product(self._metric)
        return self._memory.orthogonal(self._step if krylov is None else krylov)

    def step(
        self,
        gradient: Tensor | None,
        row: Tensor | None = None,
        direction: Tensor | int | None = None,
        losses: Losses | float | None = None,
    ) -> Tensor:
        """One server step.

        If the last step is taken back, :attr:`taken_back` says why, and the change that is returned undoes it. After a
        step so long that the parameters were lost beside it, only ``last_step`` from where it began is exact.

        Args:
            gradient: mean gradient ``[d]`` at the current parameters; None: nobody's loss is finite there.
            row: mean of the Hessians times ``direction``, ``[d]``; None: unknown.
            direction: what was asked for, as the clients got it; a number j stands for e_j.
            losses: mean loss at the current parameters: a number, or weight and loss by client; may be infinite.

        Returns:
            The change of the parameters ``[d]``; not to be written to.

        Raises:
            ValueError: there is no gradient, and no step to take back.
        """
        losses = by_client(losses)
        finite = {name: pair for name, pair in losses.items() if math.isfinite(pair[1])}
        if self._memory is not None:
            self._memory.grow_old()
        if gradient is not None and len(finite) == len(losses):
            self._add_secant(gradient, losses)
        self.taken_back = self._why_taken_back(gradient, losses)
        if self.taken_back:
            return self._second_try()
        if gradient is None:
            raise ValueError("there is no gradient, and no step to take back")
        self._momentum.update(gradient)
        if self._metric is not None:
            self._metric.update(gradient)
        if self._memory is not None and row is not None and direction is not None:
            self._memory.add(_dense(direction, row), row)
        self._losses = finite
        needed = finite and (self.adaptive or self.secants)
        self._gradient = gradient.to(working_dtype(gradient.dtype), copy=True) if needed else None
        self._step = self._solve()
        if losses and not self.adaptive:
            self._watch.observe(losses)
            length = None if self._metric is None else self._metric.length(self._step)
            self._watch.stepped(losses, gradient, self._step, length=length)
        return self._step

    def _add_secant(self, gradient: Tensor, losses: Losses) -> None:
        """Learn the curvature along the last step, if the same clients with the same weights tell both gradients."""
        if not self.secants or self._memory is None or self._step is None or self._gradient is None:
            return
        if _weights(losses) == _weights(self._losses) and bool(torch.isfinite(gradient).all()):
            length = norm(self._step)
            if length > 0:  # of unit length, like the directions that are asked for
                self._memory.add(self._step / length, (gradient - self._gradient).div_(length))

    def _why_taken_back(self, gradient: Tensor | None, losses: Losses) -> str:
        """How the last step made the loss rise too much; empty if it did not. Adapts the damping on the way."""
        if not self.can_take_back:
            return ""
        means = paired_means(self._losses, losses)
        if gradient is None:
            means = (math.nan if means is None else means[0], math.inf)
        if means is None or self._damping.judge(*means, self._predicted) == "accept":
            return ""
        return f"the mean loss went from {means[0]:.4g} to {means[1]:.4g}"

    def _second_try(self) -> Tensor:
        """Undo the last step and take a shorter one from where it began."""
        assert self._step is not None
        undone = self._step
        self._step = self._solve()
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
        parts: dict[str, Any] = {"momentum": self._momentum, "damping": self._damping, "watch": self._watch}
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
            ("watch", self._watch),
            ("memory", self._memory),
            ("metric", self._metric),
        ):
            if part is not None:
                part.load_state_dict(state[name])
        self._step = None if "step" not in state else state["step"].clone()
        self._gradient = None if "gradient" not in state else state["gradient"].clone()
        self._predicted = float(state["predicted"])
        self._losses = {name: (pair[0], pair[1]) for name, pair in state["losses"].items()}


def _weights(losses: Losses) -> dict[str, float]:
    return {name: weight for name, (weight, _) in losses.items()}


def _dense(direction: Tensor | int, like: Tensor) -> Tensor:
    if isinstance(direction, Tensor):
        return direction
    unit = torch.zeros_like(like)
    unit[direction] = 1
    return unit
