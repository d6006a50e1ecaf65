"""Hand a Flower message to the node's resident worker; nothing heavy is imported: each starts a process."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from flwr.app import Context, Message, RecordDict

from fedllm import errors
from fedllm.errors import ConfigError, FedLLMError, WorkerError
from fedllm.node.endpoint import connect
from fedllm.node.frames import from_frames, to_frames
from fedllm.node.messages import Packed, pack_job, unpack_answer
from fedllm.node.worker_pb2 import Failure, Frame
from fedllm.node.worker_pb2_grpc import WorkerStub

WORKER_SOCKET = "worker-socket"
"""Key of a node's ``--node-config``: path of the socket; without it messages are answered in Flower's process."""
WORKER_TIMEOUT = "worker-timeout"
"""Key of a node's ``--node-config``: seconds to wait for a worker that is not there."""
_DEFAULT_TIMEOUT = 60.0
_PAUSE = 0.2


class _NotBegunError(Exception):
    """The worker went away before it began with the message; another one may do it."""


def forward(action: str, message: Message, context: Context) -> Message:
    """Let the worker answer a message.

    A worker that is not there is waited for, also if it went away before it began; one that ends in the middle of a
    message is not, because the next one might end the same way.

    Args:
        action: ``describe``, ``train`` or ``evaluate``.
        message: from the server.
        context: of the node; its configuration has :data:`WORKER_SOCKET`.

    Raises:
        WorkerError: no worker came up in time, it ended in the middle, or it is of another version.
        ConfigError: :data:`WORKER_TIMEOUT` is not a positive number.
        FedLLMError: what :mod:`fedllm.client` raised in the worker.
    """
    socket = Path(str(context.node_config[WORKER_SOCKET]))
    patience = _patience(context)
    packed = pack_job(action, message, context)
    end = time.monotonic() + message.metadata.ttl
    with connect(socket) as channel:
        while True:
            try:
                content = _attempt(channel, socket, packed, action, end - time.monotonic())
                return Message(content, reply_to=message)
            except _NotBegunError:
                time.sleep(_PAUSE)
                _wait_for(channel, socket, patience)


def _attempt(channel: grpc.Channel, socket: Path, packed: Packed, action: str, seconds: float) -> RecordDict:
    started, pid = time.monotonic(), 0
    stub = WorkerStub(channel)  # type: ignore[no-untyped-call]
    try:
        frames: Iterator[Frame] = stub.Run(to_frames(packed), timeout=max(seconds, 0.0))
        for frame in frames:
            kind = frame.WhichOneof("kind")
            if kind == "started":
                pid = frame.started.pid
            elif kind == "failure":
                raise _error_of(frame.failure)
            else:
                return unpack_answer(*from_frames(itertools.chain([frame], frames)))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not pid:
            raise _NotBegunError from None
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise WorkerError(
                f"the worker at {socket} did not finish {action} within the {seconds:.0f} s that the message lives"
            ) from None
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise WorkerError(f"the worker at {socket} broke off {action}: {error.details()}") from None
    raise WorkerError(
        f"the worker at {socket} (process {pid}) ended {time.monotonic() - started:.1f} s after it had begun with "
        f"{action}: it was killed, crashed or ran out of memory, its log says more; its supervisor restarts it, and "
        "the next message goes to the new one"
    )


def _error_of(failure: Failure) -> Exception:
    """The exception that the worker met, as if it had been raised here."""
    if failure.retry:
        return _NotBegunError(failure.reason)
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, FedLLMError):
        return kind(failure.reason)
    return WorkerError(f"{failure.kind}: {' '.join(failure.reason.split())}")


def _wait_for(channel: grpc.Channel, socket: Path, seconds: float) -> None:
    ready = grpc.channel_ready_future(channel)
    try:
        ready.result(timeout=seconds)
    except grpc.FutureTimeoutError:
        raise WorkerError(
            f"no worker answered on {socket} within {seconds:g} s ({_found(socket)}); start the node with "
            f"`fedllm node`, or a worker with `python -m fedllm.node.worker --socket {socket}`, or take "
            f"{WORKER_SOCKET} out of the node-config to train in Flower's own process; {WORKER_TIMEOUT} sets the "
            "seconds to wait"
        ) from None
    finally:
        ready.cancel()


def _found(socket: Path) -> str:
    if not socket.exists():
        return "there is no such socket"
    if not os.access(socket, os.R_OK | os.W_OK):
        return "the socket belongs to another user"
    return "nobody listens on the socket"


def _patience(context: Context) -> float:
    value = context.node_config.get(WORKER_TIMEOUT, _DEFAULT_TIMEOUT)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{WORKER_TIMEOUT} in the node-config is {value!r}, expected seconds above 0")
    return float(value)
