"""Importance over rounds: history and the current round, mixed by how far training is and how much it jumps.

Ī_t = γ_t Ī_{t−1} + (1 − γ_t) Ĩ_t (HSplitLoRA, arXiv 2505.02795). Of γ_t = 1 − exp(…) the argument could not be read:
late and steady trusts the history, early or jumping the present; the form here is our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LARGEST = 0.99
_TINY = 1e-12


def mixing(server_round: int, current: float, history: float, settling: float, caution: float) -> float:
    """γ_t = 1 − exp(−(t / settling) / (1 + caution · v)), v = |Ĩ_t − Ī_{t−1}| / Ī_{t−1}; at most 0.99.

    Args:
        server_round: t, from 1.
        current: Ĩ_t.
        history: Ī_{t−1}.
        settling: rounds after which the history counts for 63 % where nothing jumps.
        caution: how much a jump counts.
    """
    jump = abs(current - history) / (history + _TINY)
    return min(1.0 - math.exp(-(server_round / settling) / (1.0 + caution * jump)), _LARGEST)


class ImportanceHistory:
    """Smoothed scores by weight.

    Args:
        settling: see :func:`mixing`.
        caution: see :func:`mixing`.
    """

    def __init__(self, settling: float, caution: float = 1.0) -> None:
        self._settling, self._caution = settling, caution
        self.scores: dict[str, float] = {}

    def update(self, server_round: int, current: Mapping[str, float]) -> None:
        """Mix in a round's scores; a weight without one keeps what it has.

        Only proportions count: a round's scores are brought to a sum of 1 over the weights that it tells of, or, once
        there is a history, to the sum that these have there.
        """
        total = math.fsum(current.values())
        if not total > 0:
            return
        known = math.fsum(self.scores[name] for name in current if name in self.scores)
        scale = (known or 1.0) / total
        for name, score in current.items():
            now = score * scale
            before = self.scores.get(name)
            if before is None:
                self.scores[name] = now
            else:
                share = mixing(server_round, now, before, self._settling, self._caution)
                self.scores[name] = share * before + (1 - share) * now

    def state_dict(self) -> dict[str, Any]:
        """The scores."""
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.scores = dict(state["scores"])


def pooled(reports: Mapping[str, tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Mean of several parties' scores, weighted, each weight over those who hold it.

    Args:
        reports: weight of a party and its scores, by party.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for weight, scores in reports.values():
        for name, score in scores.items():
            sums[name] = sums.get(name, 0.0) + weight * score
            weights[name] = weights.get(name, 0.0) + weight
    return {name: total / weights[name] for name, total in sums.items()}


def largest_change(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Max |now − before| / before over the weights of both, each side brought to a sum of 1; infinite without any."""
    shared = before.keys() & now.keys()
    total_before, total_now = (math.fsum(side[name] for name in shared) for side in (before, now))
    if not shared or not total_before > 0 or not total_now > 0:
        return math.inf
    return max(
        abs(now[name] / total_now - before[name] / total_before) / (before[name] / total_before + _TINY)
        for name in shared
    )
