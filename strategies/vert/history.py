"""What is remembered of each client and of all of them together: a few directions and levels, bounded.

Only what was accepted is remembered. A rejected client keeps the history that it had: neither its own rejected update
nor the others' mean takes its place, so that one bad round cannot rewrite what is expected of a client.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fedllm.strategies.vert.predict import INPUTS
from torch import Tensor

COPY = 0.9999
"""Cosine from which two updates count as one vector sent twice: training on batches of data never agrees so far."""


@dataclass
class Record:
    """One client: its last accepted directions ``[q]`` of norm 1, and how its features differ from the others'."""

    directions: deque[Tensor]
    offsets: Tensor
    rounds: int
    seen: int


class History:
    """The memory of a run.

    Args:
        size: q, the length of a sketch.
        features: numbers that are judged of every reply.
        window: directions that are kept of a client, and of all together.
        clients: clients that are remembered; beyond that the one that was not seen for longest is forgotten.
    """

    def __init__(self, size: int, features: int, window: int, clients: int) -> None:
        self._size, self._features = size, features
        self._window, self._clients = window, clients
        self.records: dict[str, Record] = {}
        self.means: deque[Tensor] = deque(maxlen=window)

    @property
    def nbytes(self) -> int:
        """Bytes of all directions."""
        own = sum(len(record.directions) for record in self.records.values())
        return 4 * self._size * (own + len(self.means))

    def inputs(self, clients: Sequence[str], root: Tensor | None) -> Tensor:
        """What the predictors see, ``[n, 5, q]``; see :mod:`fedllm.strategies.vert.predict`.

        Args:
            clients: names.
            root: direction ``[q]`` of the trusted update of this round.
        """
        inputs = torch.zeros(len(clients), INPUTS, self._size)
        for row, name in zip(inputs, clients, strict=True):
            record = self.records.get(name)
            if record is not None and record.directions:
                row[0], row[1] = torch.stack(list(record.directions)).mean(0), record.directions[-1]
        if self.means:
            inputs[:, 2], inputs[:, 3] = torch.stack(list(self.means)).mean(0), self.means[-1]
        if root is not None:
            inputs[:, 4] = root
        return inputs

    def likeness(self, clients: Sequence[str], directions: Tensor) -> Tensor:
        """Largest cosine of each direction ``[n, q]`` to one that the same client has sent before, ``[n]``; 0: none."""
        found = torch.zeros(len(clients))
        for index, name in enumerate(clients):
            record = self.records.get(name)
            if record is not None and record.directions:
                found[index] = (torch.stack(list(record.directions)) @ directions[index]).max()
        return found

    def offsets(self, clients: Sequence[str]) -> Tensor:
        """How each client's features usually differ from the level of all, ``[n, features]``; 0 if unknown."""
        unknown = torch.zeros(self._features)
        return torch.stack([self.records[c].offsets if c in self.records else unknown for c in clients])

    def rounds(self, clients: Sequence[str]) -> Tensor:
        """In how many rounds each client was accepted, ``[n]``."""
        return torch.tensor([self.records[c].rounds if c in self.records else 0 for c in clients])

    def remember(
        self, server_round: int, clients: Sequence[str], directions: Tensor, deviations: Tensor
    ) -> None:
        """Take in the accepted replies of a round.

        Args:
            server_round: the round.
            clients: names of the accepted.
            directions: ``[n, q]`` of norm 1.
            deviations: features minus their level of this round, ``[n, features]``.
        """
        for name, direction, deviation in zip(clients, directions, deviations, strict=True):
            record = self.records.get(name)
            if record is None:
                record = Record(deque(maxlen=self._window), torch.zeros(self._features), 0, server_round)
                self.records[name] = record
            # The first deviations are mostly noise; the mean of r of them deserves r / (r + 1) of our trust.
            share = 1.0 / (min(record.rounds, self._window) + 2)
            record.offsets = record.offsets + share * (deviation - record.offsets)
            record.directions.append(direction.clone())
            record.rounds, record.seen = record.rounds + 1, server_round
        self.means.append(directions.mean(0))
        while len(self.records) > self._clients:
            oldest = min(self.records, key=lambda name: (self.records[name].seen, name))
            del self.records[oldest]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        empty = torch.zeros(0, self._size)
        names = list(self.records)
        records = list(self.records.values())
        return {
            "names": names,
            "counts": [len(record.directions) for record in records],
            "rounds": [record.rounds for record in records],
            "seen": [record.seen for record in records],
            "offsets": torch.stack([r.offsets for r in records])
            if records
            else torch.zeros(0, self._features),
            "directions": torch.stack([d for r in records for d in r.directions]) if records else empty,
            "means": torch.stack(list(self.means)) if self.means else empty,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        pieces = state["directions"].split(state["counts"]) if state["names"] else []
        self.records = {
            name: Record(deque(piece, maxlen=self._window), offsets, rounds, seen)
            for name, piece, offsets, rounds, seen in zip(
                state["names"], pieces, state["offsets"], state["rounds"], state["seen"], strict=True
            )
        }
        self.means = deque(state["means"], maxlen=self._window)
