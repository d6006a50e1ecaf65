"""A Flower SuperLink of one's own: started for one simulation, gone without a trace afterwards.

``flwr run`` on its own starts a SuperLink that outlives the command and is shared by every project with the
same ``FLWR_HOME``, with the environment and working directory of its first user. A :class:`PrivateSuperLink`
keeps its own ``FLWR_HOME``, port and Ray folder instead, and talks to Flower only through its command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedllm.errors import FedLLMError
from fedllm.processes import (
    FLOWER_HOME,
    clean_up,
    command_name,
    of_home,
    terminate_with_exception,
    uninterrupted,
)

CONNECTION = "private"
COMPLETED = "finished:completed"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class SuperLinkError(FedLLMError):
    """Flower's SuperLink did not start, or refused a command."""


@dataclass(frozen=True)
class RunStatus:
    """What Flower says about a run: ``pending``, ``starting``, ``running`` or ``finished:<how>``."""

    status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether the run came to its regular end."""
        return self.status == COMPLETED


def executable(name: str) -> str:
    """Path of a command beside the running interpreter, virtual environment activated or not.

    Raises:
        SuperLinkError: it is neither there nor on the ``PATH``.
    """
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise SuperLinkError(
            f"the command {name!r} is neither in {beside.parent} nor on the PATH; "
            "install Flower with `pip install 'flwr[simulation]>=1.39,<1.40'`"
        )
    return found


class PrivateSuperLink:
    """Context manager around a ``flower-superlink`` in simulation mode.

    Args:
        startup_timeout: seconds until the SuperLink must answer.

    Raises:
        SuperLinkError: on entry, if it does not answer in time; the end of its log is part of the message.
    """

    def __init__(self, startup_timeout: float = 90.0) -> None:
        self._startup_timeout = startup_timeout
        self._home = Path()
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

    @property
    def home(self) -> Path:
        """The temporary ``FLWR_HOME``, which holds everything that Flower and Ray write."""
        return self._home

    def log(self) -> str:
        """What the SuperLink itself has printed so far, without colours."""
        path = self._home / "superlink.log"
        return _ANSI.sub("", path.read_text(errors="replace")) if path.is_file() else ""

    def start_run(self, app: Path, federation: Mapping[str, int | float]) -> str:
        """Start an app and return Flower's run id.

        Args:
            app: folder with the app's ``pyproject.toml``.
            federation: keys of ``flwr run --federation-config``, for example ``num-supernodes``.

        Raises:
            SuperLinkError: Flower refused the app.
        """
        settings = " ".join(f"{key}={value}" for key, value in federation.items())
        reply = self._flwr("run", str(app), CONNECTION, "--federation-config", settings)
        return str(reply["run-id"])

    def status(self, run_id: str) -> RunStatus:
        """Ask Flower how a run is doing.

        Flower needs most of a minute to notice that the process of the apps was killed; this sees it at once.
        """
        alive_before = self._apps_alive()
        run = self._flwr("list", CONNECTION, "--run-id", run_id)["runs"][0]
        if run["status"] == "running" and not alive_before and not self._apps_alive():
            return RunStatus(
                "finished:failed", "the process of the ServerApp was killed; was there too little memory?"
            )
        return RunStatus(run["status"], run["status-details"] if run["status-details"] != "N/A" else "")

    def app_log(self, run_id: str) -> str:
        """What the ServerApp and the simulated clients of a run have printed so far, without colours."""
        return _ANSI.sub("", self._run_flwr("log", run_id, CONNECTION, "--show").stdout)

    def stop_run(self, run_id: str) -> None:
        """Ask Flower to stop a run."""
        self._flwr("stop", run_id, CONNECTION)

    def _environment(self) -> dict[str, str]:
        binaries = str(Path(executable("flower-superlink")).parent)
        defaults = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        own = {
            FLOWER_HOME: str(self._home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": os.pathsep.join([binaries, os.environ.get("PATH", os.defpath)]),
            # A Ray folder of its own also keeps Flower from joining a Ray cluster that runs on this machine.
            "RAY_TMPDIR": str(self._home),
            "PYTHONUNBUFFERED": "1",
        }
        return {**defaults, **os.environ, **own}

    def _start(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "fedllm.processes", str(self._home)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.port = _free_port()
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        command = [
            executable("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(self.port), "--database", str(self._home / "state.db"),
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        with (self._home / "superlink.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment(),
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

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        result = self._run_flwr(*arguments, "--format", "json")
        reply = _last_json(result.stdout)
        if result.returncode == 0 and reply.get("success"):
            return reply
        reason = reply.get("error-message") or result.stderr or result.stdout
        raise SuperLinkError(f"`flwr {arguments[0]}` failed: {_ANSI.sub('', str(reason)).strip()}")

    def _run_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [executable("flwr"), *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # A session of its own: Ctrl-C at the terminal is for the caller, who decides what to stop.
            start_new_session=True,
            check=False,
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


def tail(text: str, lines: int = 20) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _short_temporary_folder() -> str:
    """The folder for temporary files, or ``/tmp`` if its name is too long for Ray.

    Ray keeps sockets 67 characters below, and the name of a socket has at most 107.
    """
    folder = tempfile.gettempdir()
    return folder if len(folder) + len("/fedllm-12345678") + 67 <= 107 else "/tmp"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object at the end of a command's output, which may start with remarks."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
