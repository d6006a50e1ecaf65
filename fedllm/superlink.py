"""A Flower SuperLink of one's own: started for one simulation, gone without a trace afterwards.

``flwr run`` on its own starts a SuperLink that outlives the command and is shared by every project with the
same ``FLWR_HOME``, with the environment and working directory of its first user. A :class:`PrivateSuperLink`
keeps its own ``FLWR_HOME``, port and Ray folder instead, and talks to Flower only through its command line.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from fedllm import flower
from fedllm.flower import RunStatus, SuperLinkError, tail
from fedllm.processes import (
    clean_up,
    command_name,
    of_home,
    start_guard,
    terminate_with_exception,
    uninterrupted,
)

CONNECTION = "private"


class PrivateSuperLink(flower.FlowerCommands):
    """Context manager around a ``flower-superlink`` in simulation mode.

    Args:
        startup_timeout: seconds until the SuperLink must answer.
        ray_address: HOST:PORT of a Ray cluster in which simulated clients run; None: one of its own on this machine.

    Raises:
        SuperLinkError: on entry, if it does not answer in time; the end of its log is part of the message.
    """

    def __init__(self, startup_timeout: float = 90.0, ray_address: str | None = None) -> None:
        super().__init__(Path(), CONNECTION)
        self._ray_address = ray_address
        self._startup_timeout = startup_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._signals = contextlib.ExitStack()
        self.port = 0

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="fedllm-", dir=_short_temporary_folder()))
        self._signals.enter_context(terminate_with_exception())
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def log(self) -> str:
        """What the SuperLink itself has printed so far, without colours."""
        path = self._home / "superlink.log"
        return flower.plain(path.read_text(errors="replace")) if path.is_file() else ""

    def status(self, run_id: str) -> RunStatus:
        """Ask Flower how a run is doing.

        Flower needs most of a minute to notice that the process of the apps was killed; this sees it at once.
        """
        alive_before = self._apps_alive()
        status = super().status(run_id)
        if status.status == "running" and not alive_before and not self._apps_alive():
            return RunStatus(
                "finished:failed", "the process of the ServerApp was killed; was there too little memory?"
            )
        return status

    def environment(self) -> dict[str, str]:
        """Flower's environment, with a Ray folder of its own or the address of the cluster that Ray shall join."""
        told = super().environment()
        # Flower lets Ray choose: it joins the cluster of this variable, or one that its folder tells of.
        told.pop("RAY_ADDRESS", None)
        own = {"RAY_TMPDIR": str(self._home)}
        return {**told, **({"RAY_ADDRESS": self._ray_address} if self._ray_address else own)}

    def _start(self) -> None:
        self._guard = start_guard(self._home)
        self.port = free_port()
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        command = [
            flower.executable("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(self.port), "--database", str(self._home / "state.db"),
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        with (self._home / "superlink.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_healthy()

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._startup_timeout
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise SuperLinkError(
                    f"flower-superlink exited with code {code} while starting:\n{tail(self.log())}"
                )
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise SuperLinkError(
            f"flower-superlink did not answer on 127.0.0.1:{self.port} within {self._startup_timeout:g} s:\n"
            f"{tail(self.log())}"
        )

    def _apps_alive(self) -> bool:
        return any(command_name(process) == "flwr-simulation" for process in of_home(self._home))

    def _stop(self) -> None:
        with uninterrupted():
            clean_up(self._home)
            for process in (self._process, self._guard):
                if process is not None:
                    process.communicate()
        self._signals.close()


def _short_temporary_folder() -> str:
    """The folder for temporary files, or ``/tmp`` if its name is too long for Ray.

    Ray keeps sockets 67 characters below, and the name of a socket has at most 107.
    """
    folder = tempfile.gettempdir()
    return folder if len(folder) + len("/fedllm-12345678") + 67 <= 107 else "/tmp"


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
