"""The resident worker of a node: keeps base models, tokenised data and the GPU's context between Flower's messages.

``python -m fedllm.node.worker --socket PATH`` runs it until SIGTERM. Jobs run in the main thread, one at a time, as
they would in a process of their own; gRPC's threads only let messages in and send answers.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import grpc
import psutil
import torch
from flwr.app import ConfigRecord, RecordDict
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedllm import __version__, client, interruption, kept, logs, models, token_cache
from fedllm.allocator import give_back_memory
from fedllm.errors import ConfigError, FedLLMError, WorkerError
from fedllm.mode_advice import parse_bytes
from fedllm.node.endpoint import bind, owned
from fedllm.node.health import WorkerHealth
from fedllm.node.jobs import JobQueue
from fedllm.node.messages import Job
from fedllm.node.service import WorkerService
from fedllm.node.surroundings import Surroundings
from fedllm.node.worker_pb2_grpc import add_WorkerServicer_to_server
from fedllm.processes import uninterrupted
from fedllm.records import CONFIG, SERVER_ROUND, records_of

log = logging.getLogger(__name__)

MAX_WAITING = 8
"""Messages that may wait for their turn; a node gets one at a time from each run."""

_OTHER_THREADS = 4  # for health, and for messages that are refused
_STOP_SECONDS = 2.0
_GPU_LOST = os.EX_TEMPFAIL


class Worker:
    """Answers messages until it is stopped.

    Args:
        memory_limit: bytes of models and examples that stay between jobs; None: ``model.cache-bundles`` alone decides.
        max_waiting: messages that may wait for their turn.

    Raises:
        ConfigError: the limit is not positive.
    """

    def __init__(self, memory_limit: int | None = None, max_waiting: int = MAX_WAITING) -> None:
        kept.limit_kept_bytes(memory_limit)
        self._memory_limit = memory_limit
        self._max_waiting = max_waiting
        self._jobs = JobQueue(max_waiting)
        self._surroundings = Surroundings()
        self._process = psutil.Process()
        self._started_at = time.time()
        self._done = self._failed = 0
        self._worked = 0.0
        self._current: tuple[str, float] | None = None

    def serve(self, socket: Path) -> None:
        """Listen on a Unix socket and do jobs in this thread until :meth:`stop`, or an exception such as SystemExit.

        Raises:
            WorkerError: another worker has the socket, or it cannot be used.
        """
        with owned(socket), ThreadPoolExecutor(self._max_waiting + 1 + _OTHER_THREADS, "worker") as threads:
            server = self._server(threads)
            try:
                bind(server, socket)
                server.start()
                log.info("fedllm %s, process %d, listens on %s", __version__, os.getpid(), socket)
                while self._jobs.run(self._do):
                    self._tidy()
            finally:
                with uninterrupted():
                    self._jobs.close()
                    server.stop(_STOP_SECONDS).wait()

    def stop(self) -> None:
        """Let :meth:`serve` return after the job that runs; those that wait are sent away."""
        self._jobs.close()

    def health(self) -> WorkerHealth:
        """How this worker is doing."""
        job, since = self._current or ("", 0.0)
        busy = time.monotonic() - since if job else 0.0
        return WorkerHealth(
            pid=os.getpid(),
            version=__version__,
            started_at=self._started_at,
            jobs_done=self._done,
            jobs_failed=self._failed,
            jobs_waiting=len(self._jobs),
            job=job,
            busy_seconds=busy,
            worked_seconds=self._worked + busy,
            resident_bytes=self._process.memory_info().rss,
            device_bytes=_gpu_bytes(),
            kept_bytes=kept.kept_bytes(),
            memory_limit=self._memory_limit or 0,
            models=tuple(bundle.label for bundle in models.BUNDLES.values()),
            model_loads=models.BUNDLES.loads,
            data_loads=token_cache.SETS.loads,
        )

    def _server(self, threads: ThreadPoolExecutor) -> grpc.Server:
        server = grpc.server(threads)
        add_WorkerServicer_to_server(WorkerService(self._jobs, self.health), server)  # type: ignore[no-untyped-call]
        service = grpc_health.HealthServicer()
        service.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        return server

    def _do(self, job: Job) -> RecordDict:
        if job.action not in client.ANSWERS:
            raise WorkerError(f"expected one of {', '.join(client.ANSWERS)}, found {job.action!r}")
        place = _place(job)
        text = ", ".join(
            [job.action, *(f"{name.replace('_id', '')} {value}" for name, value in place.items())]
        )
        started = time.monotonic()
        self._current = text, started
        try:
            with self._surroundings.around(job.folder, job.module_folders):
                answer = client.ANSWERS[job.action](job.message, job.context).content
        except Exception as error:
            self._failed += 1
            seconds = time.monotonic() - started
            expected = isinstance(error, FedLLMError)
            log.error(
                "%s: failed after %.2f s: %s: %s", text, seconds, type(error).__name__, error,
                exc_info=None if expected else error, extra={**place, "phase": job.action},
            )  # fmt: skip
            raise
        else:
            self._done += 1
            log.info("%s: %.2f s", text, time.monotonic() - started, extra={**place, "phase": job.action})
            return answer
        finally:
            self._worked += time.monotonic() - started
            self._current = None

    def _tidy(self) -> None:
        """Give back what the job has left, after its answer has gone out.

        Raises:
            SystemExit: an error of the GPU has made it useless to this process; another one must take over.
        """
        gc.collect()
        give_back_memory()
        if _on_gpu():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                log.critical("the GPU no longer answers this process, which therefore ends: %s", error)
                raise SystemExit(_GPU_LOST) from error


def _place(job: Job) -> dict[str, str | int]:
    """Run, round and node of a job, as log lines have them."""
    place: dict[str, str | int] = {"run_id": str(job.context.run_id)}
    number = records_of(job.message, ConfigRecord).get(CONFIG, ConfigRecord()).get(SERVER_ROUND)
    if isinstance(number, int):
        place["round"] = number
    return {**place, "node": client.node_name(job.context)}


def _on_gpu() -> bool:
    """Whether this process has a context on a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _gpu_bytes() -> int:
    if not _on_gpu():
        return 0
    return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))


def _leave_on_signals(worker: Worker) -> None:
    def leave(number: int, frame: FrameType | None) -> None:
        # An exception gets lost if it comes in a finaliser: then the job ends at its next batch, and there is no other.
        worker.stop()
        interruption.interrupt()
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def _size(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else int(parse_bytes(text))
    except ConfigError:
        raise argparse.ArgumentTypeError(f"expected bytes or a size such as 8GB, found {text!r}") from None


def main() -> None:
    """Run a worker in the foreground; SIGTERM and SIGINT end it with exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m fedllm.node.worker", description=main.__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    parser.add_argument(
        "--memory-limit", type=_size, help="memory for models and examples between jobs, for example 8GB"
    )
    parser.add_argument("--metrics-port", type=int, help="port of Prometheus metrics on this machine")
    arguments = parser.parse_args()
    faulthandler.enable()
    logs.set_up("%(asctime)s %(levelname)s %(message)s")
    for name in (
        __name__,
        kept.__name__,
    ):  # client.py asks for warnings only, as fits a process for one message
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        with ExitStack() as stack:
            worker = Worker(arguments.memory_limit)
            _leave_on_signals(worker)
            if arguments.metrics_port is not None:
                from fedllm.node.metrics import serve_worker_metrics

                stack.callback(serve_worker_metrics(arguments.metrics_port, worker.health))
            worker.serve(arguments.socket)
    except FedLLMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    from fedllm.node import worker  # under its own name, which the logger has

    worker.main()
