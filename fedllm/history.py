"""What the events of a run add up to: rounds, replies, drops and totals of every node.

:class:`RunHistory` is the one place that folds the events of :mod:`fedllm.events`. The report, the live view
and the log lines are views of it. A resumed run repeats rounds; the newest version of a round counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from fedllm.outcomes import (
    HEADLINE_METRICS,
    NodeDrop,
    NodeInfo,
    NodeReply,
    NodeTask,
    NodeTotals,
    NodeVerdict,
    PlanRecord,
    RoundRecord,
)

Status = Literal["running", "finished", "failed"]


class RunHistory:
    """Folds events in the order they were written.

    Attributes:
        name: name of the run.
        strategy: name of the strategy, like ``client`` and ``task`` as in the configuration.
        config: flat configuration, empty until ``run-started``.
        total_rounds: rounds that the run shall have.
        parameters: number of trained parameters.
        adapter_bytes: bytes of the adapter.
        started: unix seconds at which the newest process of the run began.
        last_time: unix seconds of the newest event.
        rounds: rounds by number.
        nodes_joined: what each node said of itself, by name.
        failure: why the run failed.
        final_metrics: metrics of the final model, from ``run-finished``.
        warnings: warnings, rejected nodes and failed checkpoints, oldest first.
        plans: what nodes were told to do, by those strategies that plan, oldest first.
    """

    def __init__(self) -> None:
        self.name = ""
        self.strategy = ""
        self.client = ""
        self.task = ""
        self.version = ""
        self.config: dict[str, Any] = {}
        self.total_rounds = 0
        self.parameters = 0
        self.adapter_bytes = 0
        self.status: Status = "running"
        self.started: float | None = None
        self.last_time: float | None = None
        self.rounds: dict[int, RoundRecord] = {}
        self.nodes_joined: dict[str, NodeInfo] = {}
        self.waiting_for: tuple[int, int] | None = None
        self.failure: str | None = None
        self.final_metrics: dict[str, float | None] = {}
        self.warnings: list[str] = []
        self.plans: list[PlanRecord] = []

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> RunHistory:
        """The history that these events add up to."""
        history = cls()
        for event in events:
            history.update(event)
        return history

    def update(self, event: Mapping[str, Any]) -> None:
        """Fold one event; events outside the vocabulary of :mod:`fedllm.events` only move the clock."""
        self.last_time = event["time"]
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event)

    def _run_started(self, event: Mapping[str, Any]) -> None:
        self.name, self.strategy = event["run"], event["strategy"]
        self.client, self.task, self.version = event["client"], event["task"], event["version"]
        self.total_rounds, self.config = event["rounds"], dict(event["config"])
        self.parameters, self.adapter_bytes = event["parameters"], event["adapter_bytes"]
        self.started = event["time"]
        self.status, self.failure, self.final_metrics = "running", None, {}

    def _run_resumed(self, event: Mapping[str, Any]) -> None:
        self._forget_rounds_from(event["round"] + 1)
        self.plans = [plan for plan in self.plans if plan.round <= event["round"]]

    def _run_finished(self, event: Mapping[str, Any]) -> None:
        self.status, self.final_metrics = "finished", _numbers(event["metrics"])

    def _run_failed(self, event: Mapping[str, Any]) -> None:
        self.status, self.failure = "failed", event["reason"]

    def _warning(self, event: Mapping[str, Any]) -> None:
        self.warnings.append(event["message"])

    def _forget_rounds_from(self, first: int) -> None:
        self.rounds = {number: record for number, record in self.rounds.items() if number < first}

    def _waiting(self, event: Mapping[str, Any]) -> None:
        self.waiting_for = (event["have"], event["need"])

    def _node_joined(self, event: Mapping[str, Any]) -> None:
        self.nodes_joined[event["node"]] = NodeInfo(event.get("device", ""), event.get("num_examples"))

    def _node_rejected(self, event: Mapping[str, Any]) -> None:
        self.warnings.append(f"client {event['node']} rejected: {event['reason']}")

    def _node_replied(self, event: Mapping[str, Any]) -> None:
        names = ("phase", "node", "num_examples", "loss", "seconds", "elapsed", "bytes_up", "bytes_down")
        self._round(event).replies.append(NodeReply(**{name: event[name] for name in names}))

    def _node_dropped(self, event: Mapping[str, Any]) -> None:
        drop = NodeDrop(event["round"], event["phase"], event["node"], event["reason"])
        self._round(event).drops.append(drop)

    def _round(self, event: Mapping[str, Any]) -> RoundRecord:
        number = event["round"]
        if number not in self.rounds:
            self.rounds[number] = RoundRecord(number, event["time"])
        return self.rounds[number]

    def _round_started(self, event: Mapping[str, Any]) -> None:
        number = event["round"]
        self.waiting_for = None
        # A run goes forward only: a round that starts again replaces itself and all later ones.
        self._forget_rounds_from(number)
        self.rounds[number] = RoundRecord(number, event["time"], tuple(event["nodes"]))

    def _aggregated(self, event: Mapping[str, Any]) -> None:
        record = self._round(event)
        record.replies_counted, record.num_examples = event["replies"], event["num_examples"]
        record.train_loss, record.update_norm = event["loss"], event["update_norm"]

    def _planned(self, event: Mapping[str, Any]) -> None:
        nodes = {
            name: NodeTask(plan["bits"], plan["batch_size"], plan["ranks"])
            for name, plan in event["nodes"].items()
        }
        self.plans = [plan for plan in self.plans if plan.round < event["round"]]
        self.plans.append(PlanRecord(event["round"], event["phase"], tuple(event["weights"]), nodes))

    def _verdict(self, event: Mapping[str, Any]) -> None:
        scores = event["scores"]
        self._round(event).verdicts = {
            name: NodeVerdict(kept, math.nan if scores[name] is None else scores[name])
            for name, kept in event["kept"].items()
        }

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        self._round(event).evaluations[event["where"]] = _numbers(event["metrics"])

    def _round_skipped(self, event: Mapping[str, Any]) -> None:
        self._round(event).skip_reason = event["reason"]

    def _round_finished(self, event: Mapping[str, Any]) -> None:
        self._round(event).seconds = event["seconds"]

    def _checkpoint_failed(self, event: Mapping[str, Any]) -> None:
        self.warnings.append(f"round {event['round']}: checkpoint failed: {event['reason']}")

    @property
    def closed_rounds(self) -> list[RoundRecord]:
        """Finished and skipped rounds in order, without round 0."""
        return [record for record in self.ordered_rounds if record.number > 0 and record.outcome != "open"]

    @property
    def ordered_rounds(self) -> list[RoundRecord]:
        """All rounds in order, round 0 and an open round included."""
        return [self.rounds[number] for number in sorted(self.rounds)]

    @property
    def drops(self) -> list[NodeDrop]:
        """All dropped replies, oldest first."""
        return [drop for record in self.ordered_rounds for drop in record.drops]

    @property
    def bytes_up(self) -> int:
        """Bytes that nodes sent to the server in the whole run."""
        return sum(record.bytes_up for record in self.rounds.values())

    @property
    def bytes_down(self) -> int:
        """Bytes that the server sent to replying nodes in the whole run."""
        return sum(record.bytes_down for record in self.rounds.values())

    @property
    def seconds(self) -> float:
        """Seconds spent in closed rounds, over all processes of a resumed run."""
        return sum(record.seconds or 0.0 for record in self.rounds.values())

    def metric_names(self, where: str) -> list[str]:
        """Evaluation metrics of ``where`` ("server" or "clients"): headline metrics first, then by name."""
        seen = {name for record in self.rounds.values() for name in record.evaluations.get(where, {})}
        return [name for name in HEADLINE_METRICS if name in seen] + sorted(seen - HEADLINE_METRICS.keys())

    def metric(self, name: str, where: str) -> list[tuple[int, float]]:
        """(round, value) of an evaluation metric in order of rounds; undefined values are left out."""
        values = ((r.number, r.evaluations.get(where, {}).get(name)) for r in self.ordered_rounds)
        return [(number, value) for number, value in values if value is not None]

    def headline_metric(self) -> tuple[str, str] | None:
        """(name, where) of the metric that describes the run best, or ``None`` without any evaluation."""
        for name in HEADLINE_METRICS:
            for where in ("server", "clients"):
                if self.metric(name, where):
                    return name, where
        return None

    def best(self, name: str, where: str) -> tuple[int, float] | None:
        """(round, value) of the best value of a metric, the earliest of equals; ``None`` if never measured.

        A metric outside :data:`fedllm.outcomes.HEADLINE_METRICS` counts as the larger the better.
        """
        larger = HEADLINE_METRICS.get(name, True)
        points = self.metric(name, where)
        return max(points, key=lambda point: point[1] if larger else -point[1], default=None)

    def node_totals(self) -> dict[str, NodeTotals]:
        """Totals of every node that joined, was asked, replied or was dropped, by name."""
        totals: dict[str, NodeTotals] = {}

        def of(name: str) -> NodeTotals:
            return totals.setdefault(name, NodeTotals(name))

        for name, info in self.nodes_joined.items():
            totals[name] = NodeTotals(name, info.device, info.num_examples)
        for record in self.ordered_rounds:
            for name in record.asked:
                of(name).asked += 1
            for reply in record.replies:
                of(reply.node).add(reply)
            for drop in record.drops:
                of(drop.node).drops.append(drop)
        return totals


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The scalar metrics; a strategy's lists have no place in a table."""
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, int | float)}


_HANDLERS: Mapping[str, Callable[[RunHistory, Mapping[str, Any]], None]] = {
    "run-started": RunHistory._run_started,
    "run-resumed": RunHistory._run_resumed,
    "run-finished": RunHistory._run_finished,
    "run-failed": RunHistory._run_failed,
    "warning": RunHistory._warning,
    "waiting-for-nodes": RunHistory._waiting,
    "node-joined": RunHistory._node_joined,
    "node-rejected": RunHistory._node_rejected,
    "node-replied": RunHistory._node_replied,
    "node-dropped": RunHistory._node_dropped,
    "round-started": RunHistory._round_started,
    "planned": RunHistory._planned,
    "verdict": RunHistory._verdict,
    "aggregated": RunHistory._aggregated,
    "evaluated": RunHistory._evaluated,
    "round-skipped": RunHistory._round_skipped,
    "round-finished": RunHistory._round_finished,
    "checkpoint-failed": RunHistory._checkpoint_failed,
}
