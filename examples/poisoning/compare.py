"""Run the app under every attack with every defence, then print one table and draw one picture.

Usage: python compare.py [--rounds N] [--attacks A,A] [--defences D,D] [--root FOLDER] [-c OVERRIDES]. A run that is
finished is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedllm.errors import FedLLMError
from fedllm.history import RunHistory
from fedllm.plots import Panel, Series, write_png
from fedllm.report import write_report
from fedllm.study import checked, finished_run

APP = Path(__file__).parent
ATTACKS = ("none", "sign-flip", "label-flip", "alie")
DEFENCES = ("none", "multi-krum", "vert")
SETTINGS = {"multi-krum": "multi-krum.attackers=0.4"}
"""What a defence must be told; Multi-Krum can allow for less than a half."""
Runs = Mapping[tuple[str, str], RunHistory]


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="as in the key attack, with commas")
    parser.add_argument("--defences", default=",".join(DEFENCES), help="as in the key defence, with commas")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/poisoning"), help="folder of all that is written"
    )
    parser.add_argument(
        "-c", dest="overrides", default="", help="further keys of the configuration, for all runs"
    )
    args = parser.parse_args()
    root = args.root.resolve()
    attacks, defences = args.attacks.split(","), args.defences.split(",")
    settings = {
        (attack, defence): f'rounds={args.rounds} attack="{attack}" defence="{defence}" '
        f"{SETTINGS.get(defence, '')} {args.overrides}"
        for attack, defence in itertools.product(attacks, defences)
    }
    for asked in settings.values():
        checked(APP, asked)
    runs = {
        (attack, defence): finished_run(APP, root / f"{attack}-against-{defence}-{args.rounds}", asked)
        for (attack, defence), asked in settings.items()
    }
    compare(runs, attacks, defences, root)


def rejected(history: RunHistory) -> str:
    """Rejected replies among all, before and since the attack began."""
    onset = int(str(history.config["attack-from-round"]))
    cells = []
    for chosen in (
        [record for record in history.ordered_rounds if record.number < onset],
        [record for record in history.ordered_rounds if record.number >= onset],
    ):
        verdicts = [verdict for record in chosen for verdict in record.verdicts.values()]
        cells.append(f"{sum(not verdict.kept for verdict in verdicts)}/{len(verdicts)}")
    return " ".join(cells)


def compare(runs: Runs, attacks: Sequence[str], defences: Sequence[str], root: Path) -> None:
    """Print the table, draw the picture, and write the report of all runs."""
    table = Table(
        title="Accuracy after the last round (rejected replies before and since the attack began)",
        title_justify="left",
        box=None,
    )
    table.add_column("attack")
    for defence in defences:
        table.add_column("no defence" if defence == "none" else defence, justify="right")
    panels = []
    for attack in attacks:
        curves = [runs[attack, defence].metric("accuracy", "server") for defence in defences]
        table.add_row(
            attack,
            *(
                f"{curve[-1][1]:.3f}" + ("" if defence == "none" else f" ({rejected(runs[attack, defence])})")
                for curve, defence in zip(curves, defences, strict=True)
            ),
        )
        series = tuple(
            Series("no defence" if defence == "none" else defence, tuple(curve), index)
            for index, (curve, defence) in enumerate(zip(curves, defences, strict=True))
        )
        panels.append(Panel(f"Accuracy, attack: {attack}", series))
    Console().print(table)
    picture = root / "poisoning.png"
    write_png(panels, picture, "Attacks and defences")
    page = write_report([root / history.name for history in runs.values()], root / "comparison.html")
    print(f"{picture}\n{page}")


if __name__ == "__main__":
    try:
        main()
    except FedLLMError as error:
        sys.exit(str(error))
