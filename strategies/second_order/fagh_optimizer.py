"""What FAGH keeps between rounds, and how it folds replies: gradients, Hessian products, and losses not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from fedllm.strategies.second_order.optimizer import (
    flatten,
    flatten_out,
    mean_gradient,
    moved,
    moved_in_place,
    unflatten,
)
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.updates import FaghPaper
from flwr.app import ArrayRecord
from torch import Tensor

from fedllm.accumulate import Reply, WeightedMean
from fedllm.errors import RoundError
from fedllm.records import HESSIAN_ROW, LOSS_NOT_FINITE, Codec, decode, encode

logger = logging.getLogger(__name__)

MOST_FAILURES = 10
"""Steps taken back in a row after which a run stops: the last is 2⁵⁵ times as damped as the first."""


class GradientAndRowMean:
    """Means of gradients and of Hessian products; a reply without a product counts for the gradient only.

    Attributes:
        losses: weight and loss of each client by name; infinite for those whose loss is not finite.
        without: names of the clients that sent no product although one was asked for.
        not_finite: names of the clients whose loss is not finite; nothing else of their replies counts.
    """

    def __init__(self, asked: bool) -> None:
        self._asked = asked
        self._gradient, self._row = WeightedMean(), WeightedMean()
        self._rows = 0
        self.losses: dict[str, tuple[float, float]] = {}
        self.without: list[str] = []
        self.not_finite: list[str] = []

    def add(self, reply: Reply) -> None:
        """Fold one reply in; its product must have passed :meth:`FAGH.check_train_reply`."""
        if LOSS_NOT_FINITE in reply.metrics:
            self.losses[reply.node] = (reply.weight, math.inf)
            self.not_finite.append(reply.node)
            return
        self._gradient.add(reply)
        if "loss" in reply.metrics:
            self.losses[reply.node] = (reply.weight, reply.metrics["loss"])
        if not self._asked:
            return
        row = reply.content.get(HESSIAN_ROW)
        if isinstance(row, ArrayRecord):
            self._row.add(Reply(reply.node, reply.weight, decode(row), {}, reply.content))
            self._rows += 1
        else:
            self.without.append(reply.node)

    def result(self) -> dict[str, Tensor]:
        """The mean gradient; empty if nobody's loss is finite."""
        return self._gradient.result()

    def row(self) -> dict[str, Tensor] | None:
        """The mean product; None if no reply had one."""
        return self._row.result() if self._rows else None


class FaghOptimizer:
    """A :class:`fedllm.strategy.ServerOptimizer` that also says what the clients are asked and how they are folded.

    Args:
        update: takes the step.
        codec: how the direction travels.
        pseudo: 0: the replies are gradients; else they are adapters, see :func:`.optimizer.mean_gradient`.

    Attributes:
        pseudo: as above; may be set before the first step.
        taken_back: why this round took the last step back; empty if it did not.
    """

    def __init__(self, update: Fagh | FaghPaper, codec: Codec, pseudo: float = 0.0) -> None:
        self.update = update
        self._codec = codec
        self.pseudo = pseudo
        self._direction: Tensor | int | None = None
        self._folding = GradientAndRowMean(False)
        self._origin: Mapping[str, Tensor] = {}
        self.taken_back = ""

    @property
    def can_take_back(self) -> bool:
        """Whether the replies may undo the last step: a loss that is not finite is then worth knowing."""
        return isinstance(self.update, Fagh) and self.update.can_take_back and bool(self._origin)

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """ρ and the curvature's extreme eigenvalues at the last step."""
        return self.update.diagnostics

    def __repr__(self) -> str:
        """The update that takes the steps."""
        return type(self.update).__name__

    def ask(self, current: Mapping[str, Tensor]) -> ArrayRecord | None:
        """The direction for this round's Hessian product; None: only gradients are wanted."""
        wanted = self.update.request()
        self._direction = wanted
        if wanted is None:
            return None
        if isinstance(wanted, int):
            name, first = next(iter(current.items()))
            unit = torch.zeros(first.shape)
            unit.view(-1)[wanted] = 1.0
            return encode({name: unit})
        sent = encode(unflatten(wanted, current), self._codec)
        # The clients use what arrives: so must the server.
        self._direction = flatten(decode(sent), current)
        return sent

    def accumulator(self) -> GradientAndRowMean:
        """A fresh accumulator for a round."""
        self._folding = GradientAndRowMean(self._direction is not None)
        self.taken_back = ""
        return self._folding

    def step(
        self, server_round: int, current: Mapping[str, Tensor], folded: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The next global model.

        Raises:
            RoundError: steps that hardly move the model were taken back again and again.
        """
        row, direction, self._direction = self._folding.row(), self._direction, None
        flat_row = None if row is None else flatten_out(row, current)
        gradient = mean_gradient(current, folded, self.pseudo) if folded else None
        losses = self._folding.losses or None
        if isinstance(self.update, FaghPaper):
            assert gradient is not None  # whoever has none is refused: nothing can be taken back
            return moved_in_place(current, self.update.step(gradient, flat_row, direction, losses))
        step = self.update.step(gradient, flat_row, direction, losses)
        if self.update.taken_back:
            self.taken_back = self._told(self.update)
            return moved(self._origin, self.update.last_step)
        self._origin = current if self.update.adaptive else {}
        return moved(current, step)

    def _told(self, update: Fagh) -> str:
        """Why the last step is taken back, with the clients that had no finite loss."""
        nodes = sorted(self._folding.not_finite)
        at = f", not finite at {', '.join(nodes[:20])}{', …' if len(nodes) > 20 else ''}" if nodes else ""
        reason = f"{update.taken_back}{at}"
        if update.failures >= MOST_FAILURES:
            raise RoundError(
                f"{update.failures} steps in a row were taken back, though rho is now {update.rho:.3g}: {reason}; "
                "does a client's data or model change between rounds?"
            )
        return f"the last step is taken back: {reason}; rho is now {update.rho:.3g}"

    def warn(self, server_round: int) -> None:
        """Log which clients sent less than they were asked for, although their replies count."""
        if without := self._folding.without:
            logger.warning(
                "round %d: no Hessian product from %s; their gradients are used all the same",
                server_round,
                ", ".join(sorted(without)),
            )
        if not self.taken_back and (nodes := self._folding.not_finite):
            logger.warning(
                "round %d: the loss is not finite at %s; the last step stands, as it was not known to be finite before",
                server_round,
                ", ".join(sorted(nodes)),
            )

    def state_dict(self) -> dict[str, Any]:
        """The update's state and where its last step began; what is asked of the clients follows from it."""
        return {"update": self.update.state_dict(), "origin": dict(self._origin)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.update.load_state_dict(state["update"])
        self._origin = dict(state["origin"])
