"""What becomes of the replies that VERT keeps: rules among them that are weights, decided on the sketches at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from fedllm.strategies.robust import rules
from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""Weights ``[n]`` of updates ``[n, q]``, their sum 1."""
_MIXED = 0.2
"""Share of the kept replies that mixing leaves out of each mixture: as many hostile ones may be among them."""


def _mixed(updates: Tensor) -> Tensor:
    return rules.mixed_geometric_median_weights(updates, int(_MIXED * len(updates)))


WEIGHTS: Mapping[str, Rule] = {
    "geometric-median": rules.geometric_median_weights,
    "mixed-geometric-median": _mixed,
}


def weigh_kept(factors: Tensor, sketches: Tensor, rule: Rule) -> Tensor:
    """Factors ``[n]`` by which the kept updates' mean becomes the rule's weighted sum of them.

    Args:
        factors: who is kept, and what is left of each update ``[n]``; 0: rejected.
        sketches: ``[n, q]``.
        rule: the rule.
    """
    kept = factors > 0
    weighed = torch.zeros_like(factors)
    if bool(kept.any()):
        weights = rule(factors[kept, None] * sketches[kept])
        weighed[kept] = factors[kept] * weights * int(kept.sum())
    return weighed
