"""Seconds per round that are not training, on a deployed node with a resident worker and without one.

A SuperLink and one node on loopback (TLS, authenticated; real Flower processes), first with the worker, then with
Flower's process for every message alone, which imports torch and loads the base model each time. Both train the same
adapter on the same rows. What is training is what the worker reports for rounds in which it loads nothing, the same for
both sides; the rest of a round is overhead: Flower's polling and processes, imports, loading, sending, aggregating, the
checkpoint. The first round, in which the worker loads too, is left out; its counters show that it loads nothing later.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness import arguments, report, write_app

from fedllm.node.federation import Federation
from fedllm.node.health import ask

QUICK_MODEL = "tiny-random:llama"
_ROUND_TIMEOUT = 900.0


@dataclass(frozen=True)
class Measured:
    """What one side's rounds after the first took, in seconds.

    Attributes:
        rounds: whole rounds, from their start to their end.
        client: what the client reports of each.
        loads: models and sets of examples that the worker loaded after the first round; 0 without a worker.
    """

    rounds: list[float]
    client: list[float]
    loads: int


def app(folder: Path, model: str, rounds: int, seed: int) -> Path:
    """Write the app that both sides run: training alone, without evaluation."""
    config = {
        "strategy": "fedavg",
        "task": "causal-lm",
        "rounds": rounds,
        "seed": seed,
        "model": {"name": model},
        "lora": {"rank": 8},
        "data": {"source": "packaged:chatterbot", "train-rows": 256, "test-fraction": 0.0, "max-length": 64},
        "train": {"batch-size": 4, "local-steps": 2},
        "server": {"fraction-evaluate": 0.0, "min-nodes": 1, "node-timeout": _ROUND_TIMEOUT},
        "run": {"root": str(folder / "runs")},
        "simulation": {"clients": 1},
    }
    return write_app(folder / "app", config)


def measure(folder: Path, model: str, rounds: int, seed: int, *, worker: bool) -> Measured:
    """Run the app on a federation of one node.

    Raises:
        RuntimeError: the run did not complete.
    """
    with Federation(folder / "federation", nodes=1, node_settings={"worker": worker}) as federation:
        run = federation.start_run(app(folder, model, rounds, seed), name="run")
        counts = []
        for number in (1, rounds):
            run.wait_for_event("round-finished", _ROUND_TIMEOUT * rounds, round=number)
            if worker:
                health = ask(federation.nodes[0].folder / "state" / "worker.sock", timeout=60.0)
                counts.append(health.model_loads + health.data_loads)
        status = run.wait()
        if not status.completed:
            raise RuntimeError(f"{status.status} {status.details}")
        events = run.events()
    later = [event for event in events if event.get("round", 0) > 1]
    return Measured(
        [event["seconds"] for event in later if event["event"] == "round-finished"],
        [event["seconds"] for event in later if event["event"] == "node-replied"],
        counts[1] - counts[0] if worker else 0,
    )


def main() -> None:
    args = arguments(__doc__ or "", model="packaged:smollm2", rounds=6)
    model = QUICK_MODEL if args.quick and args.model == "packaged:smollm2" else args.model
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    with tempfile.TemporaryDirectory(prefix="no-") as folder:
        resident = measure(Path(folder) / "r", model, rounds, args.seed, worker=True)
        stock = measure(Path(folder) / "s", model, rounds, args.seed, worker=False)
    training = median(resident.client)
    resident_overhead = max(median(resident.rounds) - training, 0.0)
    stock_overhead = median(stock.rounds) - training
    figures = {
        "model": model,
        "rounds": rounds,
        "training_seconds": training,
        "resident_seconds_per_round": median(resident.rounds),
        "stock_seconds_per_round": median(stock.rounds),
        "resident_overhead_seconds": resident_overhead,
        "stock_overhead_seconds": stock_overhead,
        "resident_over_stock": resident_overhead / stock_overhead,
        "loads_after_first_round": resident.loads,
    }
    rows = [
        ("seconds per round", "process per message", "resident worker", "ratio"),
        (
            "whole round",
            median(stock.rounds),
            median(resident.rounds),
            median(resident.rounds) / median(stock.rounds),
        ),
        ("training", training, training, 1.0),
        ("not training", stock_overhead, resident_overhead, figures["resident_over_stock"]),
        ("loads after the first round", "every round", resident.loads, ""),
    ]
    report(args, figures, rows, f"A deployed node, {model}, median of rounds 2 to {rounds}")


if __name__ == "__main__":
    main()
