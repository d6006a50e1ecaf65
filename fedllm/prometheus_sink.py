"""The sink ``prometheus``: a run's rounds, bytes, seconds, drops and metrics for a Prometheus server to scrape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from fedllm.metrics import HIGHEST_PORT, new_registry, serve

PREFIX = "fedllm_"
_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class Metric(NamedTuple):
    """A metric; every one has the label ``run`` besides ``labels``. Prometheus adds ``_total`` to a counter's name."""

    kind: Literal["Counter", "Gauge", "Histogram"]
    name: str
    text: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("Gauge", "run_info", "Always 1: what runs.", ("strategy", "client", "task", "version")),
    Metric("Gauge", "planned_rounds", "Rounds that the run shall have."),
    Metric("Gauge", "current_round", "The round that goes on, or else the last one."),
    Metric("Gauge", "last_event_timestamp_seconds", "When something last happened in the run."),
    Metric("Counter", "rounds", "Rounds that have ended, by outcome: finished or skipped.", ("outcome",)),
    Metric("Histogram", "round_seconds", "Duration of a round."),
    Metric("Gauge", "nodes_connected", "Nodes that were there when the run last waited for some."),
    Metric("Gauge", "nodes_needed", "Nodes for which the run waits."),
    Metric("Counter", "nodes_joined", "Nodes that have described themselves."),
    Metric("Counter", "nodes_rejected", "Nodes that could not take part."),
    Metric("Gauge", "nodes_asked", "Nodes that the current round asked to train."),
    Metric("Counter", "replies", "Replies that count.", ("phase",)),
    Metric("Counter", "drops", "Clients asked in vain, by kind of reason.", ("phase", "kind")),
    Metric("Counter", "received_bytes", "Bytes of the tensors in replies that count.", ("phase",)),
    Metric("Counter", "sent_bytes", "Bytes of the tensors sent to clients whose replies count.", ("phase",)),
    Metric("Histogram", "client_seconds", "Computing time of a client for one message.", ("phase",)),
    Metric("Gauge", "train_loss", "Mean training loss of the clients in the last round."),
    Metric("Gauge", "update_norm", "Norm of the last change of the global adapter."),
    Metric("Gauge", "evaluation", "The last evaluation.", ("where", "metric")),
    Metric("Gauge", "checkpoint_round", "Round of the newest checkpoint."),
    Metric("Gauge", "checkpoint_bytes", "Size of the newest checkpoint."),
    Metric("Counter", "checkpoint_failures", "Checkpoints that could not be written."),
    Metric("Counter", "warnings", "Warnings of the run."),
)


class PrometheusSink:
    """Serves ``http://HOST:PORT/metrics`` while a run goes on.

    Counters start at 0 in every process: those of a resumed run count from where it was resumed.

    Args:
        port: TCP port of the endpoint
        host: address to bind; empty: FEDLLM_METRICS_HOST, or else 127.0.0.1

    Raises:
        FedLLMError: the package ``prometheus-client`` is not installed, or the address cannot be bound.
    """

    def __init__(
        self, run_dir: Path, *, port: Annotated[int, Field(gt=0, le=HIGHEST_PORT)] = 9464, host: str = ""
    ) -> None:
        self._run = run_dir.name
        self._skipped_round: int | None = None
        registry = new_registry()
        self._metrics = {metric.name: _make(metric, registry) for metric in METRICS}
        for metric in METRICS:
            if metric.kind == "Counter" and not metric.labels:
                self._of(
                    metric.name
                )  # shown as 0 from the start: Prometheus sees no first increase otherwise
        for outcome in ("finished", "skipped"):
            self._of("rounds", outcome)
        self._stop = serve(registry, port, host)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Count one event."""
        self._of("last_event_timestamp_seconds").set(event["time"])
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event)

    def close(self) -> None:
        """End the endpoint and free its port."""
        self._stop()

    def _of(self, name: str, *labels: str) -> Any:
        return self._metrics[name].labels(self._run, *labels)

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge; a value that is unknown or was not finite leaves it as NaN."""
        self._of(name, *labels).set(float("nan") if value is None else value)

    def _run_started(self, event: Mapping[str, Any]) -> None:
        self._set("run_info", 1, event["strategy"], event["client"], event["task"], event["version"])
        self._set("planned_rounds", event["rounds"])
        self._set("current_round", event["first_round"] - 1)

    def _waiting(self, event: Mapping[str, Any]) -> None:
        self._set("nodes_connected", event["have"])
        self._set("nodes_needed", event["need"])

    def _node_joined(self, event: Mapping[str, Any]) -> None:
        self._of("nodes_joined").inc()

    def _node_rejected(self, event: Mapping[str, Any]) -> None:
        self._of("nodes_rejected").inc()

    def _round_started(self, event: Mapping[str, Any]) -> None:
        self._set("current_round", event["round"])
        self._set("nodes_asked", len(event["nodes"]))

    def _node_replied(self, event: Mapping[str, Any]) -> None:
        phase = event["phase"]
        self._of("replies", phase).inc()
        self._of("received_bytes", phase).inc(event["bytes_up"])
        self._of("sent_bytes", phase).inc(event["bytes_down"])
        if event["seconds"] is not None:
            self._of("client_seconds", phase).observe(event["seconds"])

    def _node_dropped(self, event: Mapping[str, Any]) -> None:
        self._of("drops", event["phase"], event["kind"]).inc()

    def _aggregated(self, event: Mapping[str, Any]) -> None:
        self._set("train_loss", event["loss"])
        self._set("update_norm", event["update_norm"])

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        for name, value in event["metrics"].items():
            if value is None or isinstance(value, int | float):
                self._set("evaluation", value, event["where"], name)

    def _checkpointed(self, event: Mapping[str, Any]) -> None:
        self._set("checkpoint_round", event["round"])
        self._set("checkpoint_bytes", event["bytes"])

    def _checkpoint_failed(self, event: Mapping[str, Any]) -> None:
        self._of("checkpoint_failures").inc()

    def _round_skipped(self, event: Mapping[str, Any]) -> None:
        self._skipped_round = event["round"]  # its round-finished follows

    def _round_finished(self, event: Mapping[str, Any]) -> None:
        self._of("rounds", "skipped" if event["round"] == self._skipped_round else "finished").inc()
        self._of("round_seconds").observe(event["seconds"])

    def _warning(self, event: Mapping[str, Any]) -> None:
        self._of("warnings").inc()


def _make(metric: Metric, registry: Any) -> Any:
    import prometheus_client

    options = {"buckets": _BUCKETS} if metric.kind == "Histogram" else {}
    make = getattr(prometheus_client, metric.kind)
    return make(PREFIX + metric.name, metric.text, ("run", *metric.labels), registry=registry, **options)


_HANDLERS: Mapping[str, Callable[[PrometheusSink, Mapping[str, Any]], None]] = {
    "run-started": PrometheusSink._run_started,
    "waiting-for-nodes": PrometheusSink._waiting,
    "node-joined": PrometheusSink._node_joined,
    "node-rejected": PrometheusSink._node_rejected,
    "round-started": PrometheusSink._round_started,
    "node-replied": PrometheusSink._node_replied,
    "node-dropped": PrometheusSink._node_dropped,
    "aggregated": PrometheusSink._aggregated,
    "evaluated": PrometheusSink._evaluated,
    "checkpointed": PrometheusSink._checkpointed,
    "checkpoint-failed": PrometheusSink._checkpoint_failed,
    "round-skipped": PrometheusSink._round_skipped,
    "round-finished": PrometheusSink._round_finished,
    "warning": PrometheusSink._warning,
}
