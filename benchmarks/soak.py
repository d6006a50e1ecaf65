"""Memory over many rounds, and what is left at the end: a week in short.

Two sides, one after the other, with a tiny model: a simulation with many SuperNodes, all of which train in every round,
and a federation of real ones on loopback (TLS, authenticated, resident workers). Every few rounds each process is asked
for the memory that is its own; growth is what the last fifth of the looks shows above those of the rounds from 10 to
15, by kind of process, in the largest process of the kind. At the end processes, ports and sockets are counted.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from harness import arguments, console, report, write_app

from fedllm.events import read_events
from fedllm.node.federation import Federation
from fedllm.processes import of_home
from fedllm.superlink import PrivateSuperLink

KINDS = {
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flwr-simulation": "ServerApp",
    "flwr-serverapp": "ServerApp",
    "fedllm.node.worker": "worker",
    "ray::ClientAppActor": "worker",
}
"""By a word of the command line; a simulation's ServerApp runs in the process of the simulation engine."""
SETTLED = (10, 15)
EVERY = 5


@dataclass
class Soak:
    """What the looks at a run's processes have shown.

    Attributes:
        looks: by round, by kind, bytes of the largest process.
        processes: most processes seen at once.
        ports: on which they listened.
        left: what is left after the end, in words.
    """

    looks: dict[int, dict[str, int]] = field(default_factory=dict)
    processes: int = 0
    ports: set[int] = field(default_factory=set)
    left: list[str] = field(default_factory=list)

    def look(self, server_round: int, processes: Iterable[psutil.Process]) -> None:
        """Ask every process for its own memory."""
        largest: dict[str, int] = {}
        seen = 0
        for process in processes:
            seen += 1
            with suppress(psutil.Error):  # it has just ended
                self.ports |= {
                    c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
                }
                words = " ".join(process.cmdline())
                kind = next((kind for word, kind in KINDS.items() if word in words), None)
                if kind is not None:
                    largest[kind] = max(largest.get(kind, 0), process.memory_full_info().uss)
        self.looks[server_round] = largest
        self.processes = max(self.processes, seen)

    def look_back(self, processes: Iterable[psutil.Process], paths: Iterable[Path]) -> None:
        """Note what there still is, of what should be gone."""
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        self.left += [f"process {process.pid}" for process in processes]
        self.left += [f"port {port}" for port in sorted(self.ports & listening)]
        self.left += [str(path) for path in paths if path.exists()]

    def settled(self, kind: str) -> int:
        """Bytes once caches are warm."""
        return max(look[kind] for number, look in self.looks.items() if SETTLED[0] <= number <= SETTLED[1])

    def last(self, kind: str) -> int:
        """Bytes at the end."""
        numbers = sorted(self.looks)
        return int(median(self.looks[number][kind] for number in numbers[-max(len(numbers) // 5, 1) :]))

    @property
    def kinds(self) -> list[str]:
        """Kinds of processes that were there throughout."""
        return sorted(set.intersection(*(set(look) for look in self.looks.values())))


def configuration(folder: Path, clients: int, rounds: int, seed: int, table: Path) -> dict[str, Any]:
    """A tiny model and a few rows for each client; every round evaluates, saves and checkpoints as usual."""
    return {
        "strategy": "fedavg",
        "rounds": rounds,
        "seed": seed,
        "model": {"name": "tiny-random:bert"},
        "lora": {"rank": 4},
        "data": {"source": str(table), "test-fraction": 0.1, "max-length": 16, "partitioner": "iid"},
        "train": {"batch-size": 8, "local-steps": 2},
        "server": {"fraction-evaluate": 0.0, "min-nodes": clients, "node-timeout": 900},
        "run": {"root": str(folder / "runs"), "name": "soak"},
        "simulation": {"clients": clients},
    }


def write_table(path: Path, clients: int) -> Path:
    """Twenty rows a client of two kinds of text."""
    words = {"good": ("fine", "great", "lovely"), "bad": ("awful", "poor", "dreadful")}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for row in range(20 * clients):
            label = ("good", "bad")[row % 2]
            writer.writerow((f"{words[label][row % 3]} number {row}", label))
    return path


def watch(
    soak: Soak,
    events: Path,
    rounds: int,
    processes: Callable[[], Iterable[psutil.Process]],
    finished: Callable[[], Any],
) -> None:
    """Look every few rounds, but not at the last one, after which the processes of the app end.

    Raises:
        RuntimeError: the run ended before.
    """
    due, asked = EVERY, time.monotonic()
    while due < rounds:
        told = read_events(events) if events.is_file() else []
        done = max((event["round"] for event in told if event["event"] == "round-finished"), default=0)
        if done >= due:
            soak.look(done, processes())
            memory = ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in soak.looks[done].items())
            console.print(f"round {done}: {memory}")
            due = done - done % EVERY + EVERY
        elif time.monotonic() - asked > 30:
            asked = time.monotonic()
            if (status := finished()) is not None:
                raise RuntimeError(f"the run ended after round {done}: {status}")
        time.sleep(0.2)


def simulated(folder: Path, clients: int, rounds: int, seed: int) -> Soak:
    """The simulation."""
    soak = Soak()
    config = configuration(folder, clients, rounds, seed, write_table(folder / "rows.csv", clients))
    app = write_app(folder / "app", config)
    with PrivateSuperLink() as link:
        home = link.home
        run_id = link.start_run(app, {"num-supernodes": clients, "client-resources-num-cpus": 1})

        def finished() -> Any:
            status = link.status(run_id)
            return status if status.finished else None

        watch(soak, folder / "runs" / "soak" / "events.jsonl", rounds, lambda: of_home(home), finished)
        while finished() is None:
            time.sleep(1)
    soak.look_back(of_home(home), [home])
    return soak


def deployed(folder: Path, nodes: int, rounds: int, seed: int) -> Soak:
    """The federation of real SuperNodes with resident workers."""
    soak = Soak()
    config = configuration(folder, nodes, rounds, seed, write_table(folder / "rows.csv", nodes))
    app = write_app(folder / "app", config)
    with Federation(folder / "federation", nodes, node_settings={"threads": 1}) as federation:
        members = [federation.superlink, *federation.nodes]
        run = federation.start_run(app, name="soak")

        def processes() -> list[psutil.Process]:
            return [process for member in members for process in member.processes()]

        def finished() -> Any:
            status = federation.connection.status(run.run_id)
            return status if status.finished else None

        watch(soak, run.folder / "events.jsonl", rounds, processes, finished)
        status = run.wait()
        if not status.completed:
            raise RuntimeError(f"{status.status} {status.details}")
    soak.look_back(processes(), folder.rglob("*.sock"))
    return soak


def summarise(name: str, soak: Soak) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Flat figures and table rows of one side."""
    figures: dict[str, Any] = {f"{name}_processes": soak.processes, f"{name}_left": ", ".join(soak.left)}
    rows = []
    for kind in soak.kinds:
        settled, last = soak.settled(kind), soak.last(kind)
        key = f"{name}_{kind.lower()}"
        figures |= {
            f"{key}_settled_bytes": settled,
            f"{key}_last_bytes": last,
            f"{key}_growth": last / settled - 1,
        }
        rows.append(
            (f"{name}: {kind}", settled / 2**20, last / 2**20, f"{100 * (last / settled - 1):+.1f} %")
        )
    rows.append((f"{name}: left at the end", "", "", ", ".join(soak.left) or "nothing"))
    return figures, rows


def main() -> None:
    args = arguments(__doc__ or "", clients=50, nodes=3, rounds=100, side="both")
    sides: Mapping[str, tuple[Callable[..., Soak], int]] = {
        "simulated": (simulated, args.clients),
        "deployed": (deployed, args.nodes),
    }
    if args.side != "both" and args.side not in sides:
        raise SystemExit(f"--side: expected both, {' or '.join(sides)}, found {args.side}")
    rounds = min(args.rounds, 20) if args.quick else args.rounds
    if rounds < SETTLED[1]:
        raise SystemExit(f"--rounds: growth is counted from round {SETTLED[1]} on, found {rounds}")
    figures: dict[str, Any] = {"rounds": rounds, "clients": args.clients, "nodes": args.nodes}
    rows: list[tuple[Any, ...]] = [
        ("", f"MiB, rounds {SETTLED[0]} to {SETTLED[1]}", "MiB, last rounds", "growth")
    ]
    for name, (side, count) in sides.items():
        if args.side in (name, "both"):
            with tempfile.TemporaryDirectory(prefix="so-") as folder:
                found, lines = summarise(name, side(Path(folder), count, rounds, args.seed))
            figures |= found
            rows += lines
    ran = [f"{count} {name} nodes" for name, (_, count) in sides.items() if args.side in (name, "both")]
    report(args, figures, rows, f"{rounds} rounds: {', '.join(ran)}")


if __name__ == "__main__":
    main()
