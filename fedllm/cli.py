"""The command line of fedllm. Heavy libraries are imported inside the commands: ``--help`` is instant."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from fedllm import __version__, logs, node_cli
from fedllm.errors import ConfigError, FedLLMError

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models on Flower.",
    epilog="Start with: fedllm new my-app && fedllm simulate my-app",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]


def _console() -> Console:
    return Console(highlight=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    log_format: Annotated[
        str | None,
        typer.Option(
            envvar=logs.VARIABLE, help="Log lines as text, or as json: one object a line, of Flower's too."
        ),
    ] = None,
) -> None:
    if log_format is not None:
        os.environ[logs.VARIABLE] = log_format  # the processes that Flower starts inherit it
    _set_up_logging(debug)


def _set_up_logging(debug: bool) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logs.set_up(level=logging.DEBUG if debug else logging.WARNING)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config",
            "-c",
            metavar="'KEY=VALUE …'",
            help="Set configuration keys: TOML pairs, or one TOML file. `fedllm list --keys` shows all keys.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the app's name with the time.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with the run of this name from its newest good checkpoint."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Simulated clients (simulation.clients).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training (rounds).")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Run the clients on this Ray cluster, which `ray start` has started."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the results.")] = False,
    debug: Debug = False,
) -> None:
    """Run the app in the folder APP with simulated clients, on this machine or a Ray cluster.

    Everything is checked before work starts. Exit code 0 means that the run finished; 1 that it failed;
    2 that the configuration or the command line is wrong; 130 that it was interrupted.

    Example: `fedllm simulate examples/quickstart -c 'rounds=5 strategy="fedadam"' --clients 20`
    """
    from fedllm import simulate as simulation

    if debug:
        _set_up_logging(debug)
    if name and resume:
        raise typer.BadParameter("--name and --resume exclude each other: --resume takes the name of the run")
    console = _console()
    job = simulation.prepare(
        folder,
        overrides or [],
        name=name,
        resume=resume,
        clients=clients,
        rounds=rounds,
        ray_address=ray_address,
    )
    summary = simulation.check_inputs(job.config)
    if not quiet:
        simulation.print_plan(job, summary, console)
    raise typer.Exit(simulation.simulate(job, console, quiet=quiet))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default: report.html in the (first) run folder.")
    ] = None,
) -> None:
    """Write a self-contained HTML report of the run folder RUN, or a comparison of several."""
    from fedllm.report import write_report

    for run in runs:
        if not (run / "events.jsonl").is_file():
            raise ConfigError(f"{run} is not a run folder: it has no events.jsonl")
    _console().print(str(write_report(runs, out)), soft_wrap=True)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a folder with a PEFT adapter.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model; default: merged/ beside the adapter.")
    ] = None,
) -> None:
    """Merge the adapter of RUN, a run folder or an adapter's, into its base model for use without PEFT."""
    adapter = next(
        (path for path in (run, run / "adapter") if (path / "adapter_config.json").is_file()), None
    )
    if adapter is None:
        raise ConfigError(
            f"{run} is neither a run folder with adapter/ nor an adapter: no adapter_config.json there"
        )
    target = out or adapter.resolve().parent / "merged"
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty; choose another folder with --out")
    from fedllm.models import merge_adapter

    merge_adapter(adapter, target)
    _console().print(str(target), soft_wrap=True)


@app.command("list")
def list_plugins(
    keys: Annotated[bool, typer.Option("--keys", help="Show all configuration keys instead.")] = False,
    as_json: Json = False,
) -> None:
    """List strategies, clients, defences, attacks, tasks and sinks, or all configuration keys."""
    from fedllm import listing

    if as_json:
        typer.echo(json.dumps(listing.keys() if keys else listing.plugins(), indent=2))
    elif keys:
        listing.print_keys(listing.keys(), _console())
    else:
        listing.print_plugins(listing.plugins(), _console())


@app.command()
def new(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder to make; it must be empty or not exist.")
    ],
) -> None:
    """Write a minimal app to the folder PATH: a commented configuration, ready for `fedllm simulate`."""
    from fedllm.scaffold import create_app

    console = _console()
    for file in create_app(path):
        console.print(f"wrote {file}", soft_wrap=True)
    console.print(f"\nnext: [bold]fedllm simulate {path}[/]", soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Instead, tell which gradient modes fit a node that trains this model.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of the node, for example 8GB; default: this machine's.")
    ] = None,
    task: Annotated[str, typer.Option(help="sequence-classification or causal-lm.")] = "causal-lm",
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit.")] = "none",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 16,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens of the longest example.")] = 128,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    node: Annotated[
        Path | None,
        typer.Option(metavar="NODE.TOML", help="Instead, tell why the node of this file cannot take part."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, GPU, quantisation, hub, Flower's leftovers, folders and disk.

    With `--model` it tells instead what a training step of each gradient mode needs; with `--node` it checks a node's
    certificate, key, address, clock, data, worker and disk.

    Exit code 1 means that something must be fixed; warnings do not count.
    """
    if model is not None:
        values = {"task": task, "model.name": model, "model.quantization": quantization, "model.dtype": dtype}
        _advise(values, memory, rank, batch_size, max_length, as_json)
        return
    if memory is not None:
        raise typer.BadParameter("--memory needs --model: it says which gradient modes of a model fit")
    from fedllm import doctor as checks

    if node is not None:
        from fedllm.node.node_checks import run_node_checks

        results = run_node_checks(node)
    else:
        results = checks.run_checks()
    if as_json:
        typer.echo(json.dumps(checks.to_json(results), indent=2))
    else:
        checks.render(results, _console())
    raise typer.Exit(EXIT_FAILED if any(check.status == "fail" for check in results) else 0)


def _advise(
    values: dict[str, str], memory: str | None, rank: int, batch_size: int, max_length: int, as_json: bool
) -> None:
    """Print which gradient modes of a model fit a memory."""
    from fedllm import mode_advice
    from fedllm.config import RunConfig

    config = RunConfig.from_flat(values)
    available = mode_advice.available_bytes(memory, config.model.device)
    advice = mode_advice.advise(
        config.model, config.task, available, rank=rank, batch=batch_size, length=max_length
    )
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in advice], indent=2))
    else:
        title = f"{config.model.name}, {batch_size} examples of {max_length} tokens, LoRA of rank {rank}"
        mode_advice.render(advice, available, title, _console())


node_cli.register(app)


def main() -> NoReturn:
    """Console script: run the command line, turn errors into one clear message and an honest exit code."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, FedLLMError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        text = Text("error: ", style="bold red").append(message, style="red")
        if not known:
            text.append(
                "\nthis is a bug in fedllm; run the command again with --debug for the traceback", style="dim"
            )
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
    sys.exit(0)
