"""Verdicts of a defence as a picture: clients against rounds, the colour tells the score, a cross a rejected reply."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize

from fedllm.narration import natural_key
from fedllm.outcomes import NodeVerdict, RoundRecord
from fedllm.plots import drawn_svg

_MAX_NODES, _MAX_ROUNDS = 100, 200
_SHADES = LinearSegmentedColormap.from_list(
    "verdict", ("#b2401f", "#f3c9a8", "#f2f2f2", "#a9cfe8", "#1f5f99")
)


def verdict_picture(rounds: Sequence[RoundRecord]) -> tuple[str, str] | None:
    """(description, SVG) of the newest rounds in which replies were judged; None if none was."""
    judged = [record for record in rounds if record.verdicts][-_MAX_ROUNDS:]
    if not judged:
        return None
    names = sorted({name for record in judged for name in record.verdicts}, key=natural_key)
    text = _describe(judged, names)
    names = names[:_MAX_NODES]
    size = (min(12.0, 1.6 + 0.22 * len(judged)), 0.8 + 0.16 * len(names))
    return text, drawn_svg(lambda axes: _draw(axes, judged, names), size)


def _describe(judged: Sequence[RoundRecord], names: Sequence[str]) -> str:
    verdicts = [verdict for record in judged for verdict in record.verdicts.values()]
    rejected = sum(not verdict.kept for verdict in verdicts)
    shown = f" (the first {_MAX_NODES} of {len(names)} are shown)" if len(names) > _MAX_NODES else ""
    return (
        f"Rounds {judged[0].number} to {judged[-1].number}: {rejected} of {len(verdicts)} replies of {len(names)} "
        f"clients{shown} were rejected; blue is a high score, red a low one, a cross a rejected reply"
    )


def _draw(axes: Axes, judged: Sequence[RoundRecord], names: Sequence[str]) -> None:
    absent = NodeVerdict(True, math.nan)
    grid = [[record.verdicts.get(name, absent) for record in judged] for name in names]
    finite = [abs(v.score) for row in grid for v in row if math.isfinite(v.score)]
    limit = max([*finite, 1e-9])
    axes.pcolormesh(
        [[verdict.score for verdict in row] for row in grid],
        cmap=_SHADES,
        norm=Normalize(-limit, limit),
        edgecolors="#88888855",
        linewidth=0.4,
    )
    crosses = [(x + 0.5, y + 0.5) for y, row in enumerate(grid) for x, v in enumerate(row) if not v.kept]
    if crosses:
        x, y = zip(*crosses, strict=True)
        axes.scatter(x, y, marker="x", s=9, linewidths=0.7, color="#1b2733")
    axes.invert_yaxis()
    step = math.ceil(len(judged) / 40)
    columns = range(0, len(judged), step)
    axes.set_xticks([x + 0.5 for x in columns], [str(judged[x].number) for x in columns])
    axes.set_yticks([y + 0.5 for y in range(len(names))], [name[:18] for name in names])
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("round")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
