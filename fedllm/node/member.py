"""One supervised member of a local federation, the SuperLink or a node, with handles on its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from fedllm.errors import FedLLMError
from fedllm.flower import tail
from fedllm.node.superlink import SUPERLINK
from fedllm.node.supernode import LAUNCHER, SUPERNODE, WORKER
from fedllm.node.supervise import read_status
from fedllm.processes import FLOWER_HOME, command_name, of_home

STARTUP = 300.0
_SHUTDOWN = 30.0


class FederationError(FedLLMError):
    """A federation on this machine did not start, or a part of it is not there."""


class Member:
    """The SuperLink or one node of a federation: its supervisor and the processes that it keeps running.

    Args:
        folder: with its TOML file, named ``superlink.toml`` or ``node.toml``, and its ``state``.
        kind: ``superlink`` or ``node``, the command that supervises it.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.settings_file = folder / f"{kind}.toml"
        self.state = folder / "state"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the supervisor, which starts the rest; see :meth:`wait_until_ready`.

        Raises:
            FederationError: it runs already.
        """
        if self.supervisor is not None:
            raise FederationError(f"{self.folder.name} runs already, process {self.supervisor}")
        self.state.mkdir(parents=True, exist_ok=True)
        # In a session of its own and with its output in a file it outlives the command that starts it.
        with (self.state / "supervisor.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedllm", self.kind, str(self.settings_file)],
                env={**os.environ, FLOWER_HOME: str(self.homes[0])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, timeout: float = STARTUP) -> None:
        """Wait until every process of it is ready: the SuperLink answers, the node is connected.

        Raises:
            FederationError: it is not after ``timeout`` seconds, or its supervisor has ended; with its last words.
        """
        ends = time.monotonic() + timeout
        while True:
            parts = self.parts()
            if parts and all(part["state"] == "running" for part in parts.values()):
                return
            if self._process is not None and (code := self._process.poll()) is not None:
                raise FederationError(f"{self.folder.name} ended with code {code}:\n{self._words()}")
            if time.monotonic() > ends:
                raise FederationError(
                    f"{self.folder.name} is not ready after {timeout:g} s:\n{self._words()}"
                )
            time.sleep(0.2)

    def terminate(self) -> None:
        """Ask the supervisor to end everything that it has started; nothing happens if it does not run."""
        if (pid := self.supervisor) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).terminate()
        if self._process is not None:
            self._process.terminate()  # it may not have said yet that it runs

    def stop(self, timeout: float = _SHUTDOWN) -> None:
        """End the supervisor and everything that it has started, and wait until they are gone.

        Raises:
            FederationError: something is left after ``timeout`` seconds.
        """
        pid = self.supervisor
        self.terminate()
        ends = time.monotonic() + timeout
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        while (left := self.processes()) or (pid is not None and psutil.pid_exists(pid)):
            if time.monotonic() > ends:
                raise FederationError(f"{self.folder.name} did not stop within {timeout:g} s: {left or pid}")
            time.sleep(0.1)
        self._process = None

    def parts(self) -> dict[str, dict[str, Any]]:
        """What the supervisor says of its parts (:func:`~fedllm.node.supervise.read_status`); empty if it is down."""
        told = read_status(self.state)
        parts: Any = told["parts"] if told is not None else {}
        return dict(parts)

    @property
    def supervisor(self) -> int | None:
        """Process id of the supervisor; None if it does not run."""
        told = read_status(self.state)
        return int(str(told["pid"])) if told is not None else None

    def pid(self, part: str) -> int:
        """Process id of a part: ``superlink``, ``supernode`` or ``worker``.

        Raises:
            FederationError: it does not run now.
        """
        pid = self.parts().get(part, {}).get("pid")
        if pid is None:
            raise FederationError(f"{self.folder.name} has no running {part}")
        return int(pid)

    @property
    def homes(self) -> list[Path]:
        """By which ``FLWR_HOME`` its processes are known: the supervisor's, then those of its parts."""
        return [self.state / "home" / name for name in ("supervisor", SUPERLINK, SUPERNODE, LAUNCHER, WORKER)]

    def processes(self) -> list[psutil.Process]:
        """All processes that its parts have started, those of apps included; not the supervisor."""
        return [process for home in self.homes[1:] for process in of_home(home)]

    def app_process(self) -> psutil.Process | None:
        """The process of the ServerApp or ClientApp that runs now, if one does."""
        apps = ("flwr-serverapp", "flwr-clientapp")
        return next((process for process in self.processes() if command_name(process) in apps), None)

    def log(self, part: str) -> str:
        """What a part has printed, over all of its restarts; ``supervisor`` for the supervisor itself."""
        path = self.state / f"{part}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _words(self) -> str:
        return tail(self.log("supervisor")) or "it printed nothing"
