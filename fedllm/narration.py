"""Events in words: one line for each event that a person wants to read, and the units the lines use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedllm.history import RunHistory
from fedllm.outcomes import RoundRecord


def printable(text: object, limit: int = 200) -> str:
    """Text from a node, made harmless for a terminal: no control characters, at most ``limit`` long."""
    shown = "".join(c if c.isprintable() else "�" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``node-2`` before ``node-10``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if index % 2 else (0, 0, part) for index, part in enumerate(parts)]


def format_bytes(count: float) -> str:
    """Bytes in decimal units: ``0 B``, ``512 kB``, ``2.1 MB``, ``14 GB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            amount = count / size
            return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration: ``0.24 s``, ``6.3 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_value(value: float | None) -> str:
    """A loss or metric: three decimals, fewer if large, scientific if tiny; a dash if it is undefined."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def summary_line(history: RunHistory, event: Mapping[str, Any]) -> str | None:
    """The line to print for an event, one line a round plus what went wrong, or ``None``.

    Args:
        history: history that has folded the event already.
        event: the event.
    """
    kind = event["event"]
    if kind == "round-finished":
        return _round_line(history, history.rounds[event["round"]])
    template = _TEMPLATES.get(kind)
    return printable(template.format_map(event), limit=2000) if template else _run_line(kind, event)


_TEMPLATES = {
    "waiting-for-nodes": "waiting for nodes: {have} of {need} connected",
    "node-rejected": "client {node} rejected: {reason}",
    "node-dropped": "round {round}: client {node} dropped ({phase}): {reason}",
    "round-skipped": "round {round} skipped: {reason}",
    "step-taken-back": "round {round}: {reason}",
    "checkpoint-failed": "round {round}: checkpoint failed: {reason}",
    "run-resumed": "resumed after round {round} from {path}",
    "run-failed": "run failed: {reason}",
    "warning": "{message}",
}


def _run_line(kind: str, event: Mapping[str, Any]) -> str | None:
    if kind == "run-started":
        return printable(
            f"run {event['run']}: {event['strategy']} with {event['client']} clients, "
            f"{event['rounds']} rounds, {event['parameters']:,} trained parameters "
            f"({format_bytes(event['adapter_bytes'])})"
        )
    if kind == "planned":
        return printable(_plan_line(event), limit=2000)
    if kind == "run-finished":
        metrics = "".join(f", {name} {format_value(value)}" for name, value in event["metrics"].items())
        return printable(f"finished {event['rounds']} rounds in {format_seconds(event['seconds'])}{metrics}")
    return None


def _plan_line(event: Mapping[str, Any]) -> str:
    plans = sorted(event["nodes"].items(), key=lambda entry: natural_key(entry[0]))
    parts = []
    for name, plan in plans[:8]:
        ranks = plan["ranks"].values()
        low, high = min(ranks), max(ranks)
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        weights = f"{len(ranks)} of {len(event['weights'])} weights"
        parts.append(f"{name}: {plan['bits']} bits, batch {plan['batch_size']}, {rank} on {weights}")
    more = [f"and {len(plans) - 8} more"] if len(plans) > 8 else []
    return f"round {event['round']}: {event['phase']} for {len(plans)} clients; {'; '.join(parts + more)}"


def _round_line(history: RunHistory, record: RoundRecord) -> str | None:
    if record.outcome == "skipped":
        return None
    counted = len(record.trained) if record.replies_counted is None else record.replies_counted
    parts = [f"{counted} of {len(record.asked)} clients", f"loss {format_value(record.train_loss)}"]
    parts += [f"{name} {format_value(value)}" for name, value in record.headline.items()]
    parts += [f"{format_bytes(record.bytes_up)} up", format_seconds(record.seconds or 0.0)]
    return f"round {record.number}/{history.total_rounds}: {', '.join(parts)}"
