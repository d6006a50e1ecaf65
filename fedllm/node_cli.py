"""Commands of a deployment: credentials, nodes, the SuperLink, a federation on this machine.

Heavy libraries are imported inside the commands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.node.certs import Credential

_PANEL = "Deployment"

certs = typer.Typer(no_args_is_help=True, help="Make the credentials of a deployment, without openssl.")
nodes = typer.Typer(no_args_is_help=True, help="Admit, list and bar the nodes of a federation.")

Names = Annotated[
    list[str] | None,
    typer.Option("--server-name", metavar="HOST", help="Host name of the SuperLink; may be given again."),
]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--server-ip", metavar="IP", help="IP address of the SuperLink; may be given again."),
]
ServerDays = Annotated[float, typer.Option(min=0.0001, help="Days until the server's certificate expires.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the credentials.")]
FederationDir = Annotated[
    Path,
    typer.Option("--federation", "-f", metavar="DIR", help="Folder made by `fedllm up` or `fedllm connect`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what Flower and the worker print, too.")
]
Example = Annotated[bool, typer.Option("--example", help="Print a commented sample file and exit.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of fedllm."""
    app.add_typer(certs, name="certs", rich_help_panel=_PANEL)
    app.add_typer(nodes, name="nodes", rich_help_panel=_PANEL)
    for command in (up, down, run, stop, status, superlink, node, connect):
        app.command(rich_help_panel=_PANEL)(command)


def _console() -> Console:
    return Console(highlight=False)


@certs.command("init")
def certs_init(
    folder: Folder,
    names: Names = None,
    addresses: Addresses = None,
    days: ServerDays = 365,
    authority_days: Annotated[
        float, typer.Option(min=0.0001, help="Days until the authority expires.")
    ] = 3650,
) -> None:
    """Make a certificate authority and the SuperLink's certificate.

    The certificate always holds for localhost and 127.0.0.1, which the SuperLink's own processes and SSH tunnels use.

    Example: `fedllm certs init certs --server-name superlink.example.org`
    """
    from fedllm.node.certs import create_authority

    made = create_authority(
        folder,
        ["localhost", *(names or [])],
        ["127.0.0.1", *(addresses or [])],
        server_days=days,
        authority_days=authority_days,
    )
    _print_credentials(made)


@certs.command("renew")
def certs_renew(
    folder: Folder, names: Names = None, addresses: Addresses = None, days: ServerDays = 365
) -> None:
    """Replace the SuperLink's certificate and key by new ones of the same authority; nodes stay as they are."""
    from fedllm.node.certs import renew_server

    made = renew_server(
        folder, ["localhost", *(names or [])], ["127.0.0.1", *(addresses or [])], server_days=days
    )
    _print_credentials(made)


@certs.command("node")
def certs_node(
    folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the node.")]
) -> None:
    """Make the key pair with which the node NAME proves who it is."""
    from fedllm.node.certs import create_node_key

    _print_credentials(create_node_key(folder, name))


def _print_credentials(made: Sequence[Credential]) -> None:
    table = Table("file", "belongs on", box=None, pad_edge=False)
    for credential in made:
        table.add_row(str(credential.path), credential.belongs)
    _console().print(table, soft_wrap=True)


@nodes.command("register")
def nodes_register(
    public_key: Annotated[
        Path, typer.Argument(metavar="PUBLIC_KEY", help="NAME.pub of `fedllm certs node`.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the node; default: the file's.")] = None,
    federation: FederationDir = Path(".fedllm"),
) -> None:
    """Admit the node that has the private key belonging to PUBLIC_KEY."""
    from fedllm.node.connection import FederationFolder

    named = name or public_key.stem
    node_id = FederationFolder(federation).register(public_key, named)
    _console().print(f"registered {named}, id {node_id}", markup=False)


@nodes.command("revoke")
def nodes_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME|ID", help="Name or id of the node.")],
    federation: FederationDir = Path(".fedllm"),
) -> None:
    """Bar a node, for instance because its key was stolen: it is refused from now on."""
    from fedllm.node.connection import FederationFolder

    node_id = FederationFolder(federation).revoke(name)
    _console().print(f"revoked {name}, id {node_id}", markup=False)


@nodes.command("list")
def nodes_list(federation: FederationDir = Path(".fedllm"), as_json: Json = False) -> None:
    """List the registered nodes."""
    from fedllm.node import status as report
    from fedllm.node.connection import FederationFolder

    told = report.nodes(FederationFolder(federation))
    if as_json:
        typer.echo(json.dumps(report.to_json(told), indent=2))
    else:
        report.print_nodes(told, _console())


def superlink(
    config: Annotated[
        Path | None, typer.Argument(metavar="SUPERLINK.TOML", help="Settings; see --example.")
    ] = None,
    example: Example = False,
    verbose: Verbose = False,
) -> None:
    """Run the SuperLink: TLS, node authentication, state on disk; restarted when it ends, until SIGTERM.

    Example: `fedllm superlink --example > superlink.toml`, edit it, `fedllm superlink superlink.toml`
    """
    from fedllm.node import settings

    if example:
        typer.echo(settings.example("superlink"), nl=False)
        return
    from fedllm import logs
    from fedllm.node import superlink as side

    _log_progress()
    side.supervisor(
        settings.read_superlink(_given(config, "superlink")), echo=logs.echo if verbose else None
    ).run()


def node(
    config: Annotated[
        Path | None, typer.Argument(metavar="NODE.TOML", help="Settings; see --example.")
    ] = None,
    example: Example = False,
    verbose: Verbose = False,
) -> None:
    """Run a node: resident worker and SuperNode; restarted when they end, until SIGTERM.

    Example: `fedllm node --example > node.toml`, edit it, `fedllm doctor --node node.toml`, `fedllm node node.toml`
    """
    from fedllm.node import settings

    if example:
        typer.echo(settings.example("node"), nl=False)
        return
    from fedllm import logs
    from fedllm.node import supernode as side

    _log_progress()
    side.supervisor(settings.read_node(_given(config, "node")), echo=logs.echo if verbose else None).run()


def _given(config: Path | None, command: str) -> Path:
    if config is None:
        raise ConfigError(
            f"which settings? `fedllm {command} --example > {command}.toml` writes a sample to start from"
        )
    return config


def _log_progress() -> None:
    """A daemon's log has times and says what goes well, too."""
    from fedllm import logs

    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logs.set_up(level=logging.INFO)


def connect(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="The SuperLink's API for commands, usually port 8000.")
    ],
    authority: Annotated[Path, typer.Argument(metavar="CA.CRT", help="Certificate of the authority.")],
    federation: FederationDir = Path(".fedllm"),
    local: Annotated[
        bool,
        typer.Option("--local", help="The SuperLink runs on this machine: run folders can be read here."),
    ] = False,
) -> None:
    """Make a federation folder for a SuperLink that runs already, for the commands run, status and nodes.

    Example: `fedllm connect 127.0.0.1:8000 ca.crt` through an SSH tunnel to the SuperLink's machine
    """
    from fedllm.node.connection import FederationFolder

    made = FederationFolder.create(federation, address, authority, local=local)
    found = made.nodes()
    _console().print(f"connected; {len(found)} nodes are registered", markup=False)


def up(
    count: Annotated[
        int | None, typer.Option("--nodes", "-n", min=1, help="How many; default: 2, or as before.")
    ] = None,
    federation: FederationDir = Path(".fedllm"),
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each node; 0: all CPUs.")] = 0,
    worker: Annotated[bool, typer.Option(help="Give every node a resident worker.")] = True,
) -> None:
    """Start a complete federation on this machine, in the background: TLS, authenticated nodes, state on disk.

    Node i of N trains on partition i of the run's data. A folder that exists is gone on with, settings included.
    Example: `fedllm up --nodes 3`, then
    `fedllm run examples/quickstart`, `fedllm status`, `fedllm down`
    """
    from fedllm.node.federation import Federation

    console = _console()
    fresh = not (federation / "superlink" / "superlink.toml").is_file()
    with console.status("starting SuperLink and nodes …"):
        made = Federation(
            federation,
            count or (2 if fresh else None),
            node_settings={"threads": threads, "worker": worker},
        )
        made.start()
    where = "" if federation == Path(".fedllm") else f" -f {federation}"
    console.print(
        f"a federation of {len(made.nodes)} nodes runs in {made.folder}", markup=False, soft_wrap=True
    )
    console.print(f"  fedllm run APP{where}   fedllm status{where}   fedllm down{where}", markup=False)


def down(
    federation: FederationDir = Path(".fedllm"),
    remove: Annotated[bool, typer.Option("--remove", help="Delete its folder, too.")] = False,
) -> None:
    """End the federation that `fedllm up` has started; `fedllm up` goes on with it unless it is removed."""
    from fedllm.node.federation import Federation

    made = Federation(federation)
    with _console().status("stopping nodes and SuperLink …"):
        made.remove() if remove else made.stop()
    _console().print(
        f"stopped{' and removed' if remove else ''}: {made.folder}", markup=False, soft_wrap=True
    )


def run(
    folder: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", metavar="'KEY=VALUE …'", help="Set configuration keys, as in simulate."
        ),
    ] = None,
    federation: FederationDir = Path(".fedllm"),
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: the app's with the time.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with the run of this name from its newest checkpoint."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training (rounds).")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the results.")] = False,
) -> None:
    """Run the app in the folder APP on a deployed federation.

    Everything is checked before work starts. Ctrl-C ends the watching, not the run. Exit codes are those of simulate.

    Example: `fedllm run examples/quickstart -f .fedllm -c rounds=5`
    """
    from fedllm.node import deployed

    if name and resume:
        raise typer.BadParameter("--name and --resume exclude each other: --resume takes the name of the run")
    console = _console()
    prepared = deployed.prepare(folder, federation, overrides or [], name=name, resume=resume, rounds=rounds)
    raise typer.Exit(deployed.run(prepared, console, quiet=quiet, detach=detach))


def stop(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="Flower's id, from `fedllm status`.")],
    federation: FederationDir = Path(".fedllm"),
) -> None:
    """Stop a run on a deployed federation; `fedllm run --resume` goes on with it."""
    from fedllm.node.connection import FederationFolder

    FederationFolder(federation).stop_run(run_id)
    _console().print(f"stopped run {run_id}", markup=False)


def status(federation: FederationDir = Path(".fedllm"), as_json: Json = False) -> None:
    """Show a federation: nodes, versions, last seen, runs and their round; workers of a federation on this machine.

    Exit code 1 means that a node is not online or a supervised process is down.
    """
    from fedllm.node import status as report

    told = report.collect(federation)
    if as_json:
        typer.echo(json.dumps(report.to_json(told), indent=2))
    else:
        report.print_status(told, _console())
    if not told.healthy:
        raise typer.Exit(1)
