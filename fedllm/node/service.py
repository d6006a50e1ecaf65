"""What the worker's gRPC server does in its threads: let messages in, wait for their turn, send answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import grpc

from fedllm.errors import WorkerError
from fedllm.node.frames import failure, from_frames, to_frames
from fedllm.node.health import WorkerHealth, to_reply
from fedllm.node.jobs import JobQueue, StoppingError, Ticket
from fedllm.node.messages import pack_answer, unpack_job
from fedllm.node.worker_pb2 import Failure, Frame, HealthReply, HealthRequest, Started
from fedllm.node.worker_pb2_grpc import WorkerServicer


class WorkerService(WorkerServicer):
    """The service of ``worker.proto``.

    Args:
        jobs: where messages wait.
        health: tells how the worker is doing.
    """

    def __init__(self, jobs: JobQueue, health: Callable[[], WorkerHealth]) -> None:
        self._jobs, self._health = jobs, health

    def Run(self, request_iterator: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        """Do one job; a client that goes away takes its job along."""
        try:
            ticket = self._jobs.put(unpack_job(*from_frames(request_iterator)))
        except WorkerError as error:
            yield failure(error, retry=isinstance(error, StoppingError))
            return
        if not context.add_callback(lambda: self._jobs.cancel(ticket)):
            self._jobs.cancel(ticket)
            return
        yield from _answer(ticket)

    def Health(self, request: HealthRequest, context: grpc.ServicerContext) -> HealthReply:
        """Tell how the worker is doing, also while a job runs."""
        return to_reply(self._health())


def _answer(ticket: Ticket) -> Iterator[Frame]:
    ticket.wait_for_turn()
    if ticket.begun:
        yield Frame(started=Started(pid=os.getpid()))
    ticket.wait()
    if ticket.failure is None:
        yield from to_frames(pack_answer(ticket.answer))
    else:
        kind, reason = ticket.failure
        yield Frame(failure=Failure(kind=kind, reason=reason, retry=not ticket.begun))
