"""FAGH (arXiv 2403.11041) as a Flower strategy: gradients and Hessian products in, Newton-like steps out.

What travels beyond FedSGD's d floats each way: one Hessian product up, as in the paper, and, unless the paper's first
row is wanted, the direction down, in ``direction_codec`` (a quarter of d for int8; both sides use the decoded values).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from fedllm.strategies.second_order.optimizer import flatten, mean_gradient, moved, unflatten
from fedllm.strategies.second_order.strategies import Decay, GradientStrategy, Positive
from fedllm.strategies.second_order.updates import Fagh, FaghPaper
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedllm.accumulate import Accumulator, Reply, WeightedMean
from fedllm.errors import ConfigError, ReplyError
from fedllm.records import (
    ADAPTER,
    HESSIAN_DIRECTION,
    HESSIAN_ROW,
    Codec,
    ReplyKind,
    check_arrays,
    decode,
    encode,
    only_arrays,
    records_of,
    spec_of,
)

logger = logging.getLogger(__name__)


class GradientAndRowMean:
    """Means of gradients and of Hessian products; a reply without a product counts for the gradient only.

    Attributes:
        losses: weight and loss of each client by name.
        without: names of the clients that sent no product although one was asked for.
    """

    def __init__(self, asked: bool) -> None:
        self._asked = asked
        self._gradient, self._row = WeightedMean(), WeightedMean()
        self._rows = 0
        self.losses: dict[str, tuple[float, float]] = {}
        self.without: list[str] = []

    def add(self, reply: Reply) -> None:
        """Fold one reply in; its product must have passed :meth:`FAGH.check_train_reply`."""
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
        """The mean gradient."""
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
    """

    def __init__(self, update: Fagh | FaghPaper, codec: Codec, pseudo: float = 0.0) -> None:
        self.update = update
        self._codec = codec
        self._pseudo = pseudo
        self._direction: Tensor | int | None = None
        self._folding = GradientAndRowMean(False)

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
        return self._folding

    def step(
        self, server_round: int, current: Mapping[str, Tensor], folded: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The next global model."""
        without = self._folding.without
        if without:
            logger.warning(
                "round %d: no Hessian product from %s; their gradients are used all the same",
                server_round,
                ", ".join(sorted(without)),
            )
        row = self._folding.row()
        flat_row = None if row is None else flatten(row, current)
        gradient = mean_gradient(current, folded, self._pseudo)
        step = self.update.step(gradient, flat_row, self._direction, self._folding.losses or None)
        return moved(current, step)

    def state_dict(self) -> dict[str, Any]:
        """The update's state; what is asked of the clients follows from it."""
        return self.update.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.update.load_state_dict(state)


class FAGH(GradientStrategy):
    """FAGH: Newton steps from Hessian products of the clients; rank-k and adaptive (ours), or as published.

    A keyword that is left out has the preset's value. See docs/second_order.md for what η and ρ mean.

    Args:
        preset: ``ours`` keeps ``memory`` products with directions that the server chooses (:class:`.updates.Fagh`);
            ``paper`` is the published rank-one form with the Hessian's first row (:class:`.updates.FaghPaper`).
        eta: η.
        rho: ρ; with adaptive damping, where it begins.
        beta1: decay of the gradients' mean.
        beta2: decay of the rows' mean.
        memory: Hessian products kept; 0: none are asked for. ``ours`` only.
        secants: whether steps and changes of the gradient count among the products, when the same clients answer
            twice in a row. ``ours`` only.
        metric: what ρ damps: the identity, or the gradients' second moment. ``ours`` only.
        tau: floor of the second moment in units of the root mean square gradient; the larger, the nearer to the
            identity. ``ours`` only.
        damping: ρ follows the cohort's loss, which also takes back a step that raised it, or is fixed. ``ours`` only.
        direction_codec: how the direction travels to the clients.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.

    Raises:
        ConfigError: a keyword that the preset does not have.
    """

    _pseudo = 0.0

    def __init__(
        self,
        *,
        preset: Literal["ours", "paper"] = "ours",
        eta: Positive | None = None,
        rho: Positive | None = None,
        beta1: Decay | None = None,
        beta2: Decay | None = None,
        memory: Annotated[int, Field(ge=0, le=1000)] | None = None,
        secants: bool | None = None,
        metric: Literal["identity", "second-moment"] | None = None,
        tau: Positive | None = None,
        damping: Literal["adaptive", "fixed"] | None = None,
        direction_codec: Codec = "int8",
        **kwargs: Any,
    ) -> None:
        common = {"eta": eta, "rho": rho, "beta1": beta1, "beta2": beta2}
        own = {"memory": memory, "secants": secants, "metric": metric, "tau": tau, "damping": damping}
        if preset == "paper" and (given := [name for name, value in own.items() if value is not None]):
            raise ConfigError(
                f"fagh.{given[0]} is set, but fagh.preset=paper is the published form, which has none; "
                "leave it out, or use preset=ours"
            )
        keywords: dict[str, Any] = {k: v for k, v in (common | own).items() if v is not None}
        update = Fagh(**keywords) if preset == "ours" else FaghPaper(**keywords)
        self._optimizer = FaghOptimizer(update, direction_codec, self._pseudo)
        super().__init__(**{"server_optimizer": self._optimizer} | kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the parameters and the direction of this round's Hessian product."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        direction = self._optimizer.ask(self._current)
        if direction is not None:
            for message in messages:
                message.content[HESSIAN_DIRECTION] = direction
        return messages

    def check_train_reply(self, reply: Message, sent: Message) -> None:
        """See the base class; a Hessian product must have the model's keys and shapes and be finite."""
        super().check_train_reply(reply, sent)
        row = records_of(reply, ArrayRecord).get(HESSIAN_ROW)
        if row is None:
            return
        try:
            check_arrays(row, spec_of(only_arrays(sent), "fp32"))
        except ReplyError as error:
            raise ReplyError(f"{HESSIAN_ROW}: {error}") from error

    def accumulator(self) -> Accumulator:
        """Means of gradients and products, and the losses."""
        return self._optimizer.accumulator()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies and take the step; the metrics tell ρ and the curvature's extreme eigenvalues."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            for name, value in self._optimizer.update.diagnostics.items():
                metrics[f"server-{name}"] = value
        return arrays, metrics


class FAGHOpt(FAGH):
    """FAGH on the pseudo-gradients of clients that train for several steps, with Hessian products at the start (ours).

    For the client update ``backprop-and-hessian-row``. The product is older than the pseudo-gradient by the local
    steps, and the pseudo-gradient is no gradient of one point: a practical hybrid without the paper's analysis.

    Args:
        local_scale: the clients' learning rate times their steps, by which their moves are divided.
        kwargs: keywords of :class:`FAGH`.
    """

    reads: ClassVar[ReplyKind] = ADAPTER

    def __init__(self, *, local_scale: Positive = 1.0, **kwargs: Any) -> None:
        self._pseudo = local_scale
        super().__init__(**kwargs)
