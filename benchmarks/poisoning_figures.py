"""What :mod:`poisoning` reports: figures of the cells that there are, and the heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from poisoning_cells import ANY, Row
from poisoning_defences import ORACLE, OURS, TRUSTING

IID = 100.0
EXEMPT = ("min-max", "min-max-std", "min-sum", "alie-1", "alie-1.5", "alie-tuned")
"""Colluders inside the honest spread: on IID data (α of 100 or more) no rule on updates can tell them."""
APART = ("none", "adaptive")
"""Not among the attacks of a worst gap: no attack, and the one that is reported by itself."""
CAUGHT = 0.1
"""Attackers are caught from the round on in which, and after which, at most this share of them is kept."""


@dataclass(frozen=True)
class Gap:
    """A cell's means over seeds: points below the oracle, and the share of the rows that a trigger turns."""

    clients: int
    alpha: float
    share: float
    attack: str
    defence: str
    gap: float
    success: float

    @property
    def place(self) -> tuple[Any, ...]:
        """Where defences compare."""
        return self.clients, self.alpha, self.share, self.attack

    @property
    def exempt(self) -> bool:
        """Whether it is impossible in principle to tell the attackers."""
        return self.alpha >= IID and self.attack in EXEMPT


def gaps(rows: Iterable[Row]) -> list[Gap]:
    """Of all cells whose oracle is there, too; rows must be of one onset."""
    rows = list(rows)
    oracle = {_setting(row): row["accuracy"] for row in rows if row["attack"] == ANY}
    grouped: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if _setting(row) in oracle and row["attack"] != ANY:
            key = tuple(row[name] for name in ("clients", "alpha", "share", "attack", "defence"))
            gap = 100 * (oracle[_setting(row)] - row["accuracy"])
            grouped.setdefault(key, []).append((gap, row["attack_success"]))
    return [
        Gap(*key, mean(gap for gap, _ in found), mean(success for _, success in found))
        for key, found in grouped.items()
    ]


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("clients", "alpha", "share", "onset", "rounds", "seed"))


def worst(
    found: Iterable[Gap], defence: str, share: float, among: Callable[[Gap], bool] = lambda gap: True
) -> float | None:
    """A defence's largest gap over attacks and settings; None if none was run."""
    return max(
        (
            g.gap
            for g in found
            if g.defence == defence and g.share == share and g.attack not in APART and among(g)
        ),
        default=None,
    )


def under(found: Iterable[Gap], defence: str, attack: str, share: float | None = None) -> float | None:
    """A defence's largest gap under one attack, over settings, and over shares unless one is given."""
    chosen = [g for g in found if g.defence == defence and g.attack == attack]
    return max((g.gap for g in chosen if share is None or g.share == share), default=None)


def lead(
    found: Sequence[Gap], defence: str, rivals: Iterable[str], among: Callable[[Gap], bool]
) -> float | None:
    """Points by which a defence beats the best of its rivals where it does so least; below 0 it loses."""
    best: dict[tuple[Any, ...], float] = {}
    names = set(rivals)
    for g in found:
        if g.defence in names:
            best[g.place] = min(g.gap, best.get(g.place, math.inf))
    leads = [best[g.place] - g.gap for g in found if g.defence == defence and g.place in best and among(g)]
    return min(leads, default=None)


def _worst_success(found: Iterable[Gap], defence: str, share: float) -> float | None:
    shares = (g.success for g in found if (g.defence, g.share, g.attack) == (defence, share, "backdoor"))
    return max(shares, default=None)


def main_figures(rows: Sequence[Row], share: float = 0.8) -> dict[str, Any]:
    """Of the table: attackers honest in the first two rounds."""
    found = gaps(rows)
    rivals = {g.defence for g in found} - set(OURS)
    adaptive = [
        row for row in rows if (row["defence"], row["attack"], row["share"]) == ("vert", "adaptive", share)
    ]

    def attacked(gap: Gap) -> bool:
        return gap.share == share and gap.attack not in APART

    def exempt(gap: Gap) -> bool:
        return attacked(gap) and gap.exempt

    figures: dict[str, Any] = {}
    for name in ("vert", "vert-known", "temporal-cosine", "vert-paper"):
        key = name.replace("-", "_")
        figures[f"{key}_worst_gap_to_oracle_at_80"] = worst(found, name, share)
        figures[f"{key}_worst_gap_outside_exempt_at_80"] = worst(found, name, share, lambda g: not g.exempt)
    return figures | {
        "vert_minus_best_rival_on_exempt_at_80": lead(found, "vert", rivals, exempt),
        "vert_minus_best_rival_without_trusted_data_on_exempt_at_80": lead(
            found, "vert", rivals - set(TRUSTING), exempt
        ),
        "vert_auto_minus_known_worst_at_80": lead(found, "vert", ["vert-known"], attacked),
        "vert_loss_without_attack": under(found, "vert", "none"),
        **{f"{name}_backdoor_success_at_80": _worst_success(found, name, share) for name in ("vert", "mean")},
        "vert_gap_under_adaptive_attack": under(found, "vert", "adaptive"),
        "vert_gap_under_adaptive_attack_at_80": under(found, "vert", "adaptive", share),
        "adaptive_queries_per_round": _per_round(adaptive, "queries"),
        "adaptive_candidates_per_round": _per_round(adaptive, "candidates"),
        "adaptive_seconds_per_round": _per_round(adaptive, "attack_seconds"),
        "adaptive_strength": mean(row["strength"] for row in adaptive) if adaptive else None,
    }


def _per_round(rows: Sequence[Row], name: str) -> float | None:
    return mean(row[name] / (row["rounds"] - row["onset"]) for row in rows) if rows else None


def rounds_to_catch(by_round: Sequence[float]) -> int:
    """In which round of the attack they are caught for good: 1: in that of turning; one more than there are: never."""
    escaped = [number for number, share in enumerate(by_round, start=1) if share > CAUGHT]
    return 1 + max(escaped, default=0)


def late_figures(rows: Sequence[Row], share: float = 0.8) -> dict[str, Any]:
    """Of attackers that turn late: rounds until they are caught, the worst cell of each attack."""
    ours = [row for row in rows if row["defence"] == "vert" and row["attack"] != ANY]
    caught = {attack: list[int]() for attack in dict.fromkeys(row["attack"] for row in ours)}
    told, outside = list[int](), list[int]()
    for row in ours:
        rounds = rounds_to_catch(row["hostile_by_round"])
        caught[row["attack"]].append(rounds)
        if row["attack"] not in APART:
            told.append(rounds)
            if not (row["alpha"] >= IID and row["attack"] in EXEMPT):
                outside.append(rounds)
    return {
        "vert_late_worst_gap_to_oracle_at_80": worst(gaps(rows), "vert", share),
        **{f"late_rounds_to_catch_{attack}": max(found) for attack, found in caught.items()},
        "late_rounds_to_catch_worst": max(told, default=None),
        "late_rounds_to_catch_worst_outside_exempt": max(outside, default=None),
        "late_caught_at_once_share": mean(n == 1 for n in told) if told else None,
        "late_rounds_of_attack": max((row["rounds"] - row["onset"] for row in ours), default=None),
    }


def start_figures(rows: Sequence[Row], share: float = 0.8) -> dict[str, Any]:
    """Of attackers that are hostile from the first round, against trusted rows."""
    found = gaps(rows)
    return {
        "vert_root_from_start_worst_gap_at_80": worst(found, "vert-root", share),
        "vert_root_from_start_worst_gap_outside_exempt_at_80": worst(
            found, "vert-root", share, lambda g: not g.exempt
        ),
        "vert_root_from_start_gap_under_adaptive_attack": under(found, "vert-root", "adaptive", share),
        "fltrust_from_start_worst_gap_at_80": worst(found, "fltrust", share),
    }


def covered(rows: Iterable[Row]) -> dict[str, str]:
    """What the figures rest on, as lists with commas."""
    rows = list(rows)
    found: dict[str, str] = {}
    for plural, name in (
        ("clients", "clients"),
        ("alphas", "alpha"),
        ("shares", "share"),
        ("seeds", "seed"),
        ("attacks", "attack"),
        ("defences", "defence"),
    ):
        values = sorted({row[name] for row in rows})
        found[f"covered_{plural}"] = ",".join(v if isinstance(v, str) else f"{v:g}" for v in values)
    return found


def draw(found: Sequence[Gap], path: Path, share: float) -> None:
    """Heat map of the worst gap over settings: attacks down, defences across; a dash where there is no cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [g for g in found if g.share == share and g.defence != ORACLE]
    names = list(dict.fromkeys(g.defence for g in shown))
    attacks = list(dict.fromkeys(g.attack for g in shown))
    if not shown:
        return
    table = [
        [max((g.gap for g in shown if (g.attack, g.defence) == (a, d)), default=math.nan) for d in names]
        for a in attacks
    ]
    size = (1.5 + 0.55 * len(names), 1.6 + 0.3 * len(attacks))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    image = axes.imshow(table, cmap="magma_r", vmin=0, vmax=80, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(attacks)), attacks, fontsize=7)
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            text, color = (
                ("–", "black") if math.isnan(value) else (f"{value:.0f}", "white" if value > 45 else "black")
            )
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=color)
    title = f"points below the honest clients' mean, {share:.0%} hostile, worst setting"
    axes.set_title(title, fontsize=8, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
