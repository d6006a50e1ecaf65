"""Rivals that follow clients through the rounds: state in, scores out; pure torch over sketches or whole updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class TemporalCosine:
    """Cosine to the mean of a client's own last updates plus that of the last aggregates; nothing is trained (ours).

    Args:
        keep: how many clients are kept after the warm-up: a number, or a share of those that reply if at most 1.
        window: rounds in both means.
        warm_up: rounds in which all are kept.
    """

    def __init__(self, keep: float, window: int = 3, warm_up: int = 2) -> None:
        self._keep, self._window, self._warm_up = keep, window, warm_up
        self._own: dict[str, deque[Tensor]] = {}
        self._means: deque[Tensor] = deque(maxlen=window)
        self._round = 0

    def judge(self, clients: Sequence[str], updates: Tensor) -> tuple[Tensor, Tensor]:
        """Who is kept ``[n]`` bool, and the scores ``[n]``; the history of a rejected client gets the aggregate.

        Args:
            clients: names.
            updates: of the round, ``[n, q]``.
        """
        self._round += 1
        scores = torch.zeros(len(clients))
        kept = torch.ones(len(clients), dtype=torch.bool)
        if self._means:
            common = torch.stack(list(self._means)).mean(0)
            references = [
                common + torch.stack(list(self._own[c])).mean(0) if c in self._own else common
                for c in clients
            ]
            scores = F.cosine_similarity(updates, torch.stack(references))
        if self._round > self._warm_up:
            count = self._keep if self._keep > 1 else max(1.0, self._keep * len(clients))
            kept = torch.zeros_like(kept)
            kept[scores.argsort(descending=True, stable=True)[: round(count)]] = True
        aggregate = updates[kept].mean(0)
        for client, update, is_kept in zip(clients, updates, kept.tolist(), strict=True):
            own = self._own.setdefault(client, deque(maxlen=self._window))
            own.append((update if is_kept else aggregate).clone())
        self._means.append(aggregate)
        return kept, scores

    def state_dict(self) -> dict[str, Any]:
        """The remembered updates."""
        own = {client: torch.stack(list(updates)) for client, updates in self._own.items()}
        return {"own": own, "means": list(self._means), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._own = {client: deque(rows, maxlen=self._window) for client, rows in state["own"].items()}
        self._means = deque(state["means"], maxlen=self._window)
        self._round = state["round"]


class Flanders:
    """FLANDERS: a matrix autoregression forecasts all updates; the n − f nearest to the forecast are kept.

    X_t ≈ A·X_{t−1}·B with A ``[n, n]`` and B ``[p, p]`` over p sampled coordinates, fitted by alternating least squares
    over a window (Gabrielli et al., arXiv 2303.16668); the ridge term is ours.

    Args:
        keep: how many are kept after the warm-up.
        coordinates: p.
        window: rounds.
        warm_up: rounds in which all are kept.
        seed: of the coordinates.
    """

    def __init__(
        self, keep: int, coordinates: int = 100, window: int = 5, warm_up: int = 2, seed: int = 0
    ) -> None:
        self._keep, self._coordinates, self._warm_up = keep, coordinates, warm_up
        self._rounds: deque[Tensor] = deque(maxlen=window)
        self._seed = seed
        self._columns: Tensor | None = None
        self._round = 0

    def judge(self, updates: Tensor) -> tuple[Tensor, Tensor]:
        """Which of a round's updates ``[n, d]`` are kept, and minus their distance to the forecast ``[n]``."""
        self._round += 1
        if self._columns is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._columns = torch.randperm(updates.shape[1], generator=generator)[: self._coordinates]
        sample = updates[:, self._columns].double()
        kept, scores = torch.ones(len(updates), dtype=torch.bool), torch.zeros(len(updates))
        if self._round > self._warm_up:
            forecast = self._forecast()
            scores = -(sample - forecast).norm(dim=1).float()
            kept = torch.zeros_like(kept)
            kept[scores.argsort(descending=True, stable=True)[: self._keep]] = True
            sample = torch.where(kept[:, None], sample, forecast)
        self._rounds.append(sample)
        return kept, scores

    def _forecast(self) -> Tensor:
        pairs = list(zip(list(self._rounds)[:-1], list(self._rounds)[1:], strict=True))
        n, p = self._rounds[-1].shape
        a, b = torch.eye(n, dtype=torch.float64), torch.eye(p, dtype=torch.float64)
        for _ in range(3):
            left = [x @ b for x, _ in pairs]
            a = _ridge([y for _, y in pairs], left)
            right = [a @ x for x, _ in pairs]
            b = _ridge([y.T for _, y in pairs], [m.T for m in right]).T
        return a @ self._rounds[-1] @ b


class FLDetector:
    """FLDetector: distance between an update and its prediction by Cauchy's mean value theorem, averaged over a window.

    The prediction is g_{t−1} + H·(w_t − w_{t−1}) with a compact L-BFGS Hessian of the global trajectory (Zhang et
    al., KDD 2022, arXiv 2207.09209). Two clusters of suspicion scores are told apart by 2-means; the published gap
    statistic that first decides whether there are two is replaced by a test of the clusters' distance (ours), and
    instead of stopping for a restart the suspicious are left out of the round (ours).

    Args:
        window: rounds in the Hessian and in the score.
        warm_up: rounds in which all are kept.
    """

    def __init__(self, window: int = 10, warm_up: int = 2) -> None:
        self._window, self._warm_up = window, warm_up
        self._steps: deque[Tensor] = deque(maxlen=window)
        self._changes: deque[Tensor] = deque(maxlen=window)
        self._suspicion: deque[Tensor] = deque(maxlen=window)
        self._last: Tensor | None = None
        self._last_mean: Tensor | None = None
        self._round = 0

    def judge(self, updates: Tensor) -> tuple[Tensor, Tensor]:
        """Which updates ``[n, d]``, always of the same clients, are kept, and minus their suspicion ``[n]``."""
        self._round += 1
        n = len(updates)
        kept, scores = torch.ones(n, dtype=torch.bool), torch.zeros(n)
        if self._last is not None and self._steps:
            predicted = self._last + self._hessian_times(self._steps[-1])
            distance = (updates - predicted).norm(dim=1)
            self._suspicion.append(distance / distance.sum().clamp_min(1e-12))
            scores = -torch.stack(list(self._suspicion)).mean(0)
            if self._round > self._warm_up:
                kept = split_high(scores)
        mean = updates[kept].mean(0)
        if self._last_mean is not None:
            self._changes.append(mean - self._last_mean)
        self._last, self._last_mean = updates.clone(), mean
        self._steps.append(mean)
        return kept, scores

    def _hessian_times(self, vector: Tensor) -> Tensor:
        """Compact L-BFGS (Byrd, Nocedal, Schnabel, 1994) from the last steps and changes of the mean update."""
        count = min(len(self._changes), len(self._steps) - 1)
        if count < 1:
            return torch.zeros_like(vector)
        s = torch.stack(list(self._steps)[-count - 1 : -1], 1).double()
        y = torch.stack(list(self._changes)[-count:], 1).double()
        sy = s.T @ y
        lower, diagonal = sy.tril(-1), sy.diagonal().diag()
        sigma = sy[-1, -1] / (s[:, -1] @ s[:, -1]).clamp_min(1e-12)
        middle = torch.cat([torch.cat([sigma * (s.T @ s), lower], 1), torch.cat([lower.T, -diagonal], 1)], 0)
        v = vector.double()
        right = torch.cat([sigma * (s.T @ v), y.T @ v])
        solved = torch.linalg.lstsq(middle, right[:, None]).solution[:, 0]
        result: Tensor = sigma * v - torch.cat([sigma * s, y], 1) @ solved
        return result.float()


def split_high(scores: Tensor, separation: float = 4.0) -> Tensor:
    """The upper of two clusters ``[n]`` bool by the best split; all, if the clusters are not clearly apart.

    Args:
        scores: ``[n]``.
        separation: distance of the clusters' means, in pooled standard deviations, from which they are two.
    """
    ordered = scores.sort().values.double()
    n = len(ordered)
    best, cut = float("inf"), None
    for i in range(1, n):
        low, high = ordered[:i], ordered[i:]
        within = float(((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum())
        if within < best:
            best, cut = within, i
    if cut is None:
        return torch.ones(n, dtype=torch.bool)
    spread = (best / max(n - 2, 1)) ** 0.5
    if float(ordered[cut:].mean() - ordered[:cut].mean()) < separation * max(spread, 1e-12):
        return torch.ones(n, dtype=torch.bool)
    return scores >= ordered[cut]


def _ridge(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The matrix W that minimises Σ ‖y − W x‖² with a little ridge."""
    moment = torch.stack([y @ x.T for y, x in zip(outputs, inputs, strict=True)]).sum(0)
    gram = torch.stack([x @ x.T for x in inputs]).sum(0)
    regular = gram + 1e-3 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(regular, moment.T)
    return solution.T
