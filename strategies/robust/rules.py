"""Robust rules over the updates of one round: pure functions of a matrix ``[n, d]``, whole updates or sketches.

Rules that choose or weigh rows come as ``…_weights`` → ``[n]``, so that sketches can decide what becomes of the
updates; the others return the aggregate ``[d]``. f is the number of attackers that a rule allows for; where its
theory needs n > 2f and there are more, f is cut to the largest that the formula takes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def median(updates: Tensor) -> Tensor:
    """Coordinate-wise median, the mean of the middle two of an even number (Yin et al., ICML 2018)."""
    ordered, n = _sorted(updates), len(updates)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(updates: Tensor, f: int) -> Tensor:
    """Coordinate-wise mean without the f largest and the f smallest values (Yin et al., ICML 2018)."""
    f = min(f, (len(updates) - 1) // 2)
    return _sorted(updates)[f : len(updates) - f].mean(0)


def krum_scores(updates: Tensor, f: int) -> Tensor:
    """Krum scores ``[n]``: squared distances to the n − f − 2 nearest others (Blanchard et al., NeurIPS 2017)."""
    return _scores(squared_distances(updates), f)


def krum_weights(updates: Tensor, f: int) -> Tensor:
    """1 for the row of the smallest Krum score."""
    return _chosen(krum_scores(updates, f), 1)


def multi_krum_weights(updates: Tensor, f: int) -> Tensor:
    """1/m for the m = n − f rows of the smallest Krum scores."""
    return _chosen(krum_scores(updates, f), max(1, len(updates) - f))


def bulyan(updates: Tensor, f: int) -> Tensor:
    """Krum n − 2f times, then the mean of the β = n − 4f values nearest to the median (El Mhamdi et al., ICML 2018)."""
    n = len(updates)
    f = min(f, (n - 3) // 4) if n >= 3 else 0
    distances, left, chosen = squared_distances(updates), list(range(n)), list[int]()
    for _ in range(n - 2 * f):
        scores = _scores(distances[left][:, left], f) if len(left) > 1 else torch.zeros(1)
        chosen.append(left.pop(int(scores.argmin())))
    rows = updates[chosen]
    nearest = (rows - median(rows)).abs().topk(max(1, n - 4 * f), 0, largest=False).indices
    return rows.gather(0, nearest).mean(0)


def centred_clipping(updates: Tensor, centre: Tensor, radius: float, steps: int = 1) -> Tensor:
    """Centred clipping: v ← v + mean of (x − v) clipped to a radius (Karimireddy et al., ICML 2021).

    Args:
        updates: ``[n, d]``.
        centre: v ``[d]``, normally the aggregate of the round before.
        radius: τ.
        steps: how often.
    """
    for _ in range(steps):
        difference = updates - centre
        factors = (radius / difference.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)
        centre = centre + (factors[:, None] * difference).mean(0)
    return centre


def norm_bound_factors(norms: Tensor, bound: float) -> Tensor:
    """Factors ``[n]`` that scale norms down to a bound (Sun et al., 2019, arXiv 1911.07963)."""
    return (bound / norms.clamp_min(1e-12)).clamp_max(1.0)


def geometric_median_weights(updates: Tensor, steps: int = 50, smoothing: float = 1e-6) -> Tensor:
    """Weights ``[n]`` of the smoothed geometric median, by Weiszfeld (RFA; Pillutla et al., 2022, arXiv 1912.13445)."""
    weights = updates.new_full((len(updates),), 1 / len(updates))
    scale = float(updates.norm(dim=1).median().clamp_min(1e-12))
    for _ in range(steps):
        distances = (updates - weights @ updates).norm(dim=1).clamp_min(smoothing * scale)
        weights = 1 / distances
        weights = weights / weights.sum()
    return weights


def dnc_weights(
    updates: Tensor,
    f: int,
    generator: torch.Generator,
    *,
    rounds: int = 3,
    sample: int = 10_000,
    c: float = 1.0,
) -> Tensor:
    """Divide and conquer: rows far out along the top singular vector go (Shejwalkar and Houmansadr, NDSS 2021).

    Args:
        updates: ``[n, d]``.
        f: attackers.
        generator: chooses the coordinates.
        rounds: repetitions; a row must pass all.
        sample: coordinates in each.
        c: c·f rows are removed each time.
    """
    n, d = updates.shape
    good = torch.ones(n, dtype=torch.bool)
    for _ in range(rounds):
        columns = torch.randperm(d, generator=generator)[: min(sample, d)]
        centred = (updates[:, columns] - updates[:, columns].mean(0)).double()
        # Projections on the top right singular vector are the top left one times its singular value.
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        scores = values[-1] * vectors[:, -1] ** 2
        good &= _chosen(scores, max(1, n - round(c * f))) > 0
    if not bool(good.any()):
        return torch.zeros(n)
    return good.to(updates.dtype) / good.sum()


def nnm(updates: Tensor, f: int) -> Tensor:
    """Nearest-neighbour mixing: each row becomes the mean of its n − f nearest, itself included (AISTATS 2023)."""
    return _mixing(updates, f) @ updates


def mixed_geometric_median_weights(updates: Tensor, f: int) -> Tensor:
    """Weights ``[n]`` of the geometric median of the rows of :func:`nnm`; every row has some, for it mixes itself."""
    mixing = _mixing(updates, f)
    return geometric_median_weights(mixing @ updates) @ mixing


def fltrust_weights(updates: Tensor, norms: Tensor, root: Tensor, root_norm: float) -> Tensor:
    """FLTrust: ReLU cosine to a trusted update, every update scaled to its norm (Cao et al., NDSS 2021).

    Args:
        updates: ``[n, d]``.
        norms: of the whole updates ``[n]``; those of the rows unless the rows are sketches.
        root: trusted update ``[d]``.
        root_norm: its norm.

    Returns:
        Weights ``[n]`` of the updates as they are; all 0 if none agrees with the root.
    """
    trust = torch.nn.functional.cosine_similarity(updates, root[None], dim=1).clamp_min(0)
    if not bool(trust.sum() > 0):
        return torch.zeros_like(trust)
    return trust / trust.sum() * root_norm / norms.clamp_min(1e-12)


def squared_distances(updates: Tensor) -> Tensor:
    """Squared distances between rows ``[n, n]``; centred first, so that rows close to each other lose no digits."""
    centred = (updates - updates.mean(0)).double()
    gram = centred @ centred.T
    norms = gram.diagonal().clone()
    distances = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min_(0)
    return distances.fill_diagonal_(0)


def _mixing(updates: Tensor, f: int) -> Tensor:
    """``[n, n]``: 1/(n − f) for the n − f rows nearest to each, itself included."""
    count = max(1, len(updates) - f)
    nearest = squared_distances(updates).argsort(dim=1, stable=True)[:, :count]
    return updates.new_zeros(len(updates), len(updates)).scatter_(1, nearest, 1 / count)


def _sorted(updates: Tensor) -> Tensor:
    """Every column in ascending order; NumPy's sort of many short columns is ten times as fast as torch's."""
    return torch.from_numpy(np.sort(updates.numpy(force=True), axis=0)).to(updates.device)


def _scores(distances: Tensor, f: int) -> Tensor:
    """Krum scores of squared distances ``[n, n]``; to itself, 0, is the smallest of each row."""
    neighbours = max(1, len(distances) - f - 2)
    return distances.sort(1).values[:, 1 : neighbours + 1].sum(1)


def _chosen(scores: Tensor, count: int) -> Tensor:
    weights = torch.zeros(len(scores))
    weights[scores.argsort(stable=True)[:count]] = 1 / count
    return weights
