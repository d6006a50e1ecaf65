"""Flower's command line as functions: start, follow and stop runs on a SuperLink, and ask for its nodes.

Only commands are used, never Flower's modules: what they print as JSON is their interface.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from fedllm.errors import FedLLMError
from fedllm.processes import FLOWER_HOME

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


def pinned() -> Requirement:
    """The versions of Flower that fedllm is pinned to, as its own metadata tell them."""
    return next(found for found in map(Requirement, requires("fedllm") or []) if found.name == "flwr")


def is_newer(found: str, requirement: Requirement) -> bool:
    """Whether a version is beyond those that a requirement admits, and not before them."""
    refusing = [bound for bound in requirement.specifier if not bound.contains(found, prereleases=True)]
    return bool(refusing) and all(bound.operator in {"<", "<="} for bound in refusing)


def check_deployable() -> None:
    """Refuse a Flower whose SuperLink and SuperNodes are not those that fedllm deploys.

    Newer SuperNodes speak HTTP instead of gRPC: they would knock at a port where nobody answers, again and again.

    Raises:
        SuperLinkError: another version than the pinned ones is installed.
    """
    pin, found = pinned(), version("flwr")
    if not pin.specifier.contains(found, prereleases=True):
        raise SuperLinkError(
            f"Flower {found} is installed, but SuperLinks and nodes need {pin.specifier}, whose SuperNodes speak "
            f"gRPC: pip install '{pin}' on all of them"
        )


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
            f"install Flower with `pip install '{pinned()}'`"
        )
    return found


def environment(home: Path) -> dict[str, str]:
    """The environment of a Flower process with this ``FLWR_HOME``: quiet, Flower's commands on its path."""
    defaults = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    own = {
        FLOWER_HOME: str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join(
            [str(Path(executable("flower-superlink")).parent), os.environ.get("PATH", os.defpath)]
        ),
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **os.environ, **own}


class FlowerCommands:
    """The ``flwr`` commands of one connection.

    Args:
        home: ``FLWR_HOME``, whose ``config.toml`` has the connection.
        connection: its name there.
    """

    def __init__(self, home: Path, connection: str) -> None:
        self._home = home
        self.connection = connection

    @property
    def home(self) -> Path:
        """``FLWR_HOME`` of the commands."""
        return self._home

    def environment(self) -> dict[str, str]:
        """The environment in which Flower's commands run."""
        return environment(self._home)

    def start_run(self, app: Path, federation: Mapping[str, int | float] | None = None) -> str:
        """Start an app and return Flower's run id.

        Args:
            app: folder with the app's ``pyproject.toml``.
            federation: keys of ``flwr run --federation-config``, for example ``num-supernodes``; None in a deployment.

        Raises:
            SuperLinkError: Flower refused the app.
        """
        options = []
        if federation is not None:
            options = ["--federation-config", " ".join(f"{key}={value}" for key, value in federation.items())]
        return str(self.call("run", str(app), self.connection, *options)["run-id"])

    def status(self, run_id: str) -> RunStatus:
        """Ask Flower how a run is doing.

        Raises:
            SuperLinkError: the SuperLink cannot be asked, or does not know the run.
        """
        run = self.call("list", self.connection, "--run-id", run_id)["runs"][0]
        return RunStatus(run["status"], run["status-details"] if run["status-details"] != "N/A" else "")

    def app_log(self, run_id: str) -> str:
        """What the ServerApp (and simulated clients) of a run have printed so far, without colours."""
        return plain(self._run("log", run_id, self.connection, "--show").stdout)

    def stop_run(self, run_id: str) -> None:
        """Ask Flower to stop a run.

        Raises:
            SuperLinkError: Flower refused.
        """
        self.call("stop", run_id, self.connection)

    def call(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return what it prints as JSON.

        Raises:
            SuperLinkError: it failed; its reason is the message.
        """
        result = self._run(*arguments, "--format", "json")
        reply = _last_json(result.stdout)
        if result.returncode == 0 and reply.get("success"):
            return reply
        reason = reply.get("error-message") or result.stderr or result.stdout
        raise SuperLinkError(f"`flwr {arguments[0]}` failed: {plain(str(reason)).strip()}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [executable("flwr"), *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # A session of its own: Ctrl-C at the terminal is for the caller, who decides what to stop.
            start_new_session=True,
            check=False,
        )


def plain(text: str) -> str:
    """A text without terminal colours."""
    return _ANSI.sub("", text)


def tail(text: str, lines: int = 20) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object at the end of a command's output, which may start with remarks."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
