"""Damping from the cohort's loss: what a step promised against what it did (after Levenberg and Marquardt; ours here).

Every reply carries the client's loss at the model that it was sent. So a round tells what the step before it was
worth: without a further message, one round late. Clients are compared with themselves only: those that answered in
both rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Losses = Mapping[str, tuple[float, float]]
"""Weight and mean loss of each client, by name."""
Verdict = Literal["unknown", "accept", "reject"]


def paired_means(before: Losses, now: Losses) -> tuple[float, float] | None:
    """Weighted mean losses before and now of the clients in both; None if there are none."""
    common = sorted(before.keys() & now.keys())
    total = sum(now[name][0] for name in common)
    if total <= 0:
        return None
    return (
        sum(now[name][0] * before[name][1] for name in common) / total,
        sum(now[name][0] * now[name][1] for name in common) / total,
    )


@dataclass
class AdaptiveDamping:
    """ρ that falls while steps keep their promise and rises when they do not.

    Args:
        rho: ρ to begin with, positive.
        shrink: ρ is divided by this when the loss fell by more than ``good`` of what was predicted.
        grow: ρ is multiplied by this when it fell by less than ``poor`` of it.
        good: see ``shrink``.
        poor: see ``grow``.
        tolerance: a rise of the loss by more than this share of it takes the step back.
        setback: ρ is multiplied by this when a step is taken back, by its square when the second try is taken back too,
            and so on (after Nielsen, 1999).
        rounding: ρ stays when neither what was predicted nor what came of it is more than this share of the loss.
            Losses are float32, in which a unit of the last place is 1.2e-7, and a forward pass loses a few of these;
            at a minimum, where changes are nothing else, ρ would grow without end.
    """

    rho: float
    shrink: float = 1.2
    grow: float = 1.5
    good: float = 0.75
    poor: float = 0.25
    tolerance: float = 0.5
    setback: float = 2.0
    rounding: float = 1e-6
    failures: int = 0

    def judge(self, before: float, now: float, predicted: float) -> Verdict:
        """Adapt ρ to what the last step did to the loss; whether the step stands.

        Args:
            before: mean loss where the step was taken from.
            now: mean loss of the same clients where it led.
            predicted: decrease that the curvature model promised.
        """
        if not math.isfinite(now) or now > before + self.tolerance * abs(before):
            self.failures += 1
            self.rho *= self.setback**self.failures
            return "reject"
        self.failures = 0
        if max(abs(before - now), abs(predicted)) <= self.rounding * abs(before):
            return "accept"
        ratio = (before - now) / predicted if predicted > 0 else -math.inf
        if ratio > self.good:
            self.rho /= self.shrink
        elif ratio < self.poor:
            self.rho *= self.grow
        return "accept"

    def state_dict(self) -> dict[str, Any]:
        """The damping, and how many tries in a row have failed."""
        return {"rho": self.rho, "failures": self.failures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.rho, self.failures = float(state["rho"]), int(state["failures"])
