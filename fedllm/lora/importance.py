"""Which weights are worth an adapter: sensitivity of the singular triplets of a LoRA update, smoothed over steps.

AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) scores the triplets of an adapter that is kept as P Λ Q. Here an
ordinary adapter B A is decomposed after every step, so that it can be trained as it is: our variant of what FedPipe's
summaries call a combination of singular values and sensitivity (arXiv 2404.06448).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedllm.errors import PlanError, ReplyError, TrainError
from fedllm.lora.factors import Factors, fold
from fedllm.lora.svd import product_svd


@dataclass(frozen=True)
class Importance:
    """Importance of candidate weights, as one node reports it or as the cohort's mean.

    Attributes:
        scores: by weight name; not negative, only their proportions matter.
        curves: by weight name, :func:`energy_curve` of the update; empty: the gain of a rank r is log(1 + r).
    """

    scores: Mapping[str, float]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def normalized(self, names: Sequence[str]) -> list[float]:
        """Scores in the order of ``names``, summing to 1.

        Raises:
            PlanError: a score is missing, not finite or negative, or all are zero.
        """
        for name in names:
            if fault := _score_fault(self.scores.get(name)):
                raise PlanError(f"importance of {name}: {fault}")
        total = math.fsum(self.scores[name] for name in names)
        if not total > 0:
            raise PlanError(
                f"the importance of all {len(names)} candidate weights is 0; at least one must count"
            )
        return [self.scores[name] / total for name in names]

    def gains(self, name: str, ranks: Sequence[int]) -> list[float]:
        """Share of a weight's value, 0 to 1, that each rank gives; concave and rising, 0 for rank 0.

        Args:
            name: the weight.
            ranks: the highest one gives 1 without a curve; a curve gives 1 from its own length on.

        Raises:
            PlanError: there are curves, but none of this weight.
        """
        if not self.curves:
            return [math.log1p(rank) / math.log1p(max(ranks)) for rank in ranks]
        curve = self.curves.get(name)
        if not curve:
            raise PlanError(f"importance of {name}: it has no energy curve, although other weights have one")
        return [float(curve[min(rank, len(curve)) - 1]) if rank else 0.0 for rank in ranks]


class AdapterStep(NamedTuple):
    """One adapter after a backward pass: the update ``scale · lora_B @ lora_A`` and the loss's gradients."""

    lora_A: Tensor
    """``[r, k]``."""
    lora_B: Tensor
    """``[d, r]``."""
    grad_A: Tensor
    """``[r, k]``."""
    grad_B: Tensor
    """``[d, r]``."""
    scale: float
    """α/r."""


class TripletSensitivity(NamedTuple):
    """|w · ∂L/∂w| of the entries of P diag(λ) Q, the update's singular value decomposition."""

    left: Tensor
    """``[d, r]``, of P."""
    values: Tensor
    """``[r]``, of λ."""
    right: Tensor
    """``[r, k]``, of Q."""


def triplet_sensitivity(step: AdapterStep) -> TripletSensitivity:
    """First-order effect on the loss of every entry of P, λ and Q, without the d×k gradient G of the update.

    From Λ Pᵀ = Q (ΔW)ᵀ and grad_A = scale · Bᵀ G follows Λ Pᵀ G = Q Aᵀ grad_A, and likewise G Qᵀ Λ = grad_B Bᵀ P: no
    inverse is needed, so that adapters of deficient rank are no special case. Directions whose singular value is zero
    have no effect; their entries are 0.

    Returns:
        Float64 tensors on the adapter's device, triplets by falling singular value.
    """
    factors = fold(step.lora_A, step.lora_B, step.scale)
    svd = product_svd(factors)
    a, b = factors.right, step.lora_B.detach().to(factors.left)
    to_right = svd.right @ a.T @ step.grad_A.to(a)
    to_left = step.grad_B.to(a) @ (b.T @ svd.left)
    missing = step.lora_A.shape[0] - svd.rank
    right = functional.pad((svd.right * to_right).abs(), (0, 0, 0, missing))
    left = functional.pad((svd.left * to_left).abs(), (0, missing))
    values = functional.pad((svd.right * to_right).sum(dim=1).abs(), (0, missing))
    return TripletSensitivity(left, values, right)


class ImportanceTracker:
    """Scores of a node's adapters over its warm-up steps.

    Sensitivity I and its uncertainty |I − Ī| are smoothed exponentially, entry by entry; an entry scores Ī · Ū, and a
    triplet its λ plus the means over its entries of P and Q (AdaLoRA). A weight scores the sum over its triplets, which
    are matched between steps by the order of their singular values (both ours).

    Args:
        beta_sensitivity: β₁.
        beta_uncertainty: β₂.

    Raises:
        ValueError: a factor outside [0, 1).
    """

    def __init__(self, beta_sensitivity: float = 0.85, beta_uncertainty: float = 0.85) -> None:
        for beta in (beta_sensitivity, beta_uncertainty):
            if not 0 <= beta < 1:
                raise ValueError(f"a smoothing factor is at least 0 and below 1, found {beta}")
        self._betas = beta_sensitivity, beta_uncertainty
        self._mean: dict[str, TripletSensitivity] = {}
        self._uncertainty: dict[str, TripletSensitivity] = {}

    def update(self, steps: Mapping[str, AdapterStep]) -> None:
        """Take in one training step, after its backward pass and before the optimiser's step.

        Args:
            steps: adapters by the name of their weight, the same in every step.
        """
        for name, step in steps.items():
            found = triplet_sensitivity(step)
            if name not in self._mean:
                zeros = TripletSensitivity(*(torch.zeros_like(entries) for entries in found))
                self._mean[name] = self._uncertainty[name] = zeros
            self._mean[name] = _smoothed(self._mean[name], found, self._betas[0])
            deviation = TripletSensitivity(
                *((new - mean).abs() for new, mean in zip(found, self._mean[name], strict=True))
            )
            self._uncertainty[name] = _smoothed(self._uncertainty[name], deviation, self._betas[1])

    def report(self, adapters: Mapping[str, Factors]) -> Importance:
        """The node's report: scores that sum to 1, and the energy curve of every update.

        Args:
            adapters: the adapters as they are now, folded, by the name of their weight.

        Raises:
            TrainError: no step so far has moved the loss: an adapter with B = 0 gets its first gradient on A in the
                second step, so at least two are needed.
        """
        raw = {name: self._score(name) for name in self._mean}
        total = math.fsum(raw.values())
        if not total > 0:
            raise TrainError(
                "no importance can be told: the adapters had no effect on the loss; take two warm-up steps or more"
            )
        curves = {name: energy_curve(product_svd(factors).values) for name, factors in adapters.items()}
        return Importance({name: score / total for name, score in raw.items()}, curves)

    def _score(self, name: str) -> float:
        entries = [m * u for m, u in zip(self._mean[name], self._uncertainty[name], strict=True)]
        left, values, right = entries
        return float((values + left.mean(dim=0) + right.mean(dim=1)).sum())


def energy_curve(values: Tensor) -> tuple[float, ...]:
    """Share of the squared Frobenius norm that the leading 1, 2, … singular values hold; (1,) of a zero update.

    Args:
        values: ``[r]``, singular values, largest first.
    """
    squares = values.detach().double().square()
    if not float(squares.sum()) > 0:
        return (1.0,)
    return tuple(float(share) for share in (squares.cumsum(0) / squares.sum()).clamp(max=1.0))


def check_report(node: str, report: Importance, names: Collection[str]) -> None:
    """Make sure that a node's report can enter the mean.

    Args:
        node: its name, for the message.
        report: what it sent.
        names: the candidate weights; every one must be there and no other.

    Raises:
        ReplyError: a score or curve is missing, unknown, NaN, infinite or out of bounds; node and weight are named.
    """
    for name in names:
        if fault := _score_fault(report.scores.get(name)):
            raise ReplyError(f"node {node}: importance of {name}: {fault}")
    for kind, found in (("score", report.scores), ("curve", report.curves)):
        if unknown := sorted(found.keys() - set(names)):
            raise ReplyError(f"node {node}: importance {kind} of {unknown[0]}, which is no candidate weight")
    if not math.fsum(report.scores.values()) > 0:
        raise ReplyError(f"node {node}: the importance of all {len(names)} weights is 0")
    if not report.curves:
        return
    for name in names:
        curve = report.curves.get(name, ())
        rising = all(low <= high for low, high in itertools.pairwise(curve))
        if not (curve and rising and curve[0] >= 0 and curve[-1] <= 1):  # NaN fails every comparison
            raise ReplyError(
                f"node {node}: energy curve of {name}: expected shares that rise from 0 to 1, found {list(curve)[:8]}"
            )


def combine(reports: Mapping[str, Importance], examples: Mapping[str, int]) -> Importance:
    """The cohort's importance Σ p_i s_i, with p_i node i's share of the examples and s_i its scores, summing to 1.

    An energy curve is averaged with the weights p_i s_i, so that score times gain is the mean of the nodes' score times
    gain. The result does not depend on the order of the nodes.

    Args:
        reports: by node, all checked by :func:`check_report` against the same weights, at least one; all or none with
            curves.
        examples: training examples by node.
    """
    nodes = sorted(reports)
    names = sorted(reports[nodes[0]].scores)
    shares = {node: examples[node] / sum(examples[node] for node in nodes) for node in nodes}
    local = {node: dict(zip(names, reports[node].normalized(names), strict=True)) for node in nodes}
    scores = {name: math.fsum(shares[node] * local[node][name] for node in nodes) for name in names}
    if not all(reports[node].curves for node in nodes):
        return Importance(scores)
    curves = {}
    for name in names:
        longest = max(len(reports[node].curves[name]) for node in nodes)
        padded = {node: [*reports[node].curves[name], *[1.0] * longest][:longest] for node in nodes}
        parts = {node: shares[node] * (local[node][name] if scores[name] > 0 else 1.0) for node in nodes}
        total = math.fsum(parts.values())
        curves[name] = tuple(
            min(1.0, math.fsum(parts[node] * padded[node][rank] for node in nodes) / total)
            for rank in range(longest)
        )
    return Importance(scores, curves)


def _smoothed(old: TripletSensitivity, new: TripletSensitivity, beta: float) -> TripletSensitivity:
    pairs = zip(old, new, strict=True)
    return TripletSensitivity(*(beta * before + (1 - beta) * now for before, now in pairs))


def _score_fault(score: object) -> str:
    """What is wrong with a score; empty when nothing is."""
    if score is None:
        return "it is missing"
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"expected a number, found {score!r}"
    return (
        "" if math.isfinite(score) and score >= 0 else f"expected a finite number of 0 or more, found {score}"
    )
