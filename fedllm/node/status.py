"""What `fedllm status` tells: nodes, runs and their round, and the processes of a federation on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.errors import FedLLMError
from fedllm.events import read_events
from fedllm.history import RunHistory
from fedllm.narration import format_bytes, format_seconds
from fedllm.node.connection import FederationFolder, Node
from fedllm.node.federation import Federation
from fedllm.node.member import Member
from fedllm.node.settings import read_node
from fedllm.node.supernode import WORKER

_STYLES = {"online": "green", "running": "green", "offline": "bold red", "down": "bold red"}
_HEALTH_TIMEOUT = 2.0


@dataclass(frozen=True)
class RunState:
    """A run that has not ended, or the newest one.

    Attributes:
        run_id: Flower's.
        status: Flower's word.
        name: of the run; empty if its folder is on another machine or it was not started from here.
        round: the newest round that has begun; 0 before the first.
        rounds: how many there shall be; 0 if not known.
        versions: of fedllm, by node that has joined.
        folder: the run's folder.
    """

    run_id: str
    status: str
    name: str = ""
    round: int = 0
    rounds: int = 0
    versions: dict[str, str] | None = None
    folder: str = ""


@dataclass(frozen=True)
class PartState:
    """A supervised process on this machine; ``note`` says why it ended last, or what a worker holds."""

    member: str
    part: str
    state: str
    pid: int | None
    restarts: int
    note: str


@dataclass(frozen=True)
class FederationState:
    """Everything that `fedllm status` shows; ``error`` says why the SuperLink could not be asked."""

    nodes: Sequence[Node]
    runs: Sequence[RunState]
    parts: Sequence[PartState]
    error: str

    @property
    def healthy(self) -> bool:
        """Whether the SuperLink answers, all admitted nodes are online and all supervised processes run."""
        return (
            not self.error
            and all(node.status in ("online", "unregistered") for node in self.nodes)
            and all(part.state == "running" for part in self.parts)
        )


def collect(folder: Path) -> FederationState:
    """Ask the SuperLink and, for a federation of ``fedllm up``, the supervisors on this machine.

    Raises:
        ConfigError: ``folder`` is not a federation folder.
    """
    connection = FederationFolder(folder)
    parts = _parts(folder) if (folder / "superlink" / "superlink.toml").is_file() else []
    try:
        return FederationState(connection.nodes(), _runs(connection), parts, "")
    except FedLLMError as error:
        return FederationState([], [], parts, str(error))


def nodes(connection: FederationFolder) -> list[Node]:
    """The admitted nodes and those revoked.

    Raises:
        SuperLinkError: the SuperLink cannot be asked.
    """
    return connection.nodes()


def _runs(connection: FederationFolder) -> list[RunState]:
    told = connection.call("list", connection.connection)["runs"]
    newest = max(told, key=lambda run: str(run.get("created-at", "")), default=None)
    shown = [run for run in told if not run["status"].startswith("finished") or run is newest]
    return [_run(str(run["run-id"]), run["status"], connection) for run in shown]


def _run(run_id: str, status: str, connection: FederationFolder) -> RunState:
    folder = connection.runs.get(run_id, "")
    events = Path(folder) / "events.jsonl"
    if not folder or not events.is_file():
        return RunState(run_id, status, folder=folder)
    told = read_events(events)
    history = RunHistory.of(told)
    joined = [event for event in told if event["event"] == "node-joined"]
    versions = {event["node"]: str(event["version"]) for event in joined if "version" in event}
    begun = max(history.rounds, default=0)
    return RunState(run_id, status, history.name, begun, history.total_rounds, versions, folder)


def _parts(folder: Path) -> list[PartState]:
    federation = Federation(folder)
    return [
        state
        for member in (federation.superlink, *federation.nodes)
        for state in _member(member)
    ]  # fmt: skip


def _member(member: Member) -> list[PartState]:
    parts = member.parts()
    if not parts:
        return [PartState(member.folder.name, "supervisor", "down", None, 0, "")]
    return [
        PartState(
            member.folder.name,
            name,
            str(part["state"]),
            part["pid"],
            int(part["restarts"]),
            _worker(member) if name == WORKER and part["state"] == "running" else str(part["reason"]),
        )
        for name, part in parts.items()
    ]


def _worker(member: Member) -> str:
    """What a resident worker says of itself."""
    from fedllm.node import health

    try:
        told = health.ask(read_node(member.settings_file).socket, _HEALTH_TIMEOUT)
    except (FedLLMError, OSError) as error:
        return f"does not answer: {error}"
    models = ", ".join(str(model) for model in told.models) or "no model"
    return f"{told.jobs_done} jobs done, {told.jobs_failed} failed, {format_bytes(told.resident_bytes)}, {models}"


def to_json(told: Any) -> Any:
    """The same for programs."""
    if isinstance(told, list | tuple):
        return [to_json(entry) for entry in told]
    return asdict(told) if is_dataclass(told) and not isinstance(told, type) else told


def print_nodes(found: Sequence[Node], console: Console) -> None:
    """Print the nodes as a table."""
    table = Table("name", "id", "status", "since (UTC)", "online for", box=None, pad_edge=False)
    for node in found:
        online = format_seconds(node.seconds_online) if node.status == "online" else ""
        status = Text(node.status, style=_STYLES.get(node.status, ""))
        table.add_row(node.name or "–", node.node_id, status, node.changed or "never seen", online)
    console.print(table if found else "no node is registered")


def print_status(told: FederationState, console: Console) -> None:
    """Print everything."""
    if told.error:
        console.print(Text(f"the SuperLink does not answer: {told.error}", style="bold red"), soft_wrap=True)
    else:
        print_nodes(told.nodes, console)
    for run in told.runs:
        where = f"round {run.round} of {run.rounds}" if run.rounds else "round unknown"
        console.print(
            f"\nrun {run.run_id} {run.name}: {run.status}, {where}", markup=False, soft_wrap=True, end=""
        )
        versions = sorted(set((run.versions or {}).values()))
        console.print(f", fedllm {', '.join(versions)} on its nodes" if versions else "", markup=False)
        if run.folder:
            console.print(f"  {run.folder}", markup=False, soft_wrap=True)
    if told.parts:
        table = Table("on this machine", "part", "state", "process", "restarts", "", box=None, pad_edge=False)
        for part in told.parts:
            state = Text(part.state, style=_STYLES.get(part.state, "yellow"))
            table.add_row(part.member, part.part, state, str(part.pid or "–"), str(part.restarts), part.note)
        console.print()
        console.print(table)
