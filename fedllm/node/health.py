"""How a worker is doing, asked from another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from fedllm.errors import WorkerError
from fedllm.node.endpoint import connect
from fedllm.node.worker_pb2 import HealthReply, HealthRequest
from fedllm.node.worker_pb2_grpc import WorkerStub


@dataclass(frozen=True)
class WorkerHealth:
    """What a worker says of itself.

    Attributes:
        pid: its process.
        version: of fedllm.
        started_at: Unix time in seconds.
        jobs_done: messages answered.
        jobs_failed: messages that ended in an error.
        jobs_waiting: messages that wait for their turn.
        job: what it does now, for people; empty when idle.
        busy_seconds: how long it has been at it; 0 when idle.
        worked_seconds: time spent in jobs since the start, the one that runs included.
        resident_bytes: memory of the process.
        device_bytes: memory of GPUs that torch holds.
        kept_bytes: base models and tokenised examples that stay between jobs.
        memory_limit: of these; 0: none.
        models: those that are loaded, the one used last at the end.
        model_loads: models loaded since the start.
        data_loads: sets of examples read or tokenised since the start.
    """

    pid: int
    version: str
    started_at: float
    jobs_done: int = 0
    jobs_failed: int = 0
    jobs_waiting: int = 0
    job: str = ""
    busy_seconds: float = 0.0
    worked_seconds: float = 0.0
    resident_bytes: int = 0
    device_bytes: int = 0
    kept_bytes: int = 0
    memory_limit: int = 0
    models: tuple[str, ...] = ()
    model_loads: int = 0
    data_loads: int = 0


def to_reply(health: WorkerHealth) -> HealthReply:
    """The message of a worker's health."""
    return HealthReply(**vars(health))


def ask(socket: Path, timeout: float = 5.0) -> WorkerHealth:
    """Ask the worker behind a socket.

    Args:
        socket: its path.
        timeout: seconds that it may take.

    Raises:
        WorkerError: no worker is there, or it does not answer in time.
    """
    with connect(socket) as channel:
        stub = WorkerStub(channel)  # type: ignore[no-untyped-call]
        try:
            reply: HealthReply = stub.Health(HealthRequest(), timeout=timeout)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = f"did not answer within {timeout:g} s"
            else:
                reason = f"cannot be reached: {error.details()}"
            raise WorkerError(f"the worker at {socket} {reason}") from None
    values = {field.name: getattr(reply, field.name) for field in reply.DESCRIPTOR.fields}
    return WorkerHealth(**{**values, "models": tuple(reply.models)})
