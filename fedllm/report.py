"""The report of a run, or of several side by side: a table, pictures, and a page that needs no other file.

The page is escaped throughout: names of nodes and runs come from elsewhere.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedllm.config import RunConfig
from fedllm.errors import FedLLMError
from fedllm.events import read_events
from fedllm.history import RunHistory
from fedllm.narration import format_bytes, format_seconds, format_value, natural_key
from fedllm.outcomes import RoundRecord
from fedllm.plan_plot import plan_pictures
from fedllm.plots import Panel, comparison_panels, run_panels, svg, write_png
from fedllm.verdict_plot import verdict_picture

EVENTS_FILE = "events.jsonl"
CONFIG_FILE = "config.json"
_PLACES = ("server", "clients")


def load_run(run_dir: Path) -> RunHistory:
    """The history of the run in a folder; the configuration comes from ``config.json`` where there is one.

    Raises:
        FedLLMError: the folder holds no run, or a file of it cannot be read.
    """
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        raise FedLLMError(f"{run_dir} holds no run: expected a file {EVENTS_FILE} in it")
    history = RunHistory.of(read_events(path))
    history.name = history.name or run_dir.resolve().name
    config = run_dir / CONFIG_FILE
    if config.exists():
        history.config = _read_config(config)
    return history


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedLLMError(f"cannot read the configuration {path}: {error}") from None
    if not isinstance(config, dict):
        raise FedLLMError(
            f"{path}: expected a JSON object of configuration keys, found {type(config).__name__}"
        )
    return config


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or a comparison of several.

    One run also gets ``metrics.csv`` and, once a round has been closed, ``curves.png`` in its own folder. A
    comparison also gets a picture of the same name beside it.

    Args:
        run_dirs: folders of runs.
        out: the HTML file. The default is ``report.html`` in the folder of one run, or ``comparison.html``
            next to the first of several.

    Returns:
        The HTML file.

    Raises:
        FedLLMError: no run is given, one cannot be read, or a file cannot be written.
    """
    if not run_dirs:
        raise FedLLMError("a report needs at least one run folder, found none")
    histories = [load_run(run_dir) for run_dir in run_dirs]
    single = len(run_dirs) == 1
    page = out or (
        run_dirs[0] / "report.html" if single else run_dirs[0].resolve().parent / "comparison.html"
    )
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if single:
            _write_run(histories[0], run_dirs[0], page)
        else:
            _write_comparison(dict(zip(_labels(run_dirs), histories, strict=True)), page)
    except OSError as error:
        raise FedLLMError(f"cannot write the report {page}: {error.strerror or error}") from None
    return page


def _write_run(history: RunHistory, folder: Path, page: Path) -> None:
    write_metrics_csv(history, folder / "metrics.csv")
    panels = run_panels(history)
    judged = verdict_picture(history.ordered_rounds)
    if panels:
        write_png(panels, folder / "curves.png", f"{history.name} ({history.strategy})")
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=history.name,
            history=history,
            figures=_headline_figures(history),
            pictures=_pictures(panels),
            plans=[(text, Markup(drawing)) for text, drawing in plan_pictures(history.plans)],
            verdicts=None if judged is None else (judged[0], Markup(judged[1])),
            settings=_settings(history.config),
            metrics=[(where, name) for where in _PLACES for name in history.metric_names(where)],
            nodes=sorted(history.node_totals().values(), key=lambda total: natural_key(total.name)),
            last_event=_utc(history.last_time),
        )
    )
    page.write_text(html, encoding="utf-8")


def _write_comparison(histories: Mapping[str, RunHistory], page: Path) -> None:
    panels = comparison_panels(histories)
    if panels:
        write_png(panels, page.with_suffix(".png"), "Comparison of runs")
    runs = histories.values()
    names = [(where, name) for where in _PLACES for history in runs for name in history.metric_names(where)]
    html = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            title="Comparison of runs",
            histories=histories,
            pictures=_pictures(panels),
            metrics=list(dict.fromkeys(names)),
            differences=_differences({label: history.config for label, history in histories.items()}),
        )
    )
    page.write_text(html, encoding="utf-8")


def write_metrics_csv(history: RunHistory, path: Path) -> None:
    """Write one row a round: clients, loss, metrics, seconds, bytes; undefined values stay empty.

    Metrics of the server's test rows are columns ``server-<metric>``, the clients' are ``clients-<metric>``.

    Raises:
        OSError: the file cannot be written.
    """
    names = [(where, name) for where in _PLACES for name in history.metric_names(where)]
    with path.open("w", encoding="utf-8", newline="") as file:
        fixed = [
            "round",
            "outcome",
            "asked",
            "replied",
            "dropped",
            "num-examples",
            "train-loss",
            "update-norm",
        ]
        writer = csv.writer(file)
        writer.writerow([*fixed, *(f"{w}-{n}" for w, n in names), "seconds", "bytes-up", "bytes-down"])
        for record in history.ordered_rounds:
            metrics = [record.evaluations.get(where, {}).get(name) for where, name in names]
            writer.writerow(
                [*_csv_figures(record), *metrics, record.seconds, record.bytes_up, record.bytes_down]
            )


def _csv_figures(record: RoundRecord) -> list[object]:
    return [
        record.number,
        record.outcome,
        len(record.asked),
        len(record.trained),
        len(record.drops),
        record.num_examples,
        record.train_loss,
        record.update_norm,
    ]


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """Names of folders, with as many parents as it takes to tell them apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-depth:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise FedLLMError("the same run folder is given twice; name every run once")


def _headline_figures(history: RunHistory) -> list[tuple[str, str, str]]:
    """(label, value, remark) of what a reader wants to know first."""
    closed = history.closed_rounds
    figures = []
    headline = history.headline_metric()
    if headline is not None:
        number, value = history.metric(*headline)[-1]
        best = history.best(*headline)
        assert best is not None
        remark = f"after round {number}; best {format_value(best[1])} in round {best[0]}"
        figures.append((f"{headline[0]} ({headline[1]})", format_value(value), remark))
    losses = [(r.number, r.train_loss) for r in closed if r.train_loss is not None]
    if losses:
        figures.append(("train loss", format_value(losses[-1][1]), f"in round {losses[-1][0]}"))
    skipped = sum(record.outcome == "skipped" for record in closed)
    figures.append(
        ("rounds", f"{len(closed)} of {history.total_rounds}", f"{skipped} skipped" if skipped else "")
    )
    per_round = f"{format_seconds(history.seconds / len(closed))} a round" if closed else ""
    figures.append(("time in rounds", format_seconds(history.seconds), per_round))
    down = f"{format_bytes(history.bytes_down)} down"
    figures.append(("traffic", f"{format_bytes(history.bytes_up)} up", down))
    drops = len(history.drops)
    dropped = "no reply dropped" if not drops else f"{drops} repl{'y' if drops == 1 else 'ies'} dropped"
    figures.append(("clients", str(len(history.node_totals())), dropped))
    size = f"adapter of {format_bytes(history.adapter_bytes)}"
    figures.append(("trained parameters", f"{history.parameters:,}", size))
    return figures


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configuration keys and defaults, those that differ first; a plug-in's keys have no known default."""
    defaults = RunConfig.from_flat({}).to_flat()
    rows = [
        {"key": key, "value": value, "default": defaults.get(key), "changed": value != defaults.get(key)}
        for key, value in config.items()
    ]
    return sorted(rows, key=lambda row: not row["changed"])


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(key, value of every run) of the keys that are not the same in all runs, the runs' names aside."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = [(key, [config.get(key) for config in configs.values()]) for key in keys if key != "run.name"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _pictures(panels: Sequence[Panel]) -> list[tuple[str, Markup]]:
    """(description, drawing) of each panel; the drawing's own text is escaped by matplotlib."""
    return [(panel.alt, Markup(svg(panel))) for panel in panels]


def _utc(time: float | None) -> str:
    return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "figure": format_value}
    return environment
