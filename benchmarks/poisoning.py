"""Every attack against every defence on MNIST digits: accuracy, gap to the mean of the honest clients, and cost.

A cell is (clients, Dirichlet α, attackers' share, attack, defence, seed); cells that ``--csv`` already holds are not
run again, so a long run can be interrupted. The gap of a cell is the oracle's accuracy minus the defence's, in points;
a defence's worst gap at 80 % is the largest mean over seeds among all attacks and settings. Attackers are honest in the
first two rounds (``--onset``), as the publication has it; with ``--onset 0`` only trusted data can tell.

Excluded from the worst gap: ``backdoor``, which hides from accuracy (its success rate is in the CSV), and ``adaptive``,
which is reported by itself.
"""

from __future__ import annotations

import csv
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.sketch import Sketcher
from harness import arguments, console, report
from poisoning_arena import ATTACKS, Arena, defences, play

FIELDS = (
    "clients", "alpha", "share", "onset", "rounds", "attack", "defence", "seed",
    "accuracy", "attack_success", "honest_kept", "hostile_kept", "seconds",
)  # fmt: skip
KEY = FIELDS[:8]
APART = ("none", "backdoor", "adaptive")
Row = dict[str, Any]


def cells(args: Any) -> list[tuple[Any, ...]]:
    """All (clients, α, share, attack, defence, seed) that are asked for."""
    names = list(defences(20, 16, 0))
    chosen = args.defences.split(",") if args.defences else names
    attacks = args.attacks.split(",") if args.attacks else list(ATTACKS)
    if unknown := [name for name in chosen if name not in names] + [a for a in attacks if a not in ATTACKS]:
        raise SystemExit(
            f"unknown: {', '.join(unknown)}; defences: {', '.join(names)}; attacks: {', '.join(ATTACKS)}"
        )
    numbers = [
        [int(n) for n in args.clients.split(",")],
        [float(a) for a in args.alphas.split(",")],
        [float(s) for s in args.shares.split(",")],
    ]
    seeds = range(args.seed, args.seed + args.seeds)
    return list(itertools.product(*numbers, seeds, attacks, dict.fromkeys(["oracle", *chosen])))


def run(args: Any) -> list[Row]:
    """Play the cells that are missing; returns all that were asked for."""
    path = Path(args.csv)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(row[k] for k in KEY): row for row in read(path)}
    wanted, rows, arena_of = cells(args), [], {}
    started = time.perf_counter()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for index, (n, alpha, share, seed, attack, defence) in enumerate(wanted, start=1):
            key = (n, alpha, share, args.onset, args.rounds, attack, defence, seed)
            if key not in done:
                setting = (n, alpha, share, seed)
                if setting not in arena_of:
                    arena_of = {setting: Arena(*setting)}
                done[key] = dict(zip(KEY, key, strict=True)) | _play(
                    arena_of[setting], args, attack, defence, seed
                )
                writer.writerow(done[key])
                file.flush()
                if index % 20 == 0:
                    minutes = (time.perf_counter() - started) / 60
                    console.print(f"{index} of {len(wanted)} cells, {minutes:.1f} min", style="dim")
            rows.append(done[key])
    return rows


def _play(arena: Arena, args: Any, attack: str, defence: str, seed: int) -> Row:
    began = time.perf_counter()
    made = defences(arena.n, int(arena.hostile.sum()), seed)[defence]()
    outcome = play(arena, attack, made, args.rounds, args.onset)
    return {**vars(outcome), "seconds": round(time.perf_counter() - began, 2)}


def read(path: Path) -> list[Row]:
    """The cells of an earlier run."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _typed(name, value) for name, value in row.items()} for row in csv.DictReader(file)]


def _typed(name: str, value: str) -> Any:
    if name in ("attack", "defence"):
        return value
    return int(value) if name in ("clients", "onset", "rounds", "seed") else float(value)


def gaps(rows: Sequence[Row]) -> list[Row]:
    """Mean gap to the oracle in points over seeds, by clients, α, share, attack and defence."""
    oracle = {_cell(row): row["accuracy"] for row in rows if row["defence"] == "oracle"}
    grouped: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("clients", "alpha", "share", "attack", "defence"))
        grouped.setdefault(key, []).append(100 * (oracle[_cell(row)] - row["accuracy"]))
    names = ("clients", "alpha", "share", "attack", "defence")
    return [dict(zip(names, key, strict=True)) | {"gap": mean(values)} for key, values in grouped.items()]


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("clients", "alpha", "share", "attack", "seed"))


def worst(found: Sequence[Row], defence: str, share: float) -> float | None:
    """A defence's largest gap over attacks and settings; None if it was not run."""
    values = [
        row["gap"]
        for row in found
        if row["defence"] == defence and row["share"] == share and row["attack"] not in APART
    ]
    return max(values, default=None)


def largest(found: Sequence[Row], defence: str, attack: str) -> float | None:
    """A defence's largest gap under one attack, over all shares and settings."""
    values = [row["gap"] for row in found if row["defence"] == defence and row["attack"] == attack]
    return max(values, default=None)


def draw(found: Sequence[Row], path: Path, share: float) -> None:
    """Heat map of the worst gap over settings: attacks down, defences across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["defence"] for row in found if row["defence"] != "oracle"))
    attacks = list(dict.fromkeys(row["attack"] for row in found))
    table = [
        [
            max(
                (r["gap"] for r in found if (r["attack"], r["defence"], r["share"]) == (a, d, share)),
                default=0.0,
            )
            for d in names
        ]
        for a in attacks
    ]
    figure = Figure(
        figsize=(1.5 + 0.55 * len(names), 1.6 + 0.3 * len(attacks)), layout="constrained", dpi=150
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="magma_r", vmin=0, vmax=80, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(attacks)), attacks, fontsize=7)
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            axes.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if value > 45 else "black",
            )
    axes.set_title(
        f"points below the honest clients' mean, {share:.0%} hostile, worst setting", fontsize=8, loc="left"
    )
    figure.colorbar(image, ax=axes, shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def cost(clients: int, parameters: int) -> dict[str, float]:
    """Seconds a round to sketch and judge, and bytes that are kept, against holding all updates."""
    sketcher, detector = Sketcher(512), Detector(512)
    start, new = torch.zeros(parameters), torch.randn(parameters)
    names, seconds = [str(index) for index in range(clients)], []
    for server_round in range(1, 4):
        sketches, began = [], time.perf_counter()
        for index in range(clients):
            vector, square = sketcher.tensor("w", new, start)
            sketches.append((vector * (1 + 0.01 * index), square**0.5))
        detector.judge(
            server_round,
            names,
            torch.stack([v for v, _ in sketches]),
            torch.tensor([norm for _, norm in sketches]),
        )
        seconds.append(time.perf_counter() - began)
    kept = detector.nbytes + sketcher.nbytes + 4 * 512 * clients
    return {
        "cost_clients": clients,
        "cost_parameters": parameters,
        "cost_seconds_per_round": min(seconds[1:]),  # the first round draws the tables
        "cost_bytes": kept,
        "cost_share_of_all_updates": kept / (4.0 * clients * parameters),
    }


def main() -> None:
    args = arguments(
        __doc__ or "", clients="20,100", alphas="100,1.0,0.3", shares="0.0,0.2,0.5,0.8,0.9", seeds=3, rounds=20,
        onset=2, attacks="", defences="", csv="benchmarks/results/poisoning.csv", png="", cost_only=False,
    )  # fmt: skip
    if args.quick:
        args.clients, args.alphas, args.shares, args.seeds, args.rounds = "20", "100,0.3", "0.0,0.8", 1, 12
        args.attacks = args.attacks or "none,sign-flip,scaling,label-flip,alie-1.5,min-max"
        args.defences = args.defences or "mean,multi-krum,temporal-cosine,vert-paper,vert"
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    rows: list[Any] = [("cost", "value")]
    if not args.cost_only:
        played = run(args)
        found = gaps(played)
        figures |= {
            "vert_worst_gap_to_oracle_at_80": worst(found, "vert", 0.8),
            "vert_known_worst_gap_to_oracle_at_80": worst(found, "vert-known", 0.8),
            "vert_loss_without_attack": largest(found, "vert", "none"),
            "vert_gap_under_adaptive_attack": largest(found, "vert", "adaptive"),
            "temporal_cosine_worst_gap_to_oracle_at_80": worst(found, "temporal-cosine", 0.8),
            "vert_paper_worst_gap_to_oracle_at_80": worst(found, "vert-paper", 0.8),
            "cells": len(played),
        }
        names = list(dict.fromkeys(row["defence"] for row in played))
        rows = [("defence", *(f"{share:.0%}" for share in sorted({r["share"] for r in played})))]
        rows += [
            (name, *(_shown(worst(found, name, share)) for share in sorted({r["share"] for r in played})))
            for name in names
        ]
        draw(found, Path(args.png or Path(args.csv).with_suffix(".png")), 0.8)
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    spent = cost(100, 1_000_000 if args.quick else 10_000_000)
    if args.cost_only:
        rows += spent.items()
    else:
        console.print(", ".join(f"{name}={value:.4g}" for name, value in spent.items()), style="dim")
    figures |= spent
    report(args, figures, rows, "Points below the mean of the honest clients, worst attack and setting")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
