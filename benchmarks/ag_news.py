"""Federated fine-tuning on AG News: examples/ag_news on fedllm against the same task as a stock Flower app.

Equal work on both sides: model, LoRA, optimiser, learning rates, clients per round, steps, batch size, test rows. The
stock app loads model and tokens in every message. It runs twice: texts padded to max-length, and (Flower's own Hugging
Face example) to the longest text of a batch. A round's seconds run from the end of one evaluation to the end of the
next; the first round, in which processes start, is left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from harness import arguments, report, run_app, stage

from fedllm import app_config
from fedllm.config import ModelConfig, RunConfig
from fedllm.events import read_events
from fedllm.model_sources import resolve_model
from fedllm.simulate import federation_config, prepare

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.86
SHARED_KEYS = {
    "test-rows": "data.test-rows",
    "max-length": "data.max-length",
    "alpha": "data.alpha",
    "min-partition-size": "data.min-partition-size",
    "fraction-train": "server.fraction-train",
    "evaluate-batch-size": "server.evaluate-batch-size",
    "lora-rank": "lora.rank",
    "learning-rate": "train.learning-rate",
    "head-learning-rate": "train.head-learning-rate",
    "batch-size": "train.batch-size",
    "local-steps": "train.local-steps",
    "clients": "simulation.clients",
    "seed": "seed",
}
"""Settings of the stock app by the key of ours from which they are taken."""


@dataclass(frozen=True)
class Measured:
    """Accuracy after every round, the seconds of all rounds but the first, and how many parameters are trained."""

    accuracy: list[float]
    seconds: list[float]
    parameters: int

    @property
    def seconds_per_round(self) -> float:
        """Median."""
        return median(self.seconds)

    @property
    def rounds_to_target(self) -> int | None:
        """The first round with the target accuracy."""
        return next((number for number, value in enumerate(self.accuracy, start=1) if value >= TARGET), None)


def run_ours(
    folder: Path,
    train: Path,
    test: Path,
    rounds: int,
    seed: int,
    settings: Mapping[str, str | int] | None = None,
) -> tuple[Measured, RunConfig]:
    """Run the example, with further settings if there are any; also returns its configuration."""
    values = {
        "data.source": str(train),
        "data.test-file": str(test),
        "run.root": str(folder / "runs"),
        **(settings or {}),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    job = prepare(ROOT / "examples" / "ag_news", [*overrides, f"seed={seed}"], name="ours", rounds=rounds)
    run_app(app_config.stage(job.app, job.config, folder / "ours"), federation_config(job.config))
    events = read_events(job.run_dir / "events.jsonl")
    accuracy = [e["metrics"]["accuracy"] for e in events if e["event"] == "evaluated" and e["round"] > 0]
    ends = [event["time"] for event in events if event["event"] == "round-finished"]
    parameters = next(event["parameters"] for event in events if event["event"] == "run-started")
    return Measured(accuracy, _differences(ends), parameters), job.config


def run_stock(
    folder: Path, config: RunConfig, train: Path, test: Path, rounds: int, padding: str, cpus: int
) -> Measured:
    """Run the stock app with our configuration."""
    out = folder / f"{padding}.json"
    flat = config.to_flat()
    own = {
        "out": str(out),
        "train-file": str(train),
        "test-file": str(test),
        "model": resolve_model(ModelConfig(name=config.model.name)).path,
        "padding": padding,
        "rounds": rounds,
    }
    app = stage(
        "ag_news_stock", folder / padding, {**own, **{k: flat[key] for k, key in SHARED_KEYS.items()}}
    )
    run_app(app, {"num-supernodes": config.simulation.clients, "client-resources-num-cpus": cpus})
    figures = json.loads(out.read_text())
    return Measured(figures["accuracy"][1:], _differences(figures["time"][1:]), figures["parameters"])


def data_files(folder: str) -> tuple[Path, Path]:
    """The training and the test file in a folder; ends the program if one is not there."""
    train, test = (Path(folder).expanduser().resolve() / name for name in ("train.csv", "test.csv"))
    if missing := [str(path) for path in (train, test) if not path.is_file()]:
        raise SystemExit(
            f"not found: {', '.join(missing)}; pass --data FOLDER with AG News as train.csv and test.csv "
            "(columns text and label, classes Business, Sci/Tech, Sports and World)"
        )
    return train, test


def _differences(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    args = arguments(
        __doc__ or "", data=str(ROOT.parent / "shared" / "data" / "ag_news"), rounds=10, stock_cpus=1
    )
    train, test = data_files(args.data)
    if args.rounds < 2:
        raise SystemExit(f"--rounds: expected at least 2, since the first is left out, found {args.rounds}")
    rounds, stock_rounds = (min(args.rounds, 8), 3) if args.quick else (args.rounds, args.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, config = run_ours(folder, train, test, rounds, args.seed)
        stock, batch = (
            run_stock(folder, config, train, test, count, padding, args.stock_cpus)
            for padding, count in (("max_length", stock_rounds), ("longest", min(stock_rounds, 3)))
        )
    if ours.parameters != stock.parameters:
        raise RuntimeError(f"unequal work: {ours.parameters} trained parameters against {stock.parameters}")
    figures = {
        "parameters": ours.parameters,
        "stock_cpus_per_client": args.stock_cpus,
        "ours_rounds": len(ours.accuracy),
        "stock_rounds": len(stock.accuracy),
        "ours_seconds_per_round": ours.seconds_per_round,
        "stock_seconds_per_round": stock.seconds_per_round,
        "ratio": stock.seconds_per_round / ours.seconds_per_round,
        "stock_batch_padding_seconds_per_round": batch.seconds_per_round,
        "ratio_batch_padding": batch.seconds_per_round / ours.seconds_per_round,
        "ours_accuracy": ours.accuracy[-1],
        "stock_accuracy": stock.accuracy[-1],
        "ours_rounds_to_086": ours.rounds_to_target,
        "stock_rounds_to_086": stock.rounds_to_target,
        **{f"ours_accuracy_round_{n}": value for n, value in enumerate(ours.accuracy, start=1)},
        **{f"stock_accuracy_round_{n}": value for n, value in enumerate(stock.accuracy, start=1)},
    }
    rows = [
        ("", "Flower", "Flower, padded by batch", "fedllm"),
        ("seconds per round", stock.seconds_per_round, batch.seconds_per_round, ours.seconds_per_round),
        ("ratio to fedllm", figures["ratio"], figures["ratio_batch_padding"], 1.0),
        ("rounds", len(stock.accuracy), len(batch.accuracy), len(ours.accuracy)),
        *(
            (f"accuracy after round {n + 1}", *(_at(side.accuracy, n) for side in (stock, batch, ours)))
            for n in range(max(len(ours.accuracy), len(stock.accuracy)))
        ),
        (f"rounds to {TARGET}", *(side.rounds_to_target or "–" for side in (stock, batch, ours))),
    ]
    report(args, figures, rows, "AG News, MiniLM with LoRA, 5 of 10 clients a round")


def _at(values: Sequence[float], index: int) -> float | str:
    return values[index] if index < len(values) else ""


if __name__ == "__main__":
    main()
