"""What colluding attackers send who see all honest updates: pure functions ``honest [m, d] → [d]``.

All but :func:`mimic` follow the same idea: stay inside the spread of the honest updates and still pull their mean away.
Every colluder sends the same vector unless a function says otherwise. Ordinary names: z and γ are the attack's
strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["unit", "std", "sign"]
_STEPS = 40


def inner_product_manipulation(honest: Tensor, scale: float = 0.5) -> Tensor:
    """−``scale`` times the honest mean (IPM; Xie, Koyejo and Gupta, UAI 2019, arXiv 1903.03936)."""
    return honest.mean(0) * -scale


def little_is_enough(honest: Tensor, z: float = 1.5) -> Tensor:
    """Honest mean − z · coordinate-wise standard deviation (ALIE; Baruch et al., NeurIPS 2019, arXiv 1902.06156).

    Args:
        honest: ``[m, d]``; with a single row the deviation is 0.
        z: strength; :func:`little_is_enough_z` gives the paper's, :func:`tuned_little_is_enough` the strongest.
    """
    return honest.mean(0) - z * _deviation(honest)


def _deviation(honest: Tensor) -> Tensor:
    return honest.std(0) if len(honest) > 1 else torch.zeros_like(honest[0])


def little_is_enough_z(clients: int, attackers: int) -> float:
    """The paper's z: as far out as the last honest client that the colluders need for a majority.

    With a majority of attackers there is nobody to win over, and the formula has no answer; 0 is returned then.
    """
    supporters = clients // 2 + 1 - attackers
    share = (clients - attackers - supporters) / (clients - attackers)
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


def tuned_little_is_enough(honest: Tensor, attackers: int, aggregate: Callable[[Tensor], Tensor]) -> Tensor:
    """ALIE with the z that moves a given rule's result furthest from the honest mean, by line search over ±z.

    The tuning is that of Shejwalkar and Houmansadr (NDSS 2021); byzfl calls it Optimal ALIE.

    Args:
        honest: ``[m, d]``.
        attackers: how many copies the rule sees.
        aggregate: the rule that is attacked, ``[n, d] → [d]``.
    """
    mean, deviation = honest.mean(0), _deviation(honest)
    best, worst = mean, -1.0
    for z in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0):
        for signed in (z, -z):
            candidate = mean - signed * deviation
            moved = aggregate(torch.cat([honest, candidate.expand(attackers, -1)]))
            distance = float((moved - mean).norm())
            if distance > worst:
                best, worst = candidate, distance
    return best


def perturbation(honest: Tensor, direction: Direction) -> Tensor:
    """The direction in which Min-Max and Min-Sum push: −unit mean, −std, or −sign of the mean; each of norm 1."""
    mean = honest.mean(0)
    if direction == "std" and len(honest) > 1:
        vector = -honest.std(0)
    elif direction == "sign":
        vector = -mean.sign()
    else:
        vector = -mean
    unit: Tensor = vector / vector.norm().clamp_min(1e-12)
    return unit


def min_max(honest: Tensor, direction: Direction = "unit") -> Tensor:
    """Honest mean + γ·p with the largest γ that keeps within the largest distance between two honest updates.

    Shejwalkar and Houmansadr, NDSS 2021, eq. 8. Distances to all honest updates are convex in γ, so bisection is exact.
    """
    limit = _squared_distances(honest).max()
    return _furthest(honest, direction, lambda x: bool(((honest - x) ** 2).sum(1).max() <= limit))


def min_sum(honest: Tensor, direction: Direction = "unit") -> Tensor:
    """Honest mean + γ·p with the largest γ whose summed squared distances stay within those of an honest update.

    Shejwalkar and Houmansadr, NDSS 2021, eq. 9.
    """
    limit = _squared_distances(honest).sum(1).max()
    return _furthest(honest, direction, lambda x: bool(((honest - x) ** 2).sum() <= limit))


def mimic(honest: Tensor, victim: int = 0) -> Tensor:
    """The update of one honest client, which then counts many times (Karimireddy et al., ICLR 2022, 2006.09365)."""
    return honest[victim % len(honest)].clone()


def _furthest(honest: Tensor, direction: Direction, allowed: Callable[[Tensor], bool]) -> Tensor:
    mean, push = honest.mean(0), perturbation(honest, direction)
    low, high = 0.0, 2 * math.sqrt(float(_squared_distances(honest).sum(1).max())) + 1e-12
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if allowed(mean + middle * push):
            low = middle
        else:
            high = middle
    return mean + low * push


def _squared_distances(honest: Tensor) -> Tensor:
    """``[m, m]``; centred first, so that updates close to each other lose no digits."""
    centred = (honest - honest.mean(0)).double()
    gram = centred @ centred.T
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min_(0)


def adaptive(honest: Tensor, own: Tensor, judged: Callable[[Tensor], Tensor], share: float = 0.9) -> Tensor:
    """Colluders that know the defence: own honest updates, pushed against the mean as far as pays (ours).

    Every colluder keeps the noise and the habits of its own data, so it looks like itself; all add γ·p with
    p = −unit mean, and γ is that of a grid which moves the aggregate furthest along p, of those at which the defence
    still accepts ``share`` of them.

    Args:
        honest: updates of the others, ``[m, d]``.
        own: what the colluders would send if they were honest, ``[f, d]``.
        judged: asks a copy of the defence what becomes of theirs ``[f, d]`` and of the honest ones: factors
            ``[f + m]`` of the updates in the mean of those whose factor is not 0.
        share: of the colluders that must get through.

    Returns:
        ``[f, d]``; ``own`` unchanged if nothing else gets through.
    """
    direction = perturbation(torch.cat([honest, own]), "unit")
    push = direction * own.norm(dim=1).median()
    best, furthest = own, -math.inf
    for gamma in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0):
        candidate = own + gamma * push
        factors = judged(candidate)
        if float((factors[: len(own)] > 0).float().mean()) < share:
            continue
        along = torch.cat([candidate, honest]) @ direction
        reached = float(factors @ along / (factors > 0).sum())
        if reached > furthest:
            best, furthest = candidate, reached
    return best
