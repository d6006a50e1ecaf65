"""Metrics of a node's resident worker for a Prometheus server to scrape; asked of the worker at every scrape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fedllm.metrics import new_registry, serve

if TYPE_CHECKING:
    from fedllm.node.health import WorkerHealth

logger = logging.getLogger(__name__)

PREFIX = "fedllm_worker_"


def serve_worker_metrics(port: int, health: Callable[[], WorkerHealth]) -> Callable[[], None]:
    """Answer ``GET /metrics`` with what the worker says of itself, until the returned function is called.

    Args:
        port: TCP port; the address to bind is ``FEDLLM_METRICS_HOST``, or else 127.0.0.1.
        health: asks the worker; called at every scrape. While it raises, only ``fedllm_worker_up 0`` is shown.

    Raises:
        FedLLMError: the package ``prometheus-client`` is not installed, or the address cannot be bound.
    """
    registry = new_registry()
    # A collector is any object with `collect`; prometheus-client has no base class that needs no import.
    registry.register(_WorkerCollector(health))
    return serve(registry, port)


class _WorkerCollector:
    """Turns one answer of the worker into metrics."""

    def __init__(self, health: Callable[[], WorkerHealth]) -> None:
        self._health = health

    def describe(self) -> Iterable[Any]:
        """No metric is declared ahead, so that registering does not ask a worker that is still starting."""
        return ()

    def collect(self) -> Iterable[Any]:
        """The metrics of this moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            health = self._health()
        except Exception as error:
            logger.warning("the worker does not tell its health: %s", error)
            yield GaugeMetricFamily(PREFIX + "up", "Whether the worker answers.", 0)
            return
        yield GaugeMetricFamily(PREFIX + "up", "Whether the worker answers.", 1)
        info = GaugeMetricFamily(
            PREFIX + "info", "Always 1: the worker's version and process.", labels=["version", "pid"]
        )
        info.add_metric([health.version, str(health.pid)], 1)
        yield info
        yield GaugeMetricFamily(
            PREFIX + "start_time_seconds", "Unix time of the worker's start.", health.started_at
        )
        jobs = CounterMetricFamily(
            PREFIX + "jobs", "Messages answered, by outcome: done or failed.", labels=["outcome"]
        )
        jobs.add_metric(["done"], health.jobs_done)
        jobs.add_metric(["failed"], health.jobs_failed)
        yield jobs
        for name, text, value in (
            ("worked_seconds", "Time spent in jobs since the worker's start.", health.worked_seconds),
            ("model_loads", "Base models loaded since the worker's start.", health.model_loads),
            ("data_loads", "Sets of examples read since the worker's start.", health.data_loads),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value)
        for name, text, value in (
            ("job_seconds", "How long the present job has been running; 0 when idle.", health.busy_seconds),
            ("jobs_waiting", "Messages that wait for their turn.", health.jobs_waiting),
            ("resident_bytes", "Memory of the worker's process.", health.resident_bytes),
            ("device_bytes", "Memory of GPUs that the worker holds.", health.device_bytes),
            ("kept_bytes", "Base models and examples that stay between jobs.", health.kept_bytes),
            ("memory_limit_bytes", "Limit of what stays between jobs; 0: none.", health.memory_limit),
            ("models", "Base models held in memory, one for each quantisation.", len(health.models)),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value)
