"""FedPipe against FedAvg at a fixed rank under the same budgets: rounds and time to an accuracy of 0.85 on AG News.

Ten devices with unequal shares of the data, from 80 to 500 MB. The baseline trains one rank and batch on a base of full
width, which the weak devices cannot hold: they, and the examples that only they have, take no part. FedPipe plans for
every device; its rounds may take no longer, by the time model, than the baseline's.

Two clocks, both of the slowest device of a round: *modelled* by the time model from each device's speed and link, and
*measured*: the seconds that a client's training took here, times the ratio of this machine's speed to the device's,
plus the transfer of the bytes that travelled at the device's rates.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from harness import APPS, arguments, report, run_app

from fedllm import app_config
from fedllm.events import read_events
from fedllm.resources import measured_speed
from fedllm.simulate import federation_config, prepare

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.85
BASELINE = {
    "strategy": "fixed_rank:FixedRank",
    "lora.aggregation": "factor-average",
    "fixed-rank.warmup-rounds": 0,
    "fixed-rank.ranks": 8,
    "fixed-rank.batch-sizes": 16,
    "fixed-rank.bits": 32,
}
FEDPIPE = {
    "strategy": "fedpipe",
    "fedpipe.bits": "32,8,4",
    "fedpipe.batch-sizes": "4,8,16",
    "fedpipe.warmup-steps": 10,
}


@dataclass(frozen=True)
class Measured:
    """What became of one run.

    Attributes:
        accuracy: after every round.
        modelled: seconds of every round by the time model.
        measured: seconds of every round, measured and scaled to the devices.
        wall: seconds of every round here.
        devices: that trained in the last round.
    """

    accuracy: list[float]
    modelled: list[float]
    measured: list[float]
    wall: list[float]
    devices: int

    @property
    def rounds_to_target(self) -> int | None:
        """The first round with the target accuracy."""
        return next((number for number, value in enumerate(self.accuracy, start=1) if value >= TARGET), None)

    def to_target(self, seconds: list[float]) -> float | None:
        """Seconds until then, by one of the clocks."""
        rounds = self.rounds_to_target
        return None if rounds is None else list(accumulate(seconds))[rounds - 1]


def run(folder: Path, name: str, keys: Mapping[str, Any], speed: float) -> Measured:
    """Run one side and read its events."""
    settings = {**keys, "run.root": str(folder / "runs")}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    job = prepare(APPS / "fixed_rank", overrides, name=name)
    run_app(app_config.stage(job.app, job.config, folder / name), federation_config(job.config))
    events = read_events(job.run_dir / "events.jsonl")
    flops = dict(enumerate(job.config.simulation.flops_per_second))
    timed = [event for event in events if event["event"] == "round-timed"]
    replies = [event for event in events if event["event"] == "node-replied" and event["phase"] == "train"]
    rates = job.config.simulation.upload_rate[0], job.config.simulation.download_rate[0]

    def scaled(event: Mapping[str, Any]) -> float:
        transfer = event["bytes_up"] / rates[0] + event["bytes_down"] / rates[1]
        return float(event["seconds"] * speed / flops[int(event["node"])] + transfer)

    rounds = [event["round"] for event in timed]
    return Measured(
        accuracy=[e["metrics"]["accuracy"] for e in events if e["event"] == "evaluated" and e["round"] > 0],
        modelled=[event["seconds"] for event in timed],
        measured=[max(scaled(event) for event in replies if event["round"] == number) for number in rounds],
        wall=[event["seconds"] for event in events if event["event"] == "round-finished"],
        devices=len(timed[-1]["nodes"]),
    )


def main() -> None:
    args = arguments(__doc__ or "", data=str(ROOT.parent / "shared" / "data" / "ag_news"), rounds=30)
    train, test = (Path(args.data).expanduser().resolve() / name for name in ("train.csv", "test.csv"))
    if missing := [str(path) for path in (train, test) if not path.is_file()]:
        raise SystemExit(
            f"not found: {', '.join(missing)}; pass --data FOLDER with AG News as train.csv and test.csv "
            "(columns text and label)"
        )
    torch.set_num_threads(1)
    speed = measured_speed(torch.device("cpu"))
    shared: dict[str, Any] = {"data.source": str(train), "data.test-file": str(test), "seed": args.seed}
    shared["rounds"] = min(args.rounds, 10) if args.quick else args.rounds
    if args.quick:
        shared |= {"data.test-rows": 500}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fixed = run(folder, "fixed", {**shared, **BASELINE}, speed)
        deadline = max(fixed.modelled)
        ours = run(folder, "fedpipe", {**shared, **FEDPIPE, "fedpipe.deadline": deadline}, speed)
    sides = {"fedavg": fixed, "fedpipe": ours}
    figures: dict[str, Any] = {"target": TARGET, "deadline_seconds": deadline, "machine_flops": speed}
    for side, found in sides.items():
        figures |= {
            f"{side}_devices": found.devices,
            f"{side}_rounds_to_085": found.rounds_to_target,
            f"{side}_modelled_seconds_to_085": found.to_target(found.modelled),
            f"{side}_measured_seconds_to_085": found.to_target(found.measured),
            f"{side}_wall_seconds": sum(found.wall),
            f"{side}_accuracy": found.accuracy[-1],
            f"{side}_best_accuracy": max(found.accuracy),
            **{f"{side}_accuracy_round_{n}": value for n, value in enumerate(found.accuracy, start=1)},
        }
    labels = {
        "devices that train": "devices",
        f"rounds to {TARGET}": "rounds_to_085",
        f"modelled seconds to {TARGET}": "modelled_seconds_to_085",
        f"measured seconds to {TARGET}": "measured_seconds_to_085",
        "accuracy after the last round": "accuracy",
        "best accuracy": "best_accuracy",
        "seconds here, all rounds": "wall_seconds",
    }
    rows: list[tuple[object, ...]] = [("", "FedAvg, fixed rank", "FedPipe")]
    rows += [
        (label, *("–" if (value := figures[f"{side}_{key}"]) is None else value for side in sides))
        for label, key in labels.items()
    ]
    report(args, figures, rows, f"AG News, MiniLM, ten devices of 80 to 500 MB, {shared['rounds']} rounds")


if __name__ == "__main__":
    main()
