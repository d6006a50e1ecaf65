"""What a client's next update should look like: a ladder of predictors, judged by what they have predicted so far.

Every predictor maps the same inputs to a vector; only its direction counts. Inputs ``[n, k, q]`` are, for each
client, the mean of its own last directions, its very last one, the same two of the accepted clients together, and the
trusted update; what is not known is zero. Coefficients are shared by all clients and all coordinates of the sketch: a
sketch's coordinates are exchangeable, so one round of n clients gives n·q examples for a handful of numbers.

========== ====================================================================== ==========================
name       prediction                                                             learns
========== ====================================================================== ==========================
temporal   sum of the means (and of the trusted update)                           nothing
ridge      Σ_k θ_k · input_k, a ridge regression with forgetting                  k numbers
mlp        the ridge's, plus a small network over each coordinate's inputs        81 numbers for k = 5
========== ====================================================================== ==========================

The ladder and the shared coefficients are ours; the paper trains a network on every round from scratch (see
``paper.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedllm.seeding import derive_seed

INPUTS = 5
"""Own mean, own last, global mean, global last, trusted update."""

_TEMPORAL = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
_RIDGE, _FORGET = 1e-2, 0.7
_HIDDEN, _STEPS, _LEARNING_RATE, _SAMPLE = 13, 20, 0.01, 6_000
_MARGIN = 0.99  # a later rung must have a smaller error by a percent


class Ladder:
    """The predictors of a run and the error that each has had on the next round, before it saw it.

    Args:
        seed: of the network's initial weights.
    """

    NAMES = ("temporal", "ridge", "mlp")

    def __init__(self, seed: int = 0) -> None:
        self._gram = torch.zeros(INPUTS, INPUTS, dtype=torch.float64)
        self._moment = torch.zeros(INPUTS, dtype=torch.float64)
        generator = torch.Generator().manual_seed(derive_seed(seed, "vert predictor"))
        self._weights = [
            torch.randn(_HIDDEN, INPUTS, generator=generator) / INPUTS**0.5,
            torch.zeros(_HIDDEN),
            torch.zeros(1, _HIDDEN),
        ]
        self.errors = torch.full((len(self.NAMES),), float("nan"))

    @property
    def chosen(self) -> str:
        """The first predictor whose error no later one beats by a percent; the simplest until there is an error."""
        best = 0
        for index in range(1, len(self.NAMES)):
            if bool(self.errors[index] < _MARGIN * self.errors[best]):
                best = index
        return self.NAMES[best]

    def predict(self, inputs: Tensor, name: str | None = None) -> Tensor:
        """Predicted directions ``[n, q]``, of norm 1 or 0, by the chosen or a given predictor."""
        name = name or self.chosen
        if name == "temporal":
            return F.normalize(torch.einsum("nkq,k->nq", inputs, _TEMPORAL), dim=1)
        linear = torch.einsum("nkq,k->nq", inputs, self._coefficients())
        if name == "mlp":
            linear = linear + self._network(inputs, self._weights)
        return F.normalize(linear, dim=1)

    def learn(self, inputs: Tensor, targets: Tensor) -> None:
        """Note every predictor's error on a round's accepted clients, then let them learn from it.

        Args:
            inputs: ``[n, k, q]`` as they were before the round.
            targets: the clients' actual directions ``[n, q]``, of norm 1.
        """
        if len(targets) == 0 or not bool(inputs.any()):
            return
        errors = torch.stack(
            [1 - (self.predict(inputs, name) * targets).sum(1).mean() for name in self.NAMES]
        )
        known = torch.isfinite(self.errors) & bool(self._gram.any())
        blended = torch.where(known, 0.5 * self.errors + 0.5 * errors, errors)
        # Before its first lesson a predictor that learns has no error worth the name.
        self.errors = (
            blended if bool(self._gram.any()) else torch.stack([errors[0], *[torch.tensor(torch.nan)] * 2])
        )
        columns = inputs.transpose(1, 2).reshape(-1, INPUTS).double()
        self._gram = _FORGET * self._gram + columns.T @ columns
        self._moment = _FORGET * self._moment + columns.T @ targets.reshape(-1).double()
        self._train_network(inputs, targets)

    def _coefficients(self) -> Tensor:
        if not bool(self._gram.any()):
            return _TEMPORAL
        scale = self._gram.diagonal().mean()
        regular = self._gram + _RIDGE * scale * torch.eye(INPUTS, dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(regular, self._moment)
        return solution.float()

    def _train_network(self, inputs: Tensor, targets: Tensor) -> None:
        """A few Adam steps on what the ridge leaves unexplained, one example a coordinate."""
        scale = inputs.shape[2] ** 0.5  # coordinates of a unit vector are of size 1/√q
        rest = targets - torch.einsum("nkq,k->nq", inputs, self._coefficients())
        columns, wanted = inputs.transpose(1, 2).reshape(-1, INPUTS), rest.reshape(-1)
        stride = max(1, len(columns) // _SAMPLE)
        columns, wanted = columns[::stride] * scale, wanted[::stride] * scale
        with torch.enable_grad():
            weights = [weight.clone().requires_grad_() for weight in self._weights]
            optimizer = torch.optim.Adam(weights, lr=_LEARNING_RATE)
            for _ in range(_STEPS):
                optimizer.zero_grad()
                loss = F.mse_loss(_forward(columns, weights), wanted)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self._weights = [weight.detach() for weight in weights]

    @staticmethod
    def _network(inputs: Tensor, weights: list[Tensor]) -> Tensor:
        scale = inputs.shape[2] ** 0.5
        output: Tensor = _forward(inputs.transpose(1, 2) * scale, weights) / scale
        return output

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next prediction depends on."""
        return {
            "gram": self._gram,
            "moment": self._moment,
            "weights": list(self._weights),
            "errors": self.errors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._gram, self._moment = state["gram"], state["moment"]
        self._weights, self.errors = list(state["weights"]), state["errors"]


def without_own(inputs: Tensor) -> Tensor:
    """The inputs ``[n, k, q]`` as they would be if the clients had no history of their own."""
    common = inputs.clone()
    common[:, :2] = 0
    return common


def _forward(columns: Tensor, weights: list[Tensor]) -> Tensor:
    """``[…, k] → […]``; odd in its inputs, because the sign of a sketch's coordinate means nothing."""
    first, bias, last = weights
    hidden = torch.relu(F.linear(columns, first, bias)) - torch.relu(F.linear(-columns, first, bias))
    return F.linear(hidden, last).squeeze(-1)
