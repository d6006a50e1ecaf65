"""Run the app once by every gradient mode, then print one table and draw one picture.

Usage: python compare.py [--rounds N] [--only MODE,MODE] [--root FOLDER]. A mode whose run is finished is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedllm.config import ModelConfig
from fedllm.errors import FedLLMError
from fedllm.history import RunHistory
from fedllm.mode_advice import advise
from fedllm.plots import Panel, Series, comparison_panels, write_png
from fedllm.report import write_report
from fedllm.study import finished_run

APP = Path(__file__).parent
ADAMW = "train.learning-rate=3e-3 train.head-learning-rate=1e-2"
MODES = {
    "backprop": ADAMW,
    "backprop-checkpointed": ADAMW,
    "backprop-top-k": ADAMW,
    "forward-ad": "",
    "zeroth-order": "train.learning-rate=1e-2 train.head-learning-rate=1e-2",
    "fwdllm": 'train.learning-rate=3e-2 train.head-learning-rate=3e-2 spry.dealing="all" spry.send-direction=true',
}
"""Client update and its settings. The zeroth-order modes cannot tell heads from adapters: what the larger learning rate
of the heads gains is lost to noise."""
MEMORY_OF = {"fwdllm": "zeroth-order"}  # two forward passes with the same memory


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default=",".join(MODES), help="modes with commas")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs and the picture")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",")]
    if unknown := sorted(set(names) - set(MODES)):
        parser.error(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
    histories = {
        name: finished_run(
            APP,
            args.root / f"forward-mode-{name}-{args.rounds}",
            f'rounds={args.rounds} client="{name}" {MODES[name]}',
        )
        for name in names
    }
    compare(histories, args.root)


def memory(mode: str, config: Mapping[str, object]) -> float:
    """Predicted peak of a step in MB, weights included: what a process takes on a CPU tells nothing of a mode."""
    lines = advise(
        ModelConfig(name=str(config["model.name"])),
        str(config["task"]),
        0,
        rank=int(str(config["lora.rank"])),
        batch=int(str(config["train.batch-size"])),
        length=int(str(config["data.max-length"])),
        targets=str(config["lora.target-modules"]),
    )
    return next(line.bytes for line in lines if line.mode == MEMORY_OF.get(mode, mode)) / 1e6


def by_bytes_up(history: RunHistory) -> Iterator[tuple[float, float]]:
    """MB that all clients have sent, and accuracy then."""
    accuracy, sent = dict(history.metric("accuracy", "server")), 0
    for record in history.closed_rounds:
        sent += record.bytes_up
        if record.number in accuracy:
            yield sent / 1e6, accuracy[record.number]


def compare(histories: Mapping[str, RunHistory], root: Path) -> None:
    """Print the table, draw the picture, and write the report of all runs."""
    table = Table(title="The same run by every gradient mode", title_justify="left", box=None)
    table.add_column("mode", no_wrap=True)
    for heading in (
        "accuracy",
        "seconds\nin clients",
        "peak MB,\npredicted",
        "kB up\na reply",
    ):
        table.add_column(heading, justify="right")
    points, sent = [], []
    for index, (mode, history) in enumerate(histories.items()):
        accuracy = history.metric("accuracy", "server")[-1][1]
        replies = [reply for record in history.closed_rounds for reply in record.replies]
        peak = memory(mode, history.config)
        points.append(Series(mode, ((peak, accuracy),), index))
        sent.append(Series(mode, tuple(by_bytes_up(history)), index))
        table.add_row(
            mode,
            f"{accuracy:.3f}",
            f"{sum(reply.seconds or 0.0 for reply in replies):.0f}",
            f"{peak:.0f}",
            f"{history.bytes_up / max(len(replies), 1) / 1e3:.1f}",
        )
    Console().print(table)
    panels = [
        *(panel for panel in comparison_panels(histories) if panel.title == "Accuracy by time"),
        Panel("Accuracy by bytes sent", tuple(sent), "MB sent by all clients"),
        Panel("Accuracy by memory", tuple(points), "predicted peak MB of a step"),
    ]
    picture = root / "forward_mode.png"
    write_png(panels, picture, "Gradient modes")
    page = write_report([root / history.name for history in histories.values()], root / "comparison.html")
    print(f"{picture}\n{page}")


if __name__ == "__main__":
    try:
        main()
    except FedLLMError as error:
        sys.exit(str(error))
