"""`fedllm run`: check an app as `fedllm simulate` does, run it on a federation, and tell the truth at the end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedllm import simulate
from fedllm.app_config import parse_overrides, read_app, stage
from fedllm.config import RunConfig, RunSection
from fedllm.errors import ConfigError
from fedllm.flower import RunStatus
from fedllm.node.connection import FederationFolder
from fedllm.simulate import INTERRUPTED, Job
from fedllm.watch import Display, Outcome, watch

_LOG_INTERVAL = 5.0


@dataclass(frozen=True)
class DeployedJob:
    """A run that has been checked and can start on a federation."""

    job: Job
    federation: FederationFolder
    online: int


def prepare(
    folder: Path,
    federation: Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    resume: str | None = None,
    rounds: int | None = None,
) -> DeployedJob:
    """Read and check an app's configuration for a federation; nothing is started or written.

    Args:
        folder: the app.
        federation: folder of the federation.
        overrides: ``-c`` values.
        name: name of the run; else as for a simulation.
        resume: name of an earlier run to go on with.
        rounds: number of rounds, in place of ``rounds``.

    Raises:
        ConfigError: as for a simulation; or no node is online, or fewer are registered than server.min-nodes asks for.
        SuperLinkError: the SuperLink cannot be reached.
    """
    connection = FederationFolder(federation)
    admitted = [node for node in connection.nodes() if node.status != "unregistered"]
    online = sum(node.status == "online" for node in admitted)
    if not online:
        raise ConfigError(
            f"none of the {len(admitted)} registered nodes is online; `fedllm status` shows them, and "
            "`fedllm doctor --node node.toml` on a node says why it cannot connect"
        )
    if connection.local:
        job = simulate.prepare(folder, overrides, name=name, resume=resume, rounds=rounds, nodes=online)
    else:
        job = simulate.prepare(folder, overrides, name=resume or name, rounds=rounds, nodes=online)
        job = replace(job, config=_on_the_server(job.config, folder, overrides, resume is not None))
    _check(job.config, len(admitted))
    return DeployedJob(replace(job, command=f"fedllm run -f {federation}"), connection, online)


def run(deployed: DeployedJob, console: Console, *, quiet: bool = False, detach: bool = False) -> int:
    """Start a run, follow it, and return the exit code: 0 only if the run really finished.

    Args:
        deployed: from :func:`prepare`.
        console: where progress goes.
        quiet: print errors and the closing lines only.
        detach: return as soon as Flower has accepted the run.
    """
    job, federation = deployed.job, deployed.federation
    run_id = start(deployed)
    if not quiet or detach:
        console.print(
            f"run {run_id} ({job.config.run.name}) on {deployed.online} nodes", markup=False, soft_wrap=True
        )
    if detach:
        return 0
    starting = f"starting the run on {deployed.online} nodes …"
    try:
        if not federation.local:
            return _follow_log(federation, run_id, console, quiet)
        outcome = watch(federation, run_id, job.run_dir, Display(console, quiet, starting))
    except KeyboardInterrupt:
        where = f" -f {federation.home}"
        console.print(
            f"the run goes on; stop it with: fedllm stop {run_id}{where}", markup=False, soft_wrap=True
        )
        return INTERRUPTED
    return _tell(job, federation, run_id, outcome, console)


def start(deployed: DeployedJob) -> str:
    """Hand a run to the SuperLink and return Flower's id of it.

    Raises:
        SuperLinkError: Flower refused it.
    """
    job, federation = deployed.job, deployed.federation
    with tempfile.TemporaryDirectory(prefix="fedllm-app-") as folder:
        run_id = federation.start_run(stage(job.app, job.config, Path(folder) / "app"))
    federation.remember_run(run_id, job.run_dir)
    return run_id


def _tell(job: Job, federation: FederationFolder, run_id: str, outcome: Outcome, console: Console) -> int:
    log = simulate.save_log(federation, run_id, job.run_dir, "see the log of the SuperLink")
    if outcome.good:
        simulate.print_results(job, outcome.history, console)
        return 0
    simulate.print_failure(job, outcome, log)
    return 1


def _follow_log(federation: FederationFolder, run_id: str, console: Console, quiet: bool) -> int:
    """Show what a run on another machine prints; Flower's word is all that is known of its end."""
    shown = 0
    while True:
        status: RunStatus = federation.status(run_id)
        lines = federation.app_log(run_id).splitlines()
        if not quiet:
            for line in lines[shown:]:
                console.print(line, markup=False, soft_wrap=True)
            shown = len(lines)
        if status.finished:
            break
        time.sleep(_LOG_INTERVAL)
    style = "bold green" if status.completed else "bold red"
    console.print(Text(f"{status.status} {status.details}".strip(), style=style))
    return 0 if status.completed else 1


def _on_the_server(config: RunConfig, folder: Path, overrides: Sequence[str], resume: bool) -> RunConfig:
    """The configuration with run.root as it was written: it counts from the SuperLink's folder, not from here."""
    given = {**read_app(folder).config, **parse_overrides(overrides)}
    root = str(given.get("run.root", RunSection().root))
    return config.model_copy(update={"run": config.run.model_copy(update={"root": root, "resume": resume})})


def _check(config: RunConfig, admitted: int) -> None:
    if config.attack != "none":
        raise ConfigError("attack: deployed nodes never attack; try a defence with `fedllm simulate`")
    if config.server.min_nodes > admitted:
        raise ConfigError(
            f"server.min-nodes is {config.server.min_nodes}, but only {admitted} nodes are registered: the run would "
            "wait for nodes that never come; register more, or lower min-nodes"
        )
