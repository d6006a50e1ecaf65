"""What speaks for or against each client over many rounds, accepted or not; bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Evidence:
    """Running means, one number a client.

    Args:
        share: of the newest round in the mean.
        clients: clients that are remembered; beyond that the one that was not weighed for longest is forgotten.
    """

    def __init__(self, share: float, clients: int) -> None:
        self._share, self._clients = share, clients
        self._means: dict[str, float] = {}

    def __len__(self) -> int:
        """Clients that have been weighed."""
        return len(self._means)

    def of(self, clients: Sequence[str]) -> Tensor:
        """The means of clients, ``[n]``; 0 for those never weighed."""
        return torch.tensor([self._means.get(name, 0.0) for name in clients])

    def weigh(self, clients: Sequence[str], surplus: Tensor) -> None:
        """Take in a round.

        Args:
            clients: names.
            surplus: by how much each did better than it had to, ``[n]``.
        """
        for name, value in zip(clients, surplus.tolist(), strict=True):
            before = self._means.pop(name, value)
            self._means[name] = before + self._share * (value - before)
        while len(self._means) > self._clients:
            del self._means[next(iter(self._means))]

    def state_dict(self) -> dict[str, Any]:
        """Names and means, the longest unseen first."""
        return {"names": list(self._means), "means": list(self._means.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._means = dict(zip(state["names"], state["means"], strict=True))
