"""`fedllm simulate`: check everything, run the app on a private SuperLink, and tell the truth at the end."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm import __version__, registry
from fedllm.app_config import App, read_app, read_saved, resolve, stage
from fedllm.config import RunConfig, Scalar
from fedllm.errors import ConfigError
from fedllm.flower import FlowerCommands, tail
from fedllm.history import RunHistory
from fedllm.narration import format_seconds, format_value
from fedllm.ray_cluster import RayCluster, ask
from fedllm.superlink import PrivateSuperLink
from fedllm.watch import Display, Outcome, last_traceback, watch

if TYPE_CHECKING:
    from fedllm.data import DataSummary

INTERRUPTED = 130
_RESULTS = {"adapter": "adapter", "best": "best", "report": "report.html", "curves": "curves.png",
            "metrics": "metrics.csv", "log": "flower.log"}  # fmt: skip
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start.

    ``folder`` is the app's as the user wrote it, ``cluster`` the Ray cluster to join, None for this machine alone;
    ``command`` is the one that started it.
    """

    app: App
    config: RunConfig
    folder: Path
    cluster: RayCluster | None = None
    command: str = "fedllm simulate"

    @property
    def run_dir(self) -> Path:
        """Folder of the run's results."""
        return Path(self.config.run.root) / self.config.run.name


def prepare(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    resume: str | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    ray_address: str | None = None,
    nodes: int | None = None,
) -> Job:
    """Read and check an app's configuration; nothing is started or written.

    Args:
        folder: the app.
        overrides: ``-c`` values.
        name: name of the run; the app's name with date and time if not given here or in the configuration.
        resume: name of an earlier run to go on with, whose saved configuration replaces the app's.
        clients: number of simulated clients, in place of ``simulation.clients``.
        rounds: number of rounds, in place of ``rounds``.
        ray_address: HOST:PORT of a Ray cluster in which the clients shall run.
        nodes: how many nodes a deployment has; None: the run is simulated.

    Raises:
        ConfigError: a wrong key or value, a run folder that exists, or nothing to resume.
        RegistryError: an unknown strategy, client or sink.
    """
    app = read_app(folder)
    flat = resolve(app, overrides)
    if resume is not None:
        saved = read_saved(Path(str(flat["run.root"])) / _checked_name(resume))
        flat = {**resolve(app, overrides, saved=saved), "run.root": flat["run.root"]}
    options: Mapping[str, Scalar | None] = {
        "simulation.clients": clients,
        "rounds": rounds,
        "run.name": resume or name or flat.get("run.name") or f"{app.name}-{datetime.now():%Y%m%d-%H%M%S}",
        "run.resume": True if resume is not None else None,
    }
    flat |= {key: value for key, value in options.items() if value is not None}
    sys.path.insert(0, str(app.folder))  # a plug-in may live in the app's own folder
    config = registry.config_from_flat(flat)
    if "server.min-nodes" not in flat:
        server = config.server.model_copy(update={"min_nodes": nodes or config.simulation.clients})
        config = config.model_copy(update={"server": server})
    registry.check(config)
    cluster = ask(ray_address) if ray_address is not None else None
    if nodes is None:
        _check_simulation(config, cluster)
    job = Job(app, config, folder, cluster)
    _check_run_folder(job, saved_clients=saved.get("simulation.clients") if resume is not None else None)
    return job


def check_inputs(config: RunConfig) -> DataSummary:
    """Check that the model and the data can be had and that every client gets some.

    Raises:
        ModelError: the model cannot be found.
        DataError: rows, columns or labels are missing, or a client would have none.
    """
    from fedllm.data import check_data
    from fedllm.model_sources import check_model

    check_model(config.model)
    return check_data(config, config.simulation.clients)


def simulate(job: Job, console: Console, *, quiet: bool = False) -> int:
    """Run a job to its end and return the exit code: 0 only if the run really finished.

    Args:
        job: from :func:`prepare`.
        console: where progress goes.
        quiet: print errors and the closing lines only.
    """
    try:
        with PrivateSuperLink(ray_address=job.cluster.address if job.cluster else None) as link:
            staged = stage(job.app, job.config, link.home / "staged-app")
            run_id = link.start_run(staged, federation_config(job.config, job.cluster))
            try:
                outcome = watch(link, run_id, job.run_dir, Display(console, quiet))
            except (KeyboardInterrupt, SystemExit):
                console.print("stopping the run …", style="yellow")
                save_log(link, run_id, job.run_dir, link.log())
                link.stop_run(run_id)
                raise
            log = save_log(link, run_id, job.run_dir, link.log())
    except KeyboardInterrupt:
        console.print(resume_hint(job), markup=False, soft_wrap=True)
        return INTERRUPTED
    if outcome.good:
        print_results(job, outcome.history, console)
        return 0
    print_failure(job, outcome, log)
    return 1


def federation_config(config: RunConfig, cluster: RayCluster | None = None) -> dict[str, int | float]:
    """What ``flwr run --federation-config`` needs to know."""
    simulation = config.simulation
    told: dict[str, int | float] = {
        "num-supernodes": simulation.clients,
        "client-resources-num-cpus": simulation.cpus_per_client,
        "client-resources-num-gpus": simulation.gpus_per_client,
    }
    needed = clients_at_once(config) * simulation.cpus_per_client
    if cluster is None and needed > (os.cpu_count() or 1):
        # Flower takes no fraction of a CPU for a client, but a number of CPUs for Ray to count with.
        told["init-args-num-cpus"] = needed
    return told


def clients_at_once(config: RunConfig) -> int:
    """Clients that must run at the same time because they train with each other; 0: any number will do."""
    if not getattr(registry.load("strategies", config.strategy), "trains_at_once", False):
        return 0
    return _cohort(config)


def _cohort(config: RunConfig) -> int:
    """Clients that train in a round."""
    parameters = config.plugins.get(registry.parameter_table(config.strategy), {})
    at_least = int(parameters.get("min-train-nodes", 1))
    return max(int(config.simulation.clients * config.server.fraction_train), at_least)


def print_plan(job: Job, data: DataSummary, console: Console) -> None:
    """Show what is about to run, on which data, and where the results go."""
    config = job.config
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan")
    grid.add_column(overflow="fold")
    grid.add_row("app", str(job.app.folder))
    grid.add_row("method", f"{config.strategy} with {config.client} clients, {config.rounds} rounds")
    grid.add_row("model", f"{config.model.name}, LoRA rank {config.lora.rank}")
    for label, text in data.lines():
        grid.add_row(label, text)
    if job.cluster is None:
        grid.add_row("machine", placement(config, os.cpu_count() or 1, _gpus()))
    else:
        at_a_time = _places(config, job.cluster)
        grid.add_row("machines", f"{job.cluster.summary()}, room for {at_a_time} clients at a time")
    grid.add_row("results", str(job.run_dir))
    console.print(Text(f"fedllm {__version__} · {config.run.name}", style="bold"))
    console.print(grid)
    if job.cluster is None and _gpus() and config.simulation.gpus_per_client == 0:
        hint = "a GPU is idle: give each client a share, for example -c simulation.gpus-per-client=0.25"
        console.print(Text(hint, style="yellow"))


def placement(config: RunConfig, cpus: int, gpus: int) -> str:
    """How many clients run at a time, and what each of them gets."""
    simulation = config.simulation
    fitting, at_once = cpus // simulation.cpus_per_client, clients_at_once(config)
    share = f"{simulation.cpus_per_client} of {cpus} CPUs"
    if fitting < at_once:
        fitting, share = at_once, f"{cpus / at_once:.2g} of {cpus} CPUs"
    if simulation.gpus_per_client > 0:
        fitting = min(fitting, _gpu_places(simulation.gpus_per_client, gpus))
        share += f" and {simulation.gpus_per_client:g} of {gpus} GPUs"
    return f"{min(fitting, simulation.clients)} of {simulation.clients} clients at a time, {share} each"


def _gpu_places(share: float, gpus: int) -> int:
    """Clients that get their share of a GPU: Ray packs shares, but never splits one over two GPUs."""
    per_gpu = int(1 / share + 1e-9)
    return gpus * per_gpu if per_gpu else int(gpus / share)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _checked_name(name: str) -> str:
    if not _RUN_NAME.fullmatch(name):
        raise ConfigError(f"run.name must be letters, digits, dots, dashes and underscores, found {name!r}")
    return name


def _places(config: RunConfig, cluster: RayCluster) -> int:
    return cluster.places(config.simulation.cpus_per_client, config.simulation.gpus_per_client)


def _check_simulation(config: RunConfig, cluster: RayCluster | None) -> None:
    simulation, server = config.simulation, config.server
    if server.min_nodes > simulation.clients:
        raise ConfigError(
            f"server.min-nodes is {server.min_nodes}, but simulation.clients is {simulation.clients}: "
            "the run would wait for nodes that never come; raise the clients or lower min-nodes"
        )
    _check_defence(config)
    if cluster is not None:
        cluster.check(simulation.cpus_per_client, simulation.gpus_per_client, clients_at_once(config))
    else:
        _check_this_machine(config)


def _check_defence(config: RunConfig) -> None:
    """Let the defence itself say whether its parameters fit the number of clients in a round."""
    if config.defence == "none":
        return
    check = getattr(registry.load("defences", config.defence), "check_cohort", None)
    if check is not None:  # a defence of one's own need not be a reply filter
        parameters = config.plugins.get(registry.parameter_table(config.defence), {})
        check(registry.check_parameters("defences", config.defence, parameters), _cohort(config))


def _check_this_machine(config: RunConfig) -> None:
    simulation = config.simulation
    cpus = os.cpu_count() or 1
    if simulation.cpus_per_client > cpus:
        raise ConfigError(
            f"simulation.cpus-per-client is {simulation.cpus_per_client}, but this machine has {cpus} CPUs; "
            "no client could start"
        )
    if simulation.gpus_per_client > 0 and simulation.gpus_per_client > (gpus := _gpus()):
        raise ConfigError(
            f"simulation.gpus-per-client is {simulation.gpus_per_client:g}, but torch sees {gpus} CUDA devices; "
            "`fedllm doctor` says more"
        )
    _check_at_once(config)


def _check_at_once(config: RunConfig) -> None:
    """CPUs can be shared by clients that train with each other, a GPU's memory cannot."""
    at_once, share = clients_at_once(config), config.simulation.gpus_per_client
    if share > 0 and at_once > (fitting := _gpu_places(share, _gpus())):
        raise ConfigError(
            f"{config.strategy} trains {at_once} clients of a round together, but with "
            f"simulation.gpus-per-client = {share:g} only {fitting} run at a time; set it to "
            f"1/{-(-at_once // max(_gpus(), 1))} or less, or lower server.fraction-train"
        )


def _check_run_folder(job: Job, saved_clients: Scalar | None) -> None:
    _checked_name(job.config.run.name)
    run_dir, resume = job.run_dir, job.config.run.resume
    if resume and not (run_dir / "config.json").is_file():
        raise ConfigError(f"cannot resume {run_dir}: no run of that name has started there")
    if not resume and (run_dir / "events.jsonl").exists():
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it by --resume {job.config.run.name}, "
            "or choose another --name"
        )
    if saved_clients is not None and saved_clients != job.config.simulation.clients:
        raise ConfigError(
            f"the run {job.config.run.name} has {saved_clients} clients and cannot go on with "
            f"{job.config.simulation.clients}: every client's data would change; start a new run"
        )


def save_log(link: FlowerCommands, run_id: str, run_dir: Path, superlink_log: str) -> str:
    """Keep what Flower and the apps have printed in ``flower.log``, and return what the apps have."""
    app_log = link.app_log(run_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "flower.log").write_text(f"{app_log}\n--- SuperLink ---\n{superlink_log}", encoding="utf-8")
    return app_log


def resume_hint(job: Job) -> str:
    """How to go on with a run that has ended early."""
    if not any((job.run_dir / "checkpoints").glob("*")):
        return "no round was finished, so there is nothing to go on with"
    return f"go on with it: {job.command} {job.folder} --resume {job.config.run.name}"


def print_failure(job: Job, outcome: Outcome, app_log: str) -> None:
    """Say why a run failed, where its log is and how to go on with it."""
    console = Console(stderr=True, highlight=False)
    told = outcome.ended and outcome.history.failure
    reason = (
        told
        or outcome.status.details
        or f"Flower says {outcome.status.status}, but the run did not say that it ended"
    )
    console.print(
        Text("error: ", style="bold red").append(f"the run failed: {reason}", style="red"), soft_wrap=True
    )
    if not told:
        console.print(Text(last_traceback(app_log) or tail(app_log), style="dim"), soft_wrap=True)
    console.print(f"log: {job.run_dir / 'flower.log'}\n{resume_hint(job)}", markup=False, soft_wrap=True)


def print_results(job: Job, history: RunHistory, console: Console) -> None:
    """Say how a run went and where its results are."""
    metrics = ", ".join(f"{name} {format_value(value)}" for name, value in history.final_metrics.items())
    verdict = f"results: {metrics or 'no test metrics'}; the rounds took {format_seconds(history.seconds)}"
    console.print(Text(verdict, style="bold green"))
    for label, name in _RESULTS.items():
        if (path := job.run_dir / name).exists():
            console.print(f"  {label:<9}{path}", markup=False, soft_wrap=True)
