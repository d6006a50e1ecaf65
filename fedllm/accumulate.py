"""Accumulators: fold validated replies one by one, in memory that does not grow with the cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from flwr.app import ArrayRecord, RecordDict

from fedllm.errors import ReplyError
from fedllm.records import NUM_EXAMPLES


@dataclass(frozen=True)
class Reply:
    """One validated, decoded training reply.

    Attributes:
        node: the client's name.
        weight: what it counts, normally its number of examples; positive.
        arrays: the adapter or update, float32.
        metrics: numbers of its metric record.
        content: the whole reply, for method-specific extras.
        sent: the arrays that this client was sent, as they travelled.
    """

    node: str
    weight: float
    arrays: Mapping[str, torch.Tensor]
    metrics: Mapping[str, float]
    content: RecordDict
    sent: ArrayRecord = field(default_factory=ArrayRecord)


class Accumulator(Protocol):
    """Folds replies into one set of tensors."""

    def add(self, reply: Reply) -> None:
        """Fold one reply in; it may be freed afterwards."""
        ...

    def result(self) -> dict[str, torch.Tensor]:
        """The folded tensors; at least one reply must have been added. Asked for once."""
        ...


class WeightedMean:
    """Mean of the replies' arrays weighted by ``Reply.weight``, summed in float64 (McMahan et al., 2017)."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 0.0

    def add(self, reply: Reply) -> None:
        """Add a reply.

        Raises:
            ReplyError: keys or shapes differ from those of the replies before it.
        """
        if not self._sums:
            self._sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in reply.arrays.items()}
        if reply.arrays.keys() != self._sums.keys():
            raise ReplyError(f"node {reply.node}: the arrays' names differ from those of the other replies")
        for name, tensor in reply.arrays.items():
            total = self._sums[name]
            if tensor.shape != total.shape:
                raise ReplyError(f"node {reply.node}: {name!r} has shape {tuple(tensor.shape)}, "
                                 f"expected {tuple(total.shape)}")  # fmt: skip
            total.add_(tensor, alpha=reply.weight)
        self._weight += reply.weight

    def result(self) -> dict[str, torch.Tensor]:
        """The mean as float64, in the memory of the sums; the next reply begins new ones."""
        mean = {name: total.div_(self._weight) for name, total in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        return mean


class MetricsMean:
    """Weighted mean of the replies' scalar metrics; a metric counts only for the replies that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, object], weight: float) -> None:
        """Add one reply's metrics; what is not a number, and the weight itself, is left out."""
        for key, value in metrics.items():
            if key != NUM_EXAMPLES and isinstance(value, int | float):
                self._sums[key] = self._sums.get(key, 0.0) + weight * value
                self._weights[key] = self._weights.get(key, 0.0) + weight

    def result(self) -> dict[str, float]:
        """The means by name."""
        return {key: total / self._weights[key] for key, total in self._sums.items()}
