"""Start Flower's ClientApps by forking: Python and Flower's imports, a second and more a message, are paid once.

Flower starts the command ``flwr-clientapp`` for every message. On a node, a small program of that name comes first on
the SuperNode's path (:func:`write_command`). It passes its arguments, environment and open files to this process, which
has imported Flower and forks; the child runs Flower's own command. The program stays, stands for the child, passes
signals on and ends with the child's exit code. Where this process cannot be reached it runs Flower's command itself.

``python -m fedllm.node.launcher --socket PATH`` runs it until SIGTERM. It has a single thread, so that a fork finds no
lock that another one holds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedllm.node.endpoint import listen, owned

COMMAND = "flwr-clientapp"
READY = "ready to start ClientApps"
_LARGEST = 1 << 20  # bytes of arguments and environment
_SHIM = '''#!{python} -SE
"""{command} by fedllm.node.launcher, which has imported Flower already."""
import json, os, signal, socket, sys

connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect({socket!r})
except OSError:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
job = json.dumps({{"argv": [{real!r}, *sys.argv[1:]], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(connection, [len(job).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(job)
code = connection.recv(1)
sys.exit(code[0] if code else 1)
'''


def write_command(folder: Path, address: Path, real: str) -> Path:
    """Write the program that stands for Flower's command.

    Args:
        folder: to come first on the path of a SuperNode; made if it does not exist.
        address: socket of the launcher.
        real: path of Flower's command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / COMMAND
    fresh = path.with_suffix(".new")
    fresh.write_text(
        _SHIM.format(python=sys.executable, command=COMMAND, socket=str(address), real=real), encoding="utf-8"
    )
    fresh.chmod(0o700)
    fresh.replace(path)
    return path


@dataclass
class Child:
    """A ClientApp that runs.

    Attributes:
        pid: its process.
        handle: pid file descriptor, readable once it has ended.
        connection: to the program that stands for it.
    """

    pid: int
    handle: int
    connection: socket.socket


class Launcher:
    """Forks a child for every connection.

    Args:
        listener: socket on which the program that stands for the command connects.
        command: what a child runs, with ``sys.argv`` set.
    """

    def __init__(self, listener: socket.socket, command: Callable[[], Any]) -> None:
        self._command = command
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._children: list[Child] = []
        self._listener = listener
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """Serve until :meth:`stop`, then end the children."""
        while not self._stopping:
            for key, _ in self._selector.select(0.5):
                key.data()
        for child in list(self._children):
            self._kill(child)

    def stop(self) -> None:
        """Let :meth:`run` return; fit for a signal handler."""
        self._stopping = True

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        try:
            job, files = _receive(connection)
        except (OSError, ValueError):  # the program has ended, or somebody else knocked
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            for mine in (self._listener, connection, *(other.connection for other in self._children)):
                mine.close()  # else nobody would see that the launcher has closed them
            _become(job, files, self._command)
        for file in files:
            os.close(file)
        child = Child(pid, os.pidfd_open(pid), connection)
        self._children.append(child)
        self._selector.register(child.handle, selectors.EVENT_READ, lambda: self._ended(child))
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._told(child))

    def _told(self, child: Child) -> None:
        """Pass a signal on; a connection that has ended means that nobody wants the child any more."""
        if child not in self._children:  # it ended in the same moment
            return
        try:
            number = child.connection.recv(1)
        except OSError:
            number = b""
        if number:
            signal.pidfd_send_signal(child.handle, number[0])
        else:
            self._kill(child)

    def _kill(self, child: Child) -> None:
        signal.pidfd_send_signal(child.handle, signal.SIGKILL)
        self._ended(child)

    def _ended(self, child: Child) -> None:
        if child not in self._children:  # it was killed in the same moment
            return
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._selector.unregister(child.handle)
        self._selector.unregister(child.connection)
        with suppress(OSError):  # the program is gone, and with it whoever wanted to know
            child.connection.send(bytes([code if code >= 0 else 128 - code]))
        child.connection.close()
        os.close(child.handle)
        self._children.remove(child)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a child is to run, and its standard files."""
    connection.settimeout(5.0)
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    size = int.from_bytes(head, "big")
    if len(head) != 4 or len(files) != 3 or size > _LARGEST:
        for file in files:
            os.close(file)
        raise ValueError("not a request of the command")
    data = b""
    while len(data) < size:
        if not (more := connection.recv(size - len(data))):
            raise ValueError("the command ended")
        data += more
    connection.settimeout(None)
    return json.loads(data), files


def _become(job: dict[str, Any], files: list[int], command: Callable[[], Any]) -> None:
    """Run the command in the forked child, as if it had been started; does not return."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        for standard, file in enumerate(files):
            os.dup2(file, standard)
            os.close(file)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.argv = job["argv"]
        code = _exit_code(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        result = command()
    except SystemExit as end:
        result = end.code
    if isinstance(result, str):
        print(result, file=sys.stderr)
        return 1
    return int(result or 0)


def _loaded(name: str) -> Callable[[], Any]:
    """Flower's command by the name under which it is installed, with all that it imports."""
    (found,) = entry_points(group="console_scripts", name=name)
    command: Callable[[], Any] = found.load()
    return command


def main() -> None:
    """Run a launcher."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    options = parser.parse_args()
    command = _loaded(COMMAND)
    import_module("fedllm.client_app")
    gc.freeze()  # a child that collects garbage would copy the pages of all that is imported
    with owned(options.socket), listen(options.socket) as listener:
        launcher = Launcher(listener, command)
        signal.signal(signal.SIGTERM, lambda number, frame: launcher.stop())
        print(READY, flush=True)
        launcher.run()


if __name__ == "__main__":
    main()
