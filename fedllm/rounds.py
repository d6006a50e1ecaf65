"""The round loop: bounded waits, streamed replies, quorum and deadline, checkpoints, events.

It drives any Flower ``Strategy``: fedllm's own fold replies while they arrive; a stock one gets the same validated
stream. A round without quorum leaves the global model untouched; see :class:`fedllm.exchange.Exchange`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.errors import CheckpointError, ReplyError, RoundError
from fedllm.events import EventBus, LogSink
from fedllm.exchange import Exchange, ExchangeStats, LoopOptions, QuorumError
from fedllm.nodes import NodeDirectory
from fedllm.records import NUM_EXAMPLES, check_reply, decode, only_arrays, only_metrics, records_of, spec_of
from fedllm.strategy import BaseStrategy
from fedllm.wrapper import StrategyWrapper, core_of, layers_of

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
AfterRound = Callable[[int, ArrayRecord, Result], None]


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    *,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    options: LoopOptions | None = None,
    events: EventBus | None = None,
    checkpoints: CheckpointStore | None = None,
    resume: bool = False,
    after_round: AfterRound | None = None,
) -> Result:
    """Run a strategy to the end.

    Args:
        strategy: any Flower strategy.
        grid: Flower's grid.
        initial_arrays: the global model before round 1.
        num_rounds: the last round.
        train_config: sent with every training message.
        evaluate_config: sent with every evaluation message.
        evaluate_fn: evaluation on the server, before the first and after each round; None from it: not this time.
        options: waits, quorum and deadline.
        events: receives what happens; by default it is logged.
        checkpoints: where the state is kept after each round.
        resume: go on from the newest good checkpoint, if there is one.
        after_round: called after a round that changed the global model has been evaluated.

    Returns:
        The final arrays and the metrics by round, those of resumed rounds included.

    Raises:
        PlanError: too few nodes.
        RoundError: every client failed, or too many rounds in a row had no quorum; checkpoints are kept.
        CheckpointError: ``resume`` is set and no checkpoint can be used.
    """
    loop = _RoundLoop(
        strategy,
        grid,
        train_config or ConfigRecord(),
        evaluate_config or ConfigRecord(),
        evaluate_fn,
        options or LoopOptions(),
        events or EventBus([LogSink()]),
        checkpoints,
        after_round,
    )
    return loop.run(initial_arrays, num_rounds, resume)


class _RoundLoop:
    """The state of one run of the loop."""

    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
        options: LoopOptions,
        events: EventBus,
        checkpoints: CheckpointStore | None,
        after_round: AfterRound | None,
    ) -> None:
        self.strategy = strategy
        self.core = core_of(strategy)
        self.grid = grid
        self.train_config = train_config
        self.evaluate_config = evaluate_config
        self.evaluate_fn = evaluate_fn
        self.options = options
        self.events = events
        self.checkpoints = checkpoints
        self.after_round = after_round
        self.directory = NodeDirectory(
            grid,
            events,
            timeout=options.node_timeout,
            poll_interval=options.poll_interval,
            model_version=options.model_version,
        )
        self.result = Result()
        self.stale: set[str] = set()
        self.failed_in_a_row = 0

    def run(self, arrays: ArrayRecord, num_rounds: int, resume: bool) -> Result:
        done = 0
        state = self._resume() if resume else None
        if state is not None:
            arrays, done = state.arrays, state.round
        self.result.arrays = arrays
        self.strategy.summary()
        self.directory.wait_for(self.options.min_nodes)
        if state is None:
            self._evaluate_on_server(0, arrays)
        for server_round in range(done + 1, num_rounds + 1):
            started = time.monotonic()
            new_arrays = self._train(server_round, arrays)
            if new_arrays is not None:
                arrays = self.result.arrays = new_arrays
                self._evaluate_on_clients(server_round, arrays)
                self._evaluate_on_server(server_round, arrays)
                if self.after_round is not None:
                    self.after_round(server_round, arrays, self.result)
            self._save(server_round, arrays)
            self.events.emit("round-finished", round=server_round, seconds=time.monotonic() - started)
        return self.result

    # ---------------------------------------------------------------- phases

    def _train(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """One round of training; None if it had no quorum and changed nothing."""
        started = time.monotonic()
        self._update_nodes()
        messages = list(self.strategy.configure_train(server_round, arrays, self.train_config, self.grid))
        names = [self.directory.name(message.metadata.dst_node_id) for message in messages]
        self.events.emit("round-started", round=server_round, nodes=names)
        if not messages:
            self.events.emit("round-skipped", round=server_round, reason="the strategy asked no client")
            return None
        exchange = self._exchange(server_round, "train", self._check_train_reply)
        exchange.send(messages)
        try:
            new_arrays, metrics = self.strategy.aggregate_train(server_round, self._replies(exchange))
        except QuorumError as error:
            self._skip(server_round, error)
            return None
        finally:
            self.stale |= exchange.unanswered
        self.failed_in_a_row = 0
        if new_arrays is None:
            self.events.emit("round-skipped", round=server_round, reason=_why_nothing(self.strategy))
            return None
        if metrics is not None:
            self.result.train_metrics_clientapp[server_round] = metrics
        self._report(server_round, exchange.stats, metrics, _distance(arrays, new_arrays), started)
        return new_arrays

    def _skip(self, server_round: int, error: QuorumError) -> None:
        """Note a round without quorum; stop the run if there is no hope left."""
        self.failed_in_a_row += 1
        self.events.emit("round-skipped", round=server_round, reason=str(error))
        kept = "" if self.checkpoints is None else "; the last good checkpoint is kept"
        if error.hopeless:
            raise RoundError(f"round {server_round}: every client failed: {error}{kept}") from error
        if self.failed_in_a_row >= self.options.max_failed_rounds:
            raise RoundError(
                f"{self.failed_in_a_row} rounds in a row had no quorum (server.max-failed-rounds); the last, "
                f"round {server_round}: {error}{kept}"
            ) from error

    def _evaluate_on_clients(self, server_round: int, arrays: ArrayRecord) -> None:
        started = time.monotonic()
        messages = list(
            self.strategy.configure_evaluate(server_round, arrays, self.evaluate_config, self.grid)
        )
        if not messages:
            return
        exchange = self._exchange(server_round, "evaluate", self._check_evaluate_reply)
        exchange.send(messages)
        try:
            metrics = self.strategy.aggregate_evaluate(server_round, self._replies(exchange))
        except QuorumError as error:
            self.events.emit(
                "warning", message=f"round {server_round}: no evaluation by the clients: {error}"
            )
            return
        finally:
            self.stale |= exchange.unanswered
        if metrics is not None:
            self.result.evaluate_metrics_clientapp[server_round] = metrics
            self._emit_evaluated(server_round, "clients", metrics, started)

    def _evaluate_on_server(self, server_round: int, arrays: ArrayRecord) -> None:
        if self.evaluate_fn is None:
            return
        started = time.monotonic()
        metrics = self.evaluate_fn(server_round, arrays)
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[server_round] = metrics
            self._emit_evaluated(server_round, "server", metrics, started)

    # --------------------------------------------------------------- helpers

    def _update_nodes(self) -> None:
        if isinstance(self.core, BaseStrategy):
            self.directory.ask_again(self.core.outdated)
            self.core.outdated = set()
        nodes = self.directory.refresh()
        if isinstance(self.core, BaseStrategy):
            # A node that is away costs its reply, not the run; without any node there is nothing to do but wait.
            nodes = nodes or self.directory.wait_for(1)
        else:
            # Flower's own sampling would wait for these without bound.
            wanted = [getattr(self.core, name, 1) for name in ("min_available_nodes", "min_train_nodes")]
            nodes = self.directory.wait_for(max(*wanted, 1))
        for layer in layers_of(self.strategy):
            if isinstance(layer, BaseStrategy | StrategyWrapper):
                layer.nodes = nodes
        for message_id in sorted(self.stale):
            # Answers that came after their round closed are fetched once, so that Flower can forget them.
            if list(self.grid.pull_messages([message_id])):
                self.stale.discard(message_id)

    def _exchange(self, server_round: int, phase: str, check: Callable[[Message, Message], None]) -> Exchange:
        return Exchange(
            self.grid,
            self.events,
            self.options,
            server_round=server_round,
            phase=phase,
            node_name=self.directory.name,
            packs=self.directory.packs,
            check=check,
        )

    def _replies(self, exchange: Exchange) -> Iterator[Message]:
        return iter(exchange) if isinstance(self.core, BaseStrategy) else _with_common_metrics(exchange)

    def _check_train_reply(self, reply: Message, sent: Message) -> None:
        if isinstance(self.core, BaseStrategy):
            self.core.check_train_reply(reply, sent)
        else:
            check_reply(reply, spec_of(only_arrays(sent)), self._weight_key)
            self._check_for_stock(reply, sent)

    def _check_evaluate_reply(self, reply: Message, sent: Message) -> None:
        check_reply(reply, None, self._weight_key)
        if not isinstance(self.core, BaseStrategy):
            self._check_for_stock(reply, None)

    @property
    def _weight_key(self) -> str:
        return str(getattr(self.core, "weighted_by_key", NUM_EXAMPLES))

    def _check_for_stock(self, reply: Message, sent: Message | None) -> None:
        """Refuse a reply at whose form Flower's own strategies would raise."""
        expected = [] if sent is None else list(records_of(sent, ArrayRecord))
        arrays = records_of(reply, ArrayRecord)
        if list(arrays) != expected:
            raise ReplyError(f"the reply has the array records {list(arrays)}, expected {expected}")
        for name, array in ((n, a) for record in arrays.values() for n, a in record.items()):
            if array.stype != "numpy.ndarray":
                raise ReplyError(
                    f"{name!r} is encoded as {array.stype!r}, which Flower's strategies cannot read"
                )
        if any(isinstance(value, list) for value in only_metrics(reply).values()):
            raise ReplyError("a metric is a list, which Flower's strategies cannot average")

    def _emit_evaluated(self, server_round: int, where: str, metrics: MetricRecord, started: float) -> None:
        self.events.emit(
            "evaluated",
            round=server_round,
            where=where,
            metrics=dict(metrics),
            seconds=time.monotonic() - started,
        )

    def _report(
        self,
        server_round: int,
        stats: ExchangeStats,
        metrics: MetricRecord | None,
        norm: float,
        started: float,
    ) -> None:
        self.events.emit(
            "aggregated",
            round=server_round,
            replies=stats.valid,
            asked=stats.asked,
            num_examples=stats.num_examples,
            loss=None if metrics is None else metrics.get("loss"),
            seconds=time.monotonic() - started,
            update_norm=norm,
        )

    # ----------------------------------------------------------- checkpoints

    def _save(self, server_round: int, arrays: ArrayRecord) -> None:
        if self.checkpoints is None:
            return
        started = time.monotonic()
        state = ServerState(server_round, arrays, self._strategy_state(), self._history())
        try:
            path = self.checkpoints.save(state)
        except OSError as error:
            # What is in memory is still good: the run goes on, and the last checkpoint stays where it is.
            self.events.emit("checkpoint-failed", round=server_round, reason=str(error))
            return
        size = sum(file.stat().st_size for file in path.iterdir())
        self.events.emit(
            "checkpointed", round=server_round, path=str(path), bytes=size, seconds=time.monotonic() - started
        )

    def _strategy_state(self) -> Mapping[str, Any]:
        state_dict = getattr(self.strategy, "state_dict", None)
        return {} if state_dict is None else state_dict()

    def _history(self) -> dict[str, Any]:
        return {
            "train": {str(r): dict(m) for r, m in self.result.train_metrics_clientapp.items()},
            "evaluate-clients": {str(r): dict(m) for r, m in self.result.evaluate_metrics_clientapp.items()},
            "evaluate-server": {str(r): dict(m) for r, m in self.result.evaluate_metrics_serverapp.items()},
            "failed-in-a-row": self.failed_in_a_row,
        }

    def _resume(self) -> ServerState | None:
        if self.checkpoints is None:
            raise CheckpointError("resuming needs a run folder with checkpoints, and this run has none")
        found = self.checkpoints.latest()
        if found is None:
            self.events.emit("warning", message="no checkpoint yet; the run starts from round 1")
            return None
        state, path = found
        load = getattr(self.strategy, "load_state_dict", None)
        if load is not None:
            load(state.strategy)
        else:
            message = (
                f"{type(self.strategy).__name__} has no state_dict: it goes on without what it had learned"
            )
            self.events.emit("warning", message=message)
        history = state.history
        self.result.train_metrics_clientapp = _records(history["train"])
        self.result.evaluate_metrics_clientapp = _records(history["evaluate-clients"])
        self.result.evaluate_metrics_serverapp = _records(history["evaluate-server"])
        self.failed_in_a_row = history["failed-in-a-row"]
        self.events.emit("run-resumed", round=state.round, path=str(path))
        return state


def _with_common_metrics(exchange: Exchange) -> Iterator[Message]:
    """The replies that have the metrics which most of them have: Flower's own strategies raise when these differ.

    Nothing streams here, and nothing is lost by it: those strategies keep all replies anyway.
    """
    replies = list(exchange)
    forms = [tuple(sorted(only_metrics(reply))) for reply in replies]
    expected = max(forms, key=forms.count, default=())
    for reply, form in zip(replies, forms, strict=True):
        if form != expected:
            exchange.withdraw(reply, f"the metrics are {list(form)}, most replies have {list(expected)}")
    exchange.require_quorum()
    yield from (reply for reply, form in zip(replies, forms, strict=True) if form == expected)


def _why_nothing(strategy: Strategy) -> str:
    """Why a strategy kept the model as it is, if it says so."""
    reasons = [layer.skip_reason for layer in layers_of(strategy) if isinstance(layer, StrategyWrapper)]
    return next(filter(None, reasons), "the strategy returned no arrays")


def _records(history: Mapping[str, Any]) -> dict[int, MetricRecord]:
    return {int(server_round): MetricRecord(metrics) for server_round, metrics in history.items()}


def _distance(old: ArrayRecord, new: ArrayRecord) -> float:
    """Euclidean norm of the change from one global model to the next, over the arrays that both have."""
    before, after = decode(old), decode(new)
    squares = [
        torch.linalg.vector_norm(after[name].double() - before[name].double()).item() ** 2
        for name in after
        if name in before and before[name].shape == after[name].shape and after[name].is_floating_point()
    ]
    return math.sqrt(sum(squares))
