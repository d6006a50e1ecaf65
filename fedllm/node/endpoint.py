"""The Unix socket of a worker: who may use it, who owns it, how to reach it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket as stream
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from fedllm.errors import WorkerError

_PATH_BYTES = 107  # that Linux allows for the name of a Unix socket
# Pauses between attempts. The least one is left as it is: it also bounds how long one attempt may take.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


def address(socket: Path) -> str:
    """The socket as gRPC wants it.

    Raises:
        WorkerError: the path is too long for a Unix socket.
    """
    path = str(socket.absolute())
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise WorkerError(
            f"the socket {path} has {len(os.fsencode(path))} bytes in its path, Linux allows {_PATH_BYTES}; "
            "choose a shorter folder"
        )
    return f"unix:{path}"


def connect(socket: Path) -> grpc.Channel:
    """A channel to the worker, which need not be there yet; it is looked for twice a second or more.

    Raises:
        WorkerError: the path is too long for a Unix socket.
    """
    return grpc.insecure_channel(address(socket), options=_RECONNECT)


@contextmanager
def owned(socket: Path) -> Iterator[None]:
    """Own a socket's path: no other worker has it, what a dead one left is gone, and so is ours in the end.

    A folder that is not there is made with mode 0700.

    Raises:
        WorkerError: a live worker has the path, something else than a socket is there, or the folder is unusable.
    """
    address(socket)
    try:
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(socket)
    except OSError as error:
        raise WorkerError(f"the folder of the socket {socket} cannot be used: {error}") from error
    try:
        if socket.exists() and not stat.S_ISSOCK(socket.stat().st_mode):
            raise WorkerError(f"{socket} is there and no socket; choose another path, or remove it")
        socket.unlink(missing_ok=True)
        try:
            yield
        finally:
            socket.unlink(missing_ok=True)
    finally:
        _lock_path(socket).unlink(missing_ok=True)
        os.close(lock)


def bind(server: grpc.Server, socket: Path) -> None:
    """Let a gRPC server listen on an owned socket, which only this user can open.

    Raises:
        WorkerError: the system does not let it.
    """
    try:
        with _for_this_user():
            server.add_insecure_port(address(socket))
    except RuntimeError as error:
        raise WorkerError(f"the worker cannot listen on {socket}: {error}") from error


def listen(socket: Path) -> stream.socket:
    """Listen on an owned socket without gRPC; only this user can open it."""
    listener = stream.socket(stream.AF_UNIX)
    with _for_this_user():
        listener.bind(str(socket))
    listener.listen()
    return listener


@contextmanager
def _for_this_user() -> Iterator[None]:
    """Sockets that are made inside have mode 0600: there is no moment in which others could open them."""
    umask = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(umask)


def _lock_path(socket: Path) -> Path:
    return socket.with_name(f"{socket.name}.lock")


def _lock(socket: Path) -> int:
    """The descriptor of a lock that the kernel takes back however its owner ends."""
    path = _lock_path(socket)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace") or "?"
            os.close(descriptor)
            raise WorkerError(
                f"a worker (process {owner}) has the socket {socket} already; stop it, or choose another path"
            ) from None
        # The owner before may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)
