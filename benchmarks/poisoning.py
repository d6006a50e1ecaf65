"""Every attack against every defence on MNIST digits: accuracy, gap to the mean of the honest clients, and cost.

A cell is (clients, Dirichlet α, attackers' share, attack, defence, seed). Cells that --csv holds, and that the present
code would play alike, are not played again, so a long run can be interrupted, and parts can be run one by one:
``--clients 20 --only-share 0.8 --seeds 1``. Figures are of all cells that are there; the JSON says which (covered_*).
A gap is the oracle's accuracy minus the defence's, in points, mean over seeds; the worst is over attacks and settings.

Parts: ``table``: attackers are honest in the first --onset rounds, as the publication has it. ``late``: 80 % turn after
round 5; how many rounds until VERT has caught them. ``start``: 80 % are hostile from the first round, and the server
has 100 trusted rows. ``cost``: time and memory of a round for 100 clients × 10 M parameters.

Exempt, because nothing in the updates tells them: Min-Max, Min-Sum and ALIE on IID data (α of 100 or more). The
adaptive attack, which knows VERT's state, has keys of its own and is in no worst gap.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mnist
import poisoning_figures as figures_of
import torch
from harness import arguments, chosen, console, report
from poisoning_arena import ATTACKS, Arena, play
from poisoning_cells import Cell, Cells, Row, Setting, table
from poisoning_cost import cost
from poisoning_defences import ORACLE, defences

PARTS = ("table", "late", "start", "cost")
SHARE = 0.8
"""Of the attackers where a claim is made."""
LATE_ONSET, LATE_ROUNDS = 5, 10
FROM_START = ("vert-root", "fltrust")
QUICK_ATTACKS = "sign-flip,scaling,label-flip,backdoor,alie-1.5,min-max,adaptive"
QUICK_DEFENCES = "mean,multi-krum,temporal-cosine,vert-paper,vert-known,vert"


def planned(args: Any, parts: Sequence[str]) -> list[Cell]:
    """The cells that are asked for, one seed after the other."""
    attacks = chosen(args.attacks, [name for name in ATTACKS if name != "none"], "--attacks")
    names = chosen(args.defences, [name for name in defences(20, 16, 0) if name != ORACLE], "--defences")
    shares = _numbers(args.only_share or args.shares, "--shares")
    if any(not 0 <= share < 1 for share in shares):
        raise SystemExit(
            f"--shares: expected shares from 0 to below 1, found {args.only_share or args.shares}"
        )
    settings = itertools.product(
        range(args.seed, args.seed + args.seeds),
        (int(n) for n in _numbers(args.clients, "--clients")),
        _numbers(args.alphas, "--alphas"),
    )
    cells: list[Cell] = []
    for seed, clients, alpha in settings:
        setting: Setting = (clients, alpha, seed)
        for share in shares:
            if "table" in parts:
                cells += table(setting, [share], attacks, names, args.onset, args.rounds)
            if share == SHARE and "late" in parts:
                cells += table(setting, [share], attacks, ["vert"], LATE_ONSET, LATE_ROUNDS)
            if share == SHARE and "start" in parts:
                cells += table(setting, [share], attacks, FROM_START, 0, args.rounds)
    return list(dict.fromkeys(cells))


def _numbers(asked: str, option: str) -> list[float]:
    try:
        return [float(part) for part in asked.split(",")]
    except ValueError:
        raise SystemExit(f"{option}: expected numbers with commas, found {asked!r}") from None


def run(wanted: Sequence[Cell], cells: Cells) -> None:
    """Play the cells that are missing."""
    missing = [cell for cell in wanted if cell not in cells.rows]
    console.print(f"{len(wanted)} cells, {len(missing)} to be played", style="dim")
    arena, of = None, None
    started = time.perf_counter()
    for index, cell in enumerate(missing, start=1):
        setting = (cell.clients, cell.alpha, cell.share, cell.seed)
        if arena is None or of != setting:
            arena, of = Arena(*setting), setting
        began = time.perf_counter()
        defence = defences(arena.n, int(arena.hostile.sum()), cell.seed)[cell.defence]()
        outcome = play(arena, cell.attack, defence, cell.rounds, cell.onset)
        cells.put(cell, outcome, time.perf_counter() - began)
        if index % 20 == 0:
            spent = (time.perf_counter() - started) / 60
            left = spent / index * (len(missing) - index)
            console.print(
                f"{index} of {len(missing)} cells, {spent:.1f} min, about {left:.0f} min to go", style="dim"
            )


def figures(rows: Sequence[Row], args: Any) -> dict[str, Any]:
    """Of all rows of these numbers of rounds; a key of what was not run is null."""
    of_table = _part(rows, args.onset, args.rounds)
    late, start = _part(rows, LATE_ONSET, LATE_ROUNDS), _part(rows, 0, args.rounds)
    return {
        **figures_of.main_figures(of_table, SHARE),
        **figures_of.late_figures(late, SHARE),
        **figures_of.start_figures(start, SHARE),
        **figures_of.covered(of_table),
        "cells": len(of_table),
        "cells_late": len(late),
        "cells_from_start": len(start),
    }


def _part(rows: Sequence[Row], onset: int, rounds: int) -> list[Row]:
    return [row for row in rows if (row["onset"], row["rounds"]) == (onset, rounds)]


def main() -> None:
    args = arguments(
        __doc__ or "",
        clients=("20,100", "numbers of clients, with commas"),
        alphas=("100,1.0,0.3", "Dirichlet concentrations of the labels, with commas"),
        shares=("0.0,0.2,0.5,0.8,0.9", "attackers' shares, with commas"),
        only_share=("", "these shares instead, for a part that is run by itself, such as 0.8"),
        seeds=(3, "how many seeds, from --seed on"),
        attacks=("", f"attacks with commas; none: all of {', '.join(ATTACKS[1:])}"),
        defences=("", f"defences with commas; none: all of {', '.join(defences(20, 16, 0))}"),
        parts=("", f"parts with commas; none: all of {', '.join(PARTS)}"),
        rounds=(20, "rounds of a run"),
        onset=(2, "rounds in which attackers are honest, in the table"),
        csv=("benchmarks/results/poisoning.csv", "finished cells, read and added to"),
        png=("", "heat map; none: beside the CSV"),
        figures_only=(False, "play nothing: figures of the cells that --csv holds"),
        cost_only=(False, "only the part cost"),
    )
    if args.quick:
        args.clients, args.alphas, args.shares, args.seeds, args.rounds = "20", "100,0.3", "0.0,0.8", 1, 12
        args.attacks, args.defences = args.attacks or QUICK_ATTACKS, args.defences or QUICK_DEFENCES
    parts = ["cost"] if args.cost_only else chosen(args.parts, PARTS, "--parts")
    wanted = planned(args, parts)
    found: dict[str, Any] = {}
    rows: list[Any] = [("cost", "value")]
    torch.set_num_threads(1)
    if parts != ["cost"]:
        digits = mnist.load_digits(0).name
        cells = Cells(Path(args.csv), digits)
        if cells.stale:
            console.print(
                f"{cells.stale} cells were of other code and moved to a .stale.csv file", style="dim"
            )
        if not args.figures_only:
            run(wanted, cells)
        played = list(cells.rows.values())
        found = {**figures(played, args), "digits": digits}
        found["cells_missing"] = sum(cell not in cells.rows for cell in wanted)
        of_table = figures_of.gaps(_part(played, args.onset, args.rounds))
        rows = _table(of_table)
        figures_of.draw(of_table, Path(args.png or Path(args.csv).with_suffix(".png")), SHARE)
    if "cost" in parts and not args.figures_only:
        torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
        spent = cost(100, 1_000_000 if args.quick else 10_000_000)
        found |= spent
        if parts == ["cost"]:
            rows += spent.items()
        else:
            console.print(", ".join(f"{name}={value:.4g}" for name, value in spent.items()), style="dim")
    title = "Points below the mean of the honest clients, worst attack and setting"
    report(args, found, rows, "What a round of VERT costs the server" if parts == ["cost"] else title)


def _table(found: Sequence[figures_of.Gap]) -> list[Any]:
    shares = sorted({gap.share for gap in found})
    rows: list[Any] = [("defence", *(f"{share:.0%}" for share in shares))]
    for name in dict.fromkeys(gap.defence for gap in found):
        values = [
            figures_of.worst(found, name, share) if share else figures_of.under(found, name, "none", share)
            for share in shares
        ]
        rows.append((name, *("–" if value is None else f"{value:.1f}" for value in values)))
    return rows


if __name__ == "__main__":
    main()
