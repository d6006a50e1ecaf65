"""A plan as a picture: nodes against weights, the colour tells the rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize

from fedllm.narration import natural_key
from fedllm.outcomes import PlanRecord
from fedllm.plots import drawn_svg

_MAX_NODES = 32
_MAX_LABELS = 60
# Pale to dark, one step for each doubling of the rank; readable in print and for colour-blind eyes.
_SHADES = ("#dbe9f6", "#bad6eb", "#89bedc", "#539ecd", "#2b7bba", "#0b559f", "#08306b")


def plan_pictures(plans: Sequence[PlanRecord]) -> list[tuple[str, str]]:
    """(description, SVG) of the last plan of every phase that a run went through, in the order of their rounds."""
    newest = {plan.phase: plan for plan in plans}
    return [
        (_describe(plan), _picture(plan)) for plan in sorted(newest.values(), key=lambda plan: plan.round)
    ]


def rank_grid(plan: PlanRecord) -> tuple[list[str], list[list[int]]]:
    """Nodes in natural order, and for each the rank of every weight, 0 where it is not adapted."""
    names = sorted(plan.nodes, key=natural_key)
    return names, [[plan.nodes[name].ranks.get(weight, 0) for weight in plan.weights] for name in names]


def short_names(weights: Sequence[str]) -> list[str]:
    """Names of weights without the parts that all of them share."""
    parts = [name.split(".") for name in weights]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _describe(plan: PlanRecord) -> str:
    names, grid = rank_grid(plan)
    ranks = [rank for row in grid for rank in row if rank]
    adapted = sum(bool(rank) for row in grid for rank in row)
    shown = f" (the first {_MAX_NODES} of {len(names)})" if len(names) > _MAX_NODES else ""
    return (
        f"{plan.phase.capitalize()} from round {plan.round} on: {len(names)} clients{shown}, {adapted} of "
        f"{len(names) * len(plan.weights)} adapters, ranks {min(ranks, default=0)} to {max(ranks, default=0)}"
    )


def _picture(plan: PlanRecord) -> str:
    height = 0.9 + 0.24 * min(len(plan.nodes), _MAX_NODES) + 0.09 * max(map(len, short_names(plan.weights)))
    width = min(14.0, 2.4 + 0.2 * len(plan.weights))
    return drawn_svg(lambda axes: _draw(axes, plan), (width, height))


def _draw(axes: Axes, plan: PlanRecord) -> None:
    names, grid = rank_grid(plan)
    names, grid = names[:_MAX_NODES], grid[:_MAX_NODES]
    # Step 0 is "not adapted"; rank r is at step 1 + log2 r.
    steps = [[1 + math.log2(rank) if rank else math.nan for rank in row] for row in grid]
    highest = max((rank for row in grid for rank in row), default=1)
    scale = Normalize(0.5, max(1.5 + math.log2(max(highest, 1)), 2.5))
    axes.pcolormesh(steps, cmap=ListedColormap(_SHADES), norm=scale, edgecolors="#88888855", linewidth=0.4)
    axes.invert_yaxis()
    tasks = [plan.nodes[name] for name in names]
    labels = [
        f"{name[:18]} · {task.bits} bit · batch {task.batch_size}"
        for name, task in zip(names, tasks, strict=True)
    ]
    axes.set_yticks([row + 0.5 for row in range(len(names))], labels)
    step = math.ceil(len(plan.weights) / _MAX_LABELS)
    columns = range(0, len(plan.weights), step)
    short = short_names(plan.weights)
    axes.set_xticks([column + 0.5 for column in columns], [short[column] for column in columns], rotation=90)
    axes.tick_params(length=0, labelsize=7)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if len(plan.weights) <= _MAX_LABELS:
        for row, ranks in enumerate(grid):
            for column, rank in enumerate(ranks):
                dark = rank and scale(1 + math.log2(rank)) > 0.55
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    str(rank) if rank else "·",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "#1b2733" if rank else "#888888",
                )
