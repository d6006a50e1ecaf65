"""How the server joins units of different owners: a mean over owners, and a step that leaves the rest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedllm.accumulate import Reply


class OwnersMean:
    """For every tensor the mean over the replies that carry it, weighted by ``Reply.weight`` (Spry, App. E)."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, reply: Reply) -> None:
        """Add a reply; its names and shapes have been checked against what its sender was dealt."""
        for name, tensor in reply.arrays.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._weights[name] = 0.0
            self._sums[name].add_(tensor, alpha=reply.weight)
            self._weights[name] += reply.weight

    def result(self) -> dict[str, torch.Tensor]:
        """The means as float64; tensors of which no owner answered are absent."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


class UnitSgd:
    """w ← w + η (mean − w) for the tensors that were trained; the others stay.

    Args:
        eta: step size; 1 takes the mean itself.
    """

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = eta

    def __repr__(self) -> str:
        """Name and step size."""
        return f"sgd (eta {self.eta:g})"

    def step(
        self, server_round: int, current: Mapping[str, torch.Tensor], folded: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The next adapter, in the order of the current one."""
        moved = {name: current[name] + self.eta * (mean - current[name]) for name, mean in folded.items()}
        return {name: moved.get(name, value) for name, value in current.items()}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class UnitYogi:
    """FedYogi tensor by tensor (Reddi et al., ICLR 2021, arXiv 2003.00295), without bias correction, as Flower has it.

    A tensor of which no owner answered keeps its value and its moments; the paper leaves this case open.

    Args:
        eta: step size of the server.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        tau: adaptivity; larger is closer to plain averaging.
    """

    def __init__(
        self, eta: float = 1e-2, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.eta = eta
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.tau = tau
        self._first: dict[str, torch.Tensor] = {}
        self._second: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        """Name and constants."""
        return f"yogi (eta {self.eta:g}, beta_1 {self.beta_1:g}, beta_2 {self.beta_2:g}, tau {self.tau:g})"

    def step(
        self, server_round: int, current: Mapping[str, torch.Tensor], folded: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The next adapter, in the order of the current one."""
        moved = {name: self._step_one(name, current[name], mean) for name, mean in folded.items()}
        return {name: moved.get(name, value) for name, value in current.items()}

    def _step_one(self, name: str, value: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        delta = mean.double() - value
        square = delta.square()
        first = self._first.get(name, torch.zeros_like(delta))
        second = self._second.get(name, torch.zeros_like(delta))
        first = self.beta_1 * first + (1 - self.beta_1) * delta
        second = second - (1 - self.beta_2) * square * torch.sign(second - square)
        self._first[name], self._second[name] = first, second
        return value + self.eta * first / (second.sqrt() + self.tau)

    def state_dict(self) -> dict[str, Any]:
        """The moments of all tensors that were ever trained."""
        return {"first": dict(self._first), "second": dict(self._second)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._first, self._second = (
            {name: torch.as_tensor(value) for name, value in state[key].items()}
            for key in ("first", "second")
        )
