"""VERT as its authors published it: dense projection with bias, a network trained from scratch in every round.

What the code of arXiv 2411.10673 does, written anew from its description. It is kept for comparison: it needs a clean
warm-up and a known number of honest clients, holds whole updates of ``window`` rounds (n·H·d numbers), and its
projection's bias swamps small updates. Use :class:`fedllm.strategies.vert.detector.Detector` instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.seeding import derive_seed


class PaperDetector:
    """The published algorithm over whole updates.

    Args:
        keep: k, how many are kept after the warm-up.
        size: q, the length of a projection.
        warm_up: rounds that are averaged as they are.
        window: H, rounds of history.
        epochs: E, passes of the predictor over each client's history.
        learning_rate: of Adam on the predictor and the integration coefficients.
        seed: of projections and predictors.
        bias: whether the projection has one, as published.
    """

    def __init__(
        self,
        keep: int,
        *,
        size: int = 128,
        warm_up: int = 2,
        window: int = 10,
        epochs: int = 5,
        learning_rate: float = 0.01,
        seed: int = 0,
        bias: bool = True,
    ) -> None:
        self.keep, self.size, self.warm_up = keep, size, warm_up
        self.epochs, self.learning_rate, self.seed, self.bias = epochs, learning_rate, seed, bias
        self._updates: deque[dict[str, Tensor]] = deque(maxlen=window)
        self._means: deque[Tensor] = deque(maxlen=window)
        self._round = 0

    def judge(self, clients: Sequence[str], updates: Tensor) -> tuple[Tensor, Tensor]:
        """Which of a round's updates ``[n, d]`` are kept, ``[n]`` bool, and the scores ``[n]``."""
        self._round += 1
        n = len(clients)
        kept, scores = torch.ones(n, dtype=torch.bool), torch.zeros(n)
        if self._round > self.warm_up:
            scores = self._scores(clients, updates)
            kept = torch.zeros(n, dtype=torch.bool)
            kept[scores.argsort(descending=True, stable=True)[: self.keep]] = True
        mean = updates[kept].mean(0)
        self._updates.append(
            {c: u.clone() if k else mean for c, u, k in zip(clients, updates, kept.tolist(), strict=True)}
        )
        self._means.append(mean)
        return kept, scores

    def _scores(self, clients: Sequence[str], updates: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(derive_seed(self.seed, self._round, "vert paper"))
            projector = nn.Linear(updates.shape[1], self.size, bias=self.bias).requires_grad_(False)
            q = self.size
            network = nn.Sequential(nn.Linear(q, q), nn.ReLU(), nn.Linear(q, q), nn.ReLU(), nn.Linear(q, q))
            a, b = (torch.ones(updates.shape[1], requires_grad=True) for _ in range(2))
            optimizer = torch.optim.Adam([*network.parameters(), a, b], lr=self.learning_rate)
            means = torch.stack(list(self._means))
            scores = [
                self._score(client, update, means, projector, network, a, b, optimizer)
                for client, update in zip(clients, updates, strict=True)
            ]
        return torch.tensor(scores)

    def _score(
        self,
        client: str,
        update: Tensor,
        means: Tensor,
        projector: nn.Module,
        network: nn.Module,
        a: Tensor,
        b: Tensor,
        optimizer: torch.optim.Optimizer,
    ) -> float:
        own = torch.stack([u.get(client, mean) for u, mean in zip(self._updates, self._means, strict=True)])
        targets = projector(own[1:])
        for _ in range(self.epochs):
            optimizer.zero_grad()
            predicted = network(projector(a * own[:-1] + b * means[:-1]))
            loss = (predicted - targets).norm(dim=1).sum()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            expected = network(projector(a * own[-1] + b * means[-1]))
            return float(torch.cosine_similarity(expected, projector(update), dim=0))

    def state_dict(self) -> dict[str, Any]:
        """The windows."""
        return {"updates": list(self._updates), "means": list(self._means), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._updates.clear()
        self._updates.extend(dict(updates) for updates in state["updates"])
        self._means.clear()
        self._means.extend(state["means"])
        self._round = state["round"]
