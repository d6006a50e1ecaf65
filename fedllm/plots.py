"""Pictures of runs: panels of curves and bars, as one PNG or as inline SVGs that follow the page's colours.

:func:`run_panels` and :func:`comparison_panels` decide what is shown, :func:`write_png` and :func:`svg` draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullFormatter

from fedllm.history import RunHistory
from fedllm.narration import format_value
from fedllm.outcomes import HEADLINE_METRICS, RoundRecord

Point = tuple[float, float]

# Readable on white and on near-black alike, and apart from each other for colour-blind eyes.
COLOURS = ("#2f7fd6", "#e0731d", "#1f9e77", "#c2528b", "#8a6fd1", "#9a8a14", "#3aa6b9", "#d14b4b")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_NAMES = {"macro-f1": "macro-F1", "loss": "test loss", "bleu": "BLEU", "chrf": "chrF"}
_PLACES = ("server", "clients")
# A colour that no palette has: it becomes the page's own text colour in an SVG.
_INK = "#010203"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedllm",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_MAX_LABEL = 22


@dataclass(frozen=True)
class Series:
    """A named curve, or one layer of stacked bars."""

    label: str
    points: tuple[Point, ...]
    colour: int


@dataclass(frozen=True)
class Panel:
    """One picture: its title says what is on the vertical axis, with the unit."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "round"
    kind: Literal["curve", "bar"] = "curve"

    @property
    def alt(self) -> str:
        """What the picture shows, for those who cannot see it."""
        ends = "; ".join(
            f"{series.label} ends at {series.points[-1][1]:.4g}".strip() for series in self.series
        )
        return f"{self.title} against {self.x_label}: {ends}"


def run_panels(history: RunHistory) -> list[Panel]:
    """Metrics, losses, bytes and seconds of one run by round; what was never measured has no panel."""
    others = {name for where in _PLACES for name in history.metric_names(where)} - HEADLINE_METRICS.keys()
    groups = [("accuracy", "macro-f1"), ("perplexity",), *((name,) for name in sorted(others))]
    losses = [Series("train", _train_loss(history), 1)]
    losses += [
        Series(f"test ({where})", tuple(history.metric("loss", where)), _shade(where)) for where in _PLACES
    ]
    closed = history.closed_rounds
    traffic = [
        Series("up", tuple((r.number, r.bytes_up / 1e6) for r in closed), 0),
        Series("down", tuple((r.number, r.bytes_down / 1e6) for r in closed), 1),
    ]
    seconds = [Series("", tuple((r.number, r.seconds or 0.0) for r in closed), 2)]
    panels = [
        *(_metrics_panel(history, names) for names in groups),
        _panel("Loss", losses),
        _panel("Traffic per round (MB)", traffic, kind="bar"),
        _panel("Time per round (seconds)", seconds, kind="bar"),
    ]
    return [panel for panel in panels if panel.series]


def comparison_panels(histories: Mapping[str, RunHistory]) -> list[Panel]:
    """The same metric of several runs in one panel, against the round, the traffic and the time.

    Args:
        histories: runs by the label they get in the pictures.
    """
    train = [Series(label, _train_loss(history), i) for i, (label, history) in enumerate(histories.items())]
    panels = [_panel(_title(name), _overlay(histories, name, _rounds)) for name in HEADLINE_METRICS]
    panels.append(_panel("Train loss", train))
    headline = next(
        (name for name in HEADLINE_METRICS if any(_places(h, name) for h in histories.values())), None
    )
    if headline is not None:
        for by, x_label, to_x in (
            ("traffic", "MB sent and received", _megabytes),
            ("time", "seconds in rounds", _elapsed),
        ):
            panels.append(_panel(f"{_title(headline)} by {by}", _overlay(histories, headline, to_x), x_label))
    return [panel for panel in panels if panel.series]


def write_png(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw all panels into one PNG, two in a row.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({**_STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(4.6 * columns, 2.7 * rows + 0.4), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        figure.suptitle(_shorten(title, 80), x=0.01, ha="left", fontsize=12)
        # Subfigures, unlike subplots, do not all give way to the widest label.
        for panel, cell in zip(panels, figure.subfigures(rows, columns, squeeze=False).flat, strict=False):
            _draw(cell.subplots(), panel)
        figure.savefig(path, format="png")


def svg(panel: Panel) -> str:
    """A panel as an ``<svg>`` element, see :func:`drawn_svg`."""
    return drawn_svg(lambda axes: _draw(axes, panel), (3.9, 2.5))


def drawn_svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """An ``<svg>`` element without links or fonts of its own; its text and axes take the page's colour.

    Args:
        draw: draws into the axes that it gets.
        size: width and height in inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(_INK, "currentColor")
        .replace("'DejaVu Sans'", "system-ui, sans-serif")
    )
    # Without a size of its own the picture takes that of its column.
    return re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)


def _panel(
    title: str, series: Iterable[Series], x_label: str = "round", kind: Literal["curve", "bar"] = "curve"
) -> Panel:
    return Panel(title, tuple(entry for entry in series if entry.points), x_label, kind)


def _title(*names: str) -> str:
    joined = " and ".join(_NAMES.get(name, name) for name in names)
    return joined[:1].upper() + joined[1:]


def _shade(where: str, index: int = 0) -> int:
    return (0 if where == "server" else 3) + 2 * index


def _places(history: RunHistory, name: str) -> list[str]:
    return [where for where in _PLACES if history.metric(name, where)]


def _metrics_panel(history: RunHistory, names: Sequence[str]) -> Panel:
    measured = [name for name in names if _places(history, name)]
    series = []
    for index, name in enumerate(measured):
        places = _places(history, name)
        for where in places:
            short = _NAMES.get(name, name)
            label = short if len(places) == 1 else f"{short} ({where})"
            series.append(Series(label, tuple(history.metric(name, where)), _shade(where, index)))
    return _panel(_title(*measured), series)


def _train_loss(history: RunHistory) -> tuple[Point, ...]:
    return tuple((r.number, r.train_loss) for r in history.ordered_rounds if r.train_loss is not None)


def _overlay(
    histories: Mapping[str, RunHistory], name: str, to_x: Callable[[RunHistory], Mapping[int, float]]
) -> Iterator[Series]:
    for index, (label, history) in enumerate(histories.items()):
        x = to_x(history)
        for where in _places(history, name)[:1]:
            points = ((x[number], value) for number, value in history.metric(name, where) if number in x)
            yield Series(label, tuple(points), index)


def _rounds(history: RunHistory) -> dict[int, float]:
    return {number: float(number) for number in history.rounds}


def _megabytes(history: RunHistory) -> dict[int, float]:
    return _running_total(history, lambda record: (record.bytes_up + record.bytes_down) / 1e6)


def _elapsed(history: RunHistory) -> dict[int, float]:
    return _running_total(history, lambda record: record.seconds or 0.0)


def _running_total(history: RunHistory, of: Callable[[RoundRecord], float]) -> dict[int, float]:
    records = history.ordered_rounds
    return dict(zip((r.number for r in records), accumulate(map(of, records)), strict=True))


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(_shorten(panel.title, 48))
    axes.set_xlabel(panel.x_label)
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, width=0.6)
    (_draw_bars if panel.kind == "bar" else _draw_curves)(axes, panel)
    if panel.x_label == "round":
        _round_axis(axes, sorted({x for series in panel.series for x, _ in series.points}))


def _round_axis(axes: Axes, rounds: Sequence[float]) -> None:
    # A lone round does not fill the whole width.
    margin = 0.6 if len(rounds) > 2 else 2.0
    axes.set_xlim(rounds[0] - margin, rounds[-1] + margin)
    if len(rounds) <= 12:
        axes.set_xticks(rounds, [f"{number:g}" for number in rounds])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _draw_curves(axes: Axes, panel: Panel) -> None:
    ends = []
    for series in panel.series:
        x, y = zip(*series.points, strict=True)
        colour = COLOURS[series.colour % len(COLOURS)]
        dash = _DASHES[series.colour // len(COLOURS) % len(_DASHES)]
        marker = "o" if len(x) <= 25 else ""
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=3)
        ends.append((y[-1], f"{_shorten(series.label, _MAX_LABEL)} {format_value(y[-1])}", colour))
    values = [y for series in panel.series for _, y in series.points]
    # Shares and losses stay linear; a perplexity may fall by orders of magnitude.
    if min(values) > 0 and max(values) > max(20 * min(values), 10):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) to the right of the axes, apart from each other."""
    axes.get_ylim()  # settles the limits, on which the transform depends
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((0, value))[1]) for value, _, _ in ends]
    for (_, text, colour), height in zip(ends, spread(heights, gap=0.085), strict=True):
        axes.annotate(text, (1.02, height), xycoords="axes fraction", color=colour, fontsize=8, va="center")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights as little as a single pass upwards and one downwards allow, so that all lie ``gap`` apart.

    The order of ``heights`` is kept; the result lies in [0, 1] as far as the gap permits.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = 0.0
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _draw_bars(axes: Axes, panel: Panel) -> None:
    base: dict[float, float] = {}
    ends = []
    for series in panel.series:
        x, y = zip(*series.points, strict=True)
        bottom = [base.get(key, 0.0) for key in x]
        colour = COLOURS[series.colour % len(COLOURS)]
        crowded = len(x) > 60
        axes.bar(x, y, bottom=bottom, width=1 if crowded else 0.8, color=colour, antialiased=not crowded)
        base |= {key: low + high for key, low, high in zip(x, bottom, y, strict=True)}
        ends.append((bottom[-1] + y[-1] / 2, series.label, colour))
    _label_ends(axes, ends)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
