"""A node: the resident worker and Flower's SuperNode, kept running by a supervisor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tomli_w

from fedllm.errors import FedLLMError
from fedllm.flower import check_deployable, environment, executable
from fedllm.node.launcher import COMMAND, READY, write_command
from fedllm.node.settings import NodeSettings
from fedllm.node.supervise import Backoff, Part, Supervisor
from fedllm.processes import command_name, of_home
from fedllm.superlink import free_port

WORKER, LAUNCHER, SUPERNODE = "worker", "launcher", "supernode"
_HEALTH_TIMEOUT = 1.0
_TROUBLE_TIMEOUT = 10.0  # a worker that trains on all CPUs may be slow to answer
_ADVICE = {
    "[code: 2004]": "the SuperLink still counts a node that was killed a minute ago as online, and lets it in later; "
    "or it does not know the node's key, or has revoked it: `fedllm nodes register`",
    "Failed to initialize the connection": "`fedllm doctor --node` says what is wrong",
}
_CONNECTED = "SuperNode ID:"  # Flower prints it when the SuperLink has admitted the node
_TAKEN, _SENDING = "Received successfully", "Sending: "  # and these around its work on a message
_START_PAUSE = (
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # seconds between Flower's looks for an app to start, by default 1
)


def supervisor(
    settings: NodeSettings, *, backoff: Backoff | None = None, echo: Callable[[str], None] | None = None
) -> Supervisor:
    """The supervisor of a node; its :meth:`~Supervisor.run` returns after SIGTERM.

    Raises:
        SuperLinkError: Flower is not installed, or not in a version that can be deployed.
    """
    check_deployable()
    parts = [worker_part(settings), launcher_part(settings)] if settings.worker else []
    return Supervisor(
        f"node {settings.title}",
        [*parts, supernode_part(settings)],
        settings.state,
        backoff=backoff,
        echo=echo,
    )


def worker_part(settings: NodeSettings) -> Part:
    """The resident worker of a node."""
    command = [sys.executable, "-m", "fedllm.node.worker", "--socket", str(settings.socket)]
    if settings.worker_memory:
        command += ["--memory-limit", settings.worker_memory]
    if settings.metrics_port:
        command += ["--metrics-port", str(settings.metrics_port)]

    def ready(lines: Sequence[str]) -> bool:
        from fedllm.node import health

        try:
            health.ask(settings.socket, _HEALTH_TIMEOUT)
        except (FedLLMError, OSError):
            return False
        return True

    def trouble(lines: Sequence[str]) -> str:
        from fedllm.node import health

        try:
            health.ask(settings.socket, _TROUBLE_TIMEOUT)
        except (FedLLMError, OSError) as error:
            return str(error)
        return ""

    home = settings.state / "home" / WORKER
    surroundings = part_environment(home, settings.threads)
    return Part(WORKER, lambda: command, home, surroundings, ready, settings.state, trouble=trouble)


def launcher_part(settings: NodeSettings) -> Part:
    """What starts the SuperNode's ClientApps; without a resident worker they load so much that a fork gains little."""
    home = settings.state / "home" / LAUNCHER
    command = [sys.executable, "-m", "fedllm.node.launcher", "--socket", str(settings.launcher_socket)]
    return Part(
        LAUNCHER,
        lambda: command,
        home,
        part_environment(home, settings.threads),
        lambda lines: any(READY in line for line in lines),
        settings.state,
    )


def supernode_part(settings: NodeSettings) -> Part:
    """Flower's SuperNode, with what the node is told in a file beside its logs."""
    home, commands = settings.state / "home" / SUPERNODE, settings.state / "commands"
    surroundings = part_environment(home, settings.threads)
    if settings.worker:
        surroundings = {**surroundings, "PATH": os.pathsep.join((str(commands), surroundings["PATH"]))}

    def command() -> list[str]:
        if settings.worker:
            write_command(commands, settings.launcher_socket, executable(COMMAND))
        told = settings.state / "node-config.toml"
        told.write_text(tomli_w.dumps(settings.node_config()), encoding="utf-8")
        line = [
            executable("flower-supernode"),
            "--superlink", settings.superlink,
            "--root-certificates", str(settings.root_certificates),
            "--auth-supernode-private-key", str(settings.private_key),
            "--node-config", str(told),
            "--isolation", "subprocess",
            "--host", "127.0.0.1",
            "--port", str(settings.runtime_port or free_port()),
        ]  # fmt: skip
        if settings.health_address:
            line += ["--health-server-address", settings.health_address]
        return line

    return Part(
        SUPERNODE,
        command,
        home,
        surroundings,
        lambda lines: any(_CONNECTED in line for line in lines),
        settings.state,
        _ADVICE,
        lambda lines: stuck(lines, home),
    )


def stuck(lines: Sequence[str], home: Path) -> str:
    """What is wrong if a SuperNode waits for an answer that nobody works on; else empty.

    A SuperNode takes no further message, of any run, until the ClientApp has answered the last one. If that process
    ends without an answer at the wrong moment, it waits for ever and looks healthy.

    Args:
        lines: what it has printed.
        home: its ``FLWR_HOME``.
    """
    last = next((line for line in reversed(lines) if _TAKEN in line or _SENDING in line), "")
    if _TAKEN not in last or any(command_name(process) == COMMAND for process in of_home(home)):
        return ""
    return "it has taken a message, but no ClientApp works on it"


def part_environment(home: Path, threads: int) -> Mapping[str, str]:
    """Flower's environment for a part, with its number of CPU threads; 0: all CPUs."""
    limited = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {**environment(home), _START_PAUSE: "0.2", **limited}
