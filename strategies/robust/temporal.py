"""Rivals that follow clients through the rounds: state in, scores out; pure torch over sketches or whole updates."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class TemporalCosine:
    """Cosine to the mean of a client's own last updates plus that of the last aggregates; nothing is trained (ours).

    Args:
        keep: how many clients are kept after the warm-up: a number from 1 on, or a share of those that reply.
        window: rounds in both means.
        warm_up: rounds in which all are kept.
        clients: that are remembered; beyond that the one that was not seen for longest is forgotten.
    """

    def __init__(self, keep: float, window: int = 3, warm_up: int = 2, clients: int = 10_000) -> None:
        self._keep, self._window, self._warm_up, self._clients = keep, window, warm_up, clients
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
            kept = best(scores, self._keep)
        aggregate = updates[kept].mean(0)
        for client, update, is_kept in zip(clients, updates, kept.tolist(), strict=True):
            own = self._own.pop(client, deque(maxlen=self._window))
            own.append((update if is_kept else aggregate).clone())
            self._own[client] = own  # at the end: those not seen for longest come first
        for client in list(self._own)[: max(0, len(self._own) - self._clients)]:
            del self._own[client]
        self._means.append(aggregate)
        return kept, scores

    def state_dict(self) -> dict[str, Any]:
        """The remembered updates."""
        own = {client: torch.stack(list(updates)) for client, updates in self._own.items()}
        return {"own": own, "order": list(own), "means": list(self._means), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        own = state["own"]
        order = state.get("order", own)  # states of earlier versions have none
        self._own = {client: deque(own[client], maxlen=self._window) for client in order}
        self._means = deque(state["means"], maxlen=self._window)
        self._round = state["round"]


class Flanders:
    """FLANDERS: a matrix autoregression forecasts all updates; the n − f nearest to the forecast are kept.

    X_t ≈ A·X_{t−1}·B with A ``[n, n]`` and B ``[p, p]`` over p sampled coordinates, fitted by alternating least squares
    over a window (Gabrielli et al., arXiv 2303.16668). The ridge term is ours, and so is what stands for a client in a
    round in which it was absent: the mean of those that were there.

    Args:
        keep: how many are kept after the warm-up: a number from 1 on, or a share of those that reply.
        coordinates: p.
        window: rounds.
        warm_up: rounds in which all are kept.
        seed: of the coordinates.
    """

    def __init__(
        self, keep: float, coordinates: int = 100, window: int = 5, warm_up: int = 2, seed: int = 0
    ) -> None:
        self._keep, self._coordinates, self._warm_up = keep, coordinates, warm_up
        self._rounds: deque[dict[str, Tensor]] = deque(maxlen=window)
        self._seed = seed
        self._columns: Tensor | None = None
        self._round = 0

    def judge(self, clients: Sequence[str], updates: Tensor) -> tuple[Tensor, Tensor]:
        """Which of a round's updates ``[n, d]`` are kept, and minus their distance to the forecast ``[n]``."""
        self._round += 1
        if self._columns is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._columns = torch.randperm(updates.shape[1], generator=generator)[: self._coordinates]
        sample = updates[:, self._columns].double()
        kept, scores = torch.ones(len(updates), dtype=torch.bool), torch.zeros(len(updates))
        if self._round > self._warm_up:
            forecast = self._forecast(clients)
            scores = -(sample - forecast).norm(dim=1).float()
            kept = best(scores, self._keep)
            sample = torch.where(kept[:, None], sample, forecast)
        self._rounds.append(dict(zip(clients, sample, strict=True)))
        return kept, scores

    def _forecast(self, clients: Sequence[str]) -> Tensor:
        past = [_rows(of_round, clients) for of_round in self._rounds]
        pairs = list(itertools.pairwise(past))
        n, p = past[-1].shape
        a, b = torch.eye(n, dtype=torch.float64), torch.eye(p, dtype=torch.float64)
        for _ in range(3):
            left = [x @ b for x, _ in pairs]
            a = _ridge([y for _, y in pairs], left)
            right = [a @ x for x, _ in pairs]
            b = _ridge([y.T for _, y in pairs], [m.T for m in right]).T
        return a @ past[-1] @ b

    def state_dict(self) -> dict[str, Any]:
        """The window; the coordinates follow from the seed."""
        names = [list(of_round) for of_round in self._rounds]
        rows = [torch.stack(list(of_round.values())) for of_round in self._rounds]
        columns = torch.zeros(0, dtype=torch.int64) if self._columns is None else self._columns
        return {"names": names, "rows": rows, "columns": columns, "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._rounds.clear()
        self._rounds.extend(
            dict(zip(names, rows, strict=True))
            for names, rows in zip(state["names"], state["rows"], strict=True)
        )
        self._columns = state["columns"] if len(state["columns"]) else None
        self._round = state["round"]


class FLDetector:
    """FLDetector: distance between an update and its prediction by Cauchy's mean value theorem, averaged over a window.

    The prediction is g_{t−1} + H·(w_t − w_{t−1}) with a compact L-BFGS Hessian of the global trajectory (Zhang et
    al., KDD 2022, arXiv 2207.09209). Two clusters of suspicion scores are told apart by 2-means; the published gap
    statistic that first decides whether there are two is replaced by a test of the clusters' distance (ours), and
    instead of stopping for a restart the suspicious are left out of the round (ours). A client that was absent is
    predicted from the last mean, and its suspicion is the mean over the rounds in which it was there (ours).

    Args:
        window: rounds in the Hessian and in the score.
        warm_up: rounds in which all are kept.
    """

    def __init__(self, window: int = 10, warm_up: int = 2) -> None:
        self._window, self._warm_up = window, warm_up
        self._steps: deque[Tensor] = deque(maxlen=window)
        self._changes: deque[Tensor] = deque(maxlen=window)
        self._suspicion: deque[dict[str, float]] = deque(maxlen=window)
        self._last: dict[str, Tensor] = {}
        self._round = 0

    def judge(self, clients: Sequence[str], updates: Tensor) -> tuple[Tensor, Tensor]:
        """Which of a round's updates ``[n, d]`` are kept, ``[n]`` bool, and minus their suspicion ``[n]``."""
        self._round += 1
        n = len(updates)
        kept, scores = torch.ones(n, dtype=torch.bool), torch.zeros(n)
        if self._steps:
            last = torch.stack([self._last.get(client, self._steps[-1]) for client in clients])
            distance = (updates - last - self._hessian_times(self._steps[-1])).norm(dim=1)
            shares = distance / distance.sum().clamp_min(1e-12)
            self._suspicion.append(dict(zip(clients, shares.tolist(), strict=True)))
            scores = -torch.tensor([self._mean_suspicion(client) for client in clients])
            if self._round > self._warm_up:
                kept = split_high(scores)
        mean = updates[kept].mean(0)
        if self._steps:
            self._changes.append(mean - self._steps[-1])
        self._last = dict(zip(clients, updates.clone(), strict=True))
        self._steps.append(mean)
        return kept, scores

    def _mean_suspicion(self, client: str) -> float:
        found = [shares[client] for shares in self._suspicion if client in shares]
        return sum(found) / len(found)

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

    def state_dict(self) -> dict[str, Any]:
        """The global trajectory, the clients' last updates and what they are suspected of."""
        return {
            "steps": list(self._steps),
            "changes": list(self._changes),
            "suspicion": [dict(shares) for shares in self._suspicion],
            "last": dict(self._last),
            "round": self._round,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._steps = deque(state["steps"], maxlen=self._window)
        self._changes = deque(state["changes"], maxlen=self._window)
        self._suspicion = deque(state["suspicion"], maxlen=self._window)
        self._last = dict(state["last"])
        self._round = state["round"]


def best(scores: Tensor, keep: float) -> Tensor:
    """The ``keep`` highest scores ``[n]`` bool; below 1 it is a share of them, and one is kept in any case."""
    count = keep if keep >= 1 else max(1.0, keep * len(scores))
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: round(min(count, len(scores)))]] = True
    return kept


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


def _rows(of_round: Mapping[str, Tensor], clients: Sequence[str]) -> Tensor:
    """A round's rows ``[n, p]`` of given clients; the mean of that round for those that were absent."""
    mean = torch.stack(list(of_round.values())).mean(0)
    return torch.stack([of_round.get(client, mean) for client in clients])


def _ridge(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The matrix W that minimises Σ ‖y − W x‖² with a little ridge."""
    moment = torch.stack([y @ x.T for y, x in zip(outputs, inputs, strict=True)]).sum(0)
    gram = torch.stack([x @ x.T for x in inputs]).sum(0)
    regular = gram + 1e-3 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(regular, moment.T)
    return solution.T
