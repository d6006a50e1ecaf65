"""A strategy around another strategy, fedllm's or Flower's: what it does not change goes to the inner one.

The round loop looks through wrappers (:func:`core_of`): nodes, reply specifications and the weight key are those of the
innermost strategy, and a stock strategy inside gets the same checks as without a wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm.config import RunConfig
from fedllm.events import EventBus
from fedllm.nodes import NodeInfo, name_of
from fedllm.records import ADAPTER
from fedllm.strategy import BaseStrategy

if TYPE_CHECKING:
    from fedllm.models import ModelBundle


class StrategyWrapper(Strategy):
    """Passes everything on to ``inner``; subclasses override what they change.

    Args:
        inner: any Flower strategy, a wrapper too.
    """

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.nodes: Sequence[NodeInfo] = ()
        self.skip_reason = ""

    def node_name(self, node_id: int) -> str:
        """The name under which the loop knows a node; its id outside of fedllm's loop."""
        return name_of(self.nodes, node_id)

    @property
    def replies_are_adapters(self) -> bool:
        """Whether a reply carries the client's new adapter, and not an update such as a gradient."""
        return bool(getattr(core_of(self), "reads", ADAPTER) == ADAPTER)

    def prepare(self, config: RunConfig, bundle: ModelBundle, events: EventBus) -> None:
        """See :meth:`fedllm.strategy.BaseStrategy.prepare`."""
        if isinstance(self.inner, BaseStrategy | StrategyWrapper):
            self.inner.prepare(config, bundle, events)

    def close(self) -> None:
        """See :meth:`fedllm.strategy.BaseStrategy.close`."""
        if isinstance(self.inner, BaseStrategy | StrategyWrapper):
            self.inner.close()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The inner strategy's result."""
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The inner strategy's metrics."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def own_state(self) -> dict[str, Any]:
        """What later rounds depend on besides the inner strategy's state."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapper and of the inner strategy, if that has any."""
        state_dict = getattr(self.inner, "state_dict", None)
        return {"own": self.own_state(), "inner": {} if state_dict is None else state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.load_own_state(state["own"])
        load = getattr(self.inner, "load_state_dict", None)
        if load is not None:
            load(state["inner"])

    def summary(self) -> None:
        """Log the inner strategy's settings."""
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds with fedllm's loop, see :meth:`fedllm.strategy.BaseStrategy.start`."""
        from fedllm.exchange import LoopOptions
        from fedllm.rounds import run_rounds

        options = LoopOptions(
            min_nodes=int(getattr(core_of(self), "min_available_nodes", 1)),
            deadline=timeout,
            round_timeout=timeout,
        )
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            options=options,
        )


def layers_of(strategy: Strategy) -> list[Strategy]:
    """A strategy and what it wraps, outermost first."""
    layers = [strategy]
    while isinstance(layers[-1], StrategyWrapper):
        layers.append(layers[-1].inner)
    return layers


def core_of(strategy: Strategy) -> Strategy:
    """The innermost strategy."""
    return layers_of(strategy)[-1]
