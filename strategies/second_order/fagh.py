"""FAGH (arXiv 2403.11041) as a Flower strategy: gradients and Hessian products in, Newton-like steps out.

What travels beyond FedSGD's d floats each way: one Hessian product up, as in the paper, and, unless the paper's first
row is wanted, the direction down, in ``direction_codec`` (a quarter of d for int8; both sides use the decoded values).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fedllm.strategies.second_order.fagh_optimizer import FaghOptimizer
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.strategies import Decay, GradientStrategy, Positive
from fedllm.strategies.second_order.updates import FaghPaper
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field

from fedllm.accumulate import Accumulator
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ReplyError
from fedllm.events import EventBus
from fedllm.records import (
    ADAPTER,
    HESSIAN_DIRECTION,
    HESSIAN_ROW,
    LOSS_NOT_FINITE,
    Codec,
    ReplyKind,
    check_arrays,
    check_reply,
    only_arrays,
    only_metrics,
    records_of,
    spec_of,
)

logger = logging.getLogger(__name__)


class FAGH(GradientStrategy):
    """FAGH: Newton steps from Hessian products of the clients; rank-k and adaptive (ours), or as published.

    A keyword that is left out has the preset's value. See docs/second_order.md for what η and ρ mean.

    Args:
        preset: ``ours`` keeps ``memory`` products with directions that the server chooses (:class:`.rank_k.Fagh`);
            ``paper`` is the published rank-one form with the Hessian's first row (:class:`.updates.FaghPaper`).
        eta: η; 0.1 with ``preset="paper"``.
        rho: ρ; with adaptive damping, where it begins; 1 with ``preset="paper"``.
        beta1: decay of the gradients' mean; 0.9 with ``preset="paper"``.
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

    key_defaults: ClassVar[Mapping[str, Any]] = {
        name: parameter.default for name, parameter in inspect.signature(Fagh).parameters.items()
    }
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
        self._events: EventBus | None = None
        super().__init__(**{"server_optimizer": self._optimizer} | kwargs)

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Take the run's events."""
        super().prepare(config, bundle, events)
        self._events = events

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
        """See the base class; a Hessian product must have the model's keys and shapes and be finite.

        A client without a finite loss is heard if there is a step to take back.
        """
        if LOSS_NOT_FINITE in only_metrics(reply) and self._optimizer.can_take_back:
            check_reply(reply, None, self.weighted_by_key)
            check_arrays(only_arrays(reply), self.reply_spec(sent))
            return
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
        """Fold the replies and take the step, or take back the last one; the event ``step-taken-back`` tells why.

        Raises:
            RoundError: see :meth:`FaghOptimizer.step`.
        """
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._optimizer.warn(server_round)
        if (told := self._optimizer.taken_back) and self._events is not None:
            self._events.emit("step-taken-back", round=server_round, reason=told)
        elif told:
            logger.warning("round %d: %s", server_round, told)
        return arrays, metrics


class FAGHOpt(FAGH):
    """FAGH on the pseudo-gradients of clients that train for several steps, with Hessian products at the start (ours).

    For the client update ``backprop-and-hessian-row``. The product is older than the pseudo-gradient by the local
    steps, and the pseudo-gradient is no gradient of one point: a practical hybrid without the paper's analysis.

    The moves stand for gradients only if the clients take plain steps: ``backprop-and-hessian-row.optimizer = "sgd"``.

    Args:
        local_scale: the clients' learning rate times their steps, by which their moves are divided. None: that of the
            run's configuration where ``train.local-steps`` is set; elsewhere 1, which a run warns of.
        kwargs: keywords of :class:`FAGH`.
    """

    reads: ClassVar[ReplyKind] = ADAPTER

    def __init__(self, *, local_scale: Positive | None = None, **kwargs: Any) -> None:
        self._pseudo = local_scale or 1.0
        self._scale_is_given = local_scale is not None
        super().__init__(**kwargs)

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Take the scale of the clients' moves from the configuration, or say that it is not known."""
        super().prepare(config, bundle, events)
        if self._scale_is_given:
            return
        if config.train.local_steps:
            self._optimizer.pseudo = config.train.learning_rate * config.train.local_steps
            return
        events.emit(
            "warning",
            message="fagh-opt.local-scale is not set and train.local-steps is 0, so the clients' moves do not have a "
            "gradient's size, and curvature and moves do not fit: set train.local-steps, or local-scale to the "
            "learning rate times the usual number of steps",
        )
