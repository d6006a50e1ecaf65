"""The live view of a run: folds events as they are written, and draws where the run stands."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedllm.errors import FedLLMError
from fedllm.events import Event, parse_event
from fedllm.history import RunHistory
from fedllm.narration import format_bytes, format_seconds, format_value, natural_key, printable
from fedllm.outcomes import NodeReply, RoundRecord

State = Literal["training", "dropped", "done", "waiting"]

# With their style, in the order in which rows are kept when not all fit.
_STATES: Mapping[State, str] = {"dropped": "red", "training": "yellow", "done": "green", "waiting": "dim"}
_HEADER_LINES = 3
_TABLE_FRAME_LINES = 3
_NOTES = 3
_ROUNDS_FOR_ETA = 5


@dataclass(frozen=True)
class NodeRow:
    """A client in the current round; what it has not told yet is ``None``."""

    node: str
    state: State
    num_examples: int | None
    reply: NodeReply | None


class RunView:
    """Where a run stands. Threads may update and render at the same time.

    Args:
        clock: unix seconds now; the elapsed time runs on between events.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.history = RunHistory()
        self._clock = clock
        self._lock = threading.Lock()

    def update(self, event: Mapping[str, Any]) -> None:
        """Fold the next event."""
        with self._lock:
            self.history.update(event)

    @property
    def current_round(self) -> RoundRecord | None:
        """The newest round, or ``None`` before the first."""
        return next((r for r in reversed(self.history.ordered_rounds) if r.number > 0), None)

    def elapsed(self) -> float:
        """Seconds since the run's newest process began."""
        history = self.history
        if history.started is None:
            return 0.0
        over = history.last_time if history.status != "running" else None
        return max(0.0, (self._clock() if over is None else over) - history.started)

    def eta(self) -> float | None:
        """Seconds until the last round ends, at the pace of the last five; ``None`` if none closed."""
        history = self.history
        closed = [record for record in history.closed_rounds if record.seconds is not None]
        if not closed or history.status != "running":
            return None
        recent = [record.seconds or 0.0 for record in closed[-_ROUNDS_FOR_ETA:]]
        remaining = sum(recent) / len(recent) * (history.total_rounds - len(history.closed_rounds))
        current = self.current_round
        spent = self._clock() - current.started if current is not None and current.seconds is None else 0.0
        return max(0.0, remaining - spent)

    def rows(self) -> list[NodeRow]:
        """All known clients with their state in the current round, by name."""
        record = self.current_round
        asked = set(record.asked) if record else set()
        replies = {reply.node: reply for reply in record.trained} if record else {}
        dropped = {drop.node for drop in record.drops} if record else set()
        names = asked | self.history.nodes_joined.keys() | replies.keys() | dropped
        rows = []
        for name in sorted(names, key=natural_key):
            reply = replies.get(name)
            joined = self.history.nodes_joined.get(name)
            examples = reply.num_examples if reply else joined.num_examples if joined else None
            open_round = record is not None and record.outcome == "open"
            state = _state(name in dropped, reply is not None, name in asked and open_round)
            rows.append(NodeRow(name, state, examples, reply))
        return rows

    def render(self, height: int | None = None) -> RenderableType:
        """Header, table of clients, and the last warnings and drops, in at most ``height`` lines.

        Args:
            height: lines to fill; the terminal's height by default.
        """
        lines = height or shutil.get_terminal_size().lines
        with self._lock:
            notes = self._notes()
            room = lines - _HEADER_LINES - len(notes) - _TABLE_FRAME_LINES
            parts: list[RenderableType] = [self._header(), self._table(max(1, room)), *notes]
        return Group(*parts)

    def _header(self) -> RenderableType:
        history = self.history
        record = self.current_round
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(printable(history.name or "run"), style="bold")
        title.append(f"  {printable(history.strategy)}  ")
        title.append(self._stage(record), style="cyan")
        times = Text(f"elapsed {format_seconds(self.elapsed())}", no_wrap=True, overflow="ellipsis")
        eta = self.eta()
        if eta is not None:
            times.append(f"  left about {format_seconds(eta)}")
        times.append(f"  up {format_bytes(history.bytes_up)}  down {format_bytes(history.bytes_down)}")
        return Group(title, times, self._metrics())

    def _stage(self, record: RoundRecord | None) -> str:
        history = self.history
        if history.status == "failed":
            return f"failed: {printable(history.failure or '')}"
        if history.status == "finished":
            return f"finished {len(history.closed_rounds)} rounds"
        if history.waiting_for is not None:
            return "waiting for nodes: {} of {} connected".format(*history.waiting_for)
        if record is None:
            return "starting"
        return f"round {record.number}/{history.total_rounds}"

    def _metrics(self) -> Text:
        parts = []
        trained = [r for r in self.history.ordered_rounds if r.train_loss is not None]
        if trained:
            parts.append(f"train loss {format_value(trained[-1].train_loss)}")
        measured = [r for r in self.history.ordered_rounds if r.evaluations]
        if measured:
            last = measured[-1]
            parts += [f"{name} {format_value(value)}" for name, value in last.headline.items()]
            parts.append(f"(round {last.number})")
        return Text("  ".join(parts) or "no metrics yet", no_wrap=True, overflow="ellipsis")

    def _table(self, room: int) -> RenderableType:
        rows = self.rows()
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=32)
        table.add_column("state", no_wrap=True)
        for name in ("examples", "loss", "time", "up"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = rows if len(rows) <= room else _most_telling(rows, room)
        for row in shown:
            table.add_row(*_cells(row))
        hidden = Counter(row.state for row in rows) - Counter(row.state for row in shown)
        if not hidden:
            return table
        counts = ", ".join(f"{hidden[state]} {state}" for state in _STATES if hidden[state])
        return Group(table, Text(f"… {hidden.total()} more ({counts})", style="dim"))

    def _notes(self) -> list[Text]:
        drops = [
            f"round {drop.round}: client {drop.node} dropped: {drop.reason}" for drop in self.history.drops
        ]
        notes = [*(f"warning: {w}" for w in self.history.warnings[-_NOTES:]), *drops[-_NOTES:]]
        shown = (printable(note, limit=500) for note in notes)
        return [Text(note, style="yellow", no_wrap=True, overflow="ellipsis") for note in shown]


def _state(dropped: bool, replied: bool, asked: bool) -> State:
    if dropped:
        return "dropped"
    if replied:
        return "done"
    return "training" if asked else "waiting"


def _most_telling(rows: list[NodeRow], room: int) -> list[NodeRow]:
    order = list(_STATES)
    kept = sorted(rows, key=lambda row: order.index(row.state))[:room]
    return sorted(kept, key=lambda row: natural_key(row.node))


def _cells(row: NodeRow) -> list[Text]:
    reply = row.reply
    return [
        Text(printable(row.node)),
        Text(row.state, style=_STATES[row.state]),
        Text("" if row.num_examples is None else f"{row.num_examples:,}"),
        Text("" if reply is None else format_value(reply.loss)),
        Text("" if reply is None or reply.seconds is None else format_seconds(reply.seconds)),
        Text("" if reply is None else format_bytes(reply.bytes_up)),
    ]


def follow_events(path: Path, stop: Callable[[], bool], poll_interval: float = 0.1) -> Iterator[Event]:
    """Yield the events of a file as they are appended.

    The file need not exist yet. After ``stop`` has said so, what is already written is still yielded. A line
    that a killed process left unfinished is passed over, as a resumed one cuts it off.

    Args:
        path: a file of :class:`fedllm.events.JsonlSink`.
        stop: whether no more events will come; asked before each look at the file.
        poll_interval: seconds between two looks.

    Raises:
        FedLLMError: the file cannot be read, or a finished line is not an event.
    """
    position = number = 0
    last = False
    while not last:
        last = stop()
        content = _read_from(path, position)
        end = content.rfind(b"\n") + 1
        for line in content[:end].splitlines():
            number += 1
            yield parse_event(line, path, number)
        position += end
        if not last:
            time.sleep(poll_interval)


def _read_from(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FedLLMError(f"cannot read events from {path}: {error.strerror or error}") from None
