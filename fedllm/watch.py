"""Follow a run on a SuperLink: its events as they are written, its status as Flower tells it."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner

from fedllm.events import Event
from fedllm.flower import FlowerCommands, RunStatus, SuperLinkError
from fedllm.history import RunHistory
from fedllm.narration import summary_line
from fedllm.progress import RunView, follow_events

_STATUS_INTERVAL = 3.0
_STARTING = "starting Flower and Ray …"
_TRACEBACK = "Traceback (most recent call last):"
_LOG_PREFIX = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: what Flower says, and what the run itself has said.

    Attributes:
        status: Flower's word.
        history: the run's events, those before a resume included.
        ended: whether the run said of itself that it finished or failed.
    """

    status: RunStatus
    history: RunHistory
    ended: bool

    @property
    def good(self) -> bool:
        """Both say that the run came to its end; Flower alone also says so of an app that did nothing."""
        return self.status.completed and self.ended and self.history.status == "finished"


class _StatusPoll(threading.Thread):
    """Asks Flower every few seconds how the run is doing; ``finished`` is set at its end."""

    def __init__(self, link: FlowerCommands, run_id: str) -> None:
        super().__init__(daemon=True)
        self.finished = threading.Event()
        self.status = RunStatus("pending", "")
        self._link, self._run_id = link, run_id

    def run(self) -> None:
        """Poll until the run is over or Flower cannot be asked any more."""
        while not self.finished.wait(_STATUS_INTERVAL):
            try:
                self.status = self._link.status(self._run_id)
            except SuperLinkError as error:
                self.status = RunStatus("finished:failed", f"Flower's SuperLink does not answer: {error}")
            if self.status.finished:
                self.finished.set()


class Display:
    """Shows a run while it goes on: a live view on a terminal, else one line a round, or nothing if quiet."""

    def __init__(self, console: Console, quiet: bool, starting: str = _STARTING) -> None:
        self.view = RunView()
        self._console, self._quiet = console, quiet
        self._waiting, self._starting = True, starting
        self._spinner = Spinner("dots", text=starting)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        else:
            self._console.print(self._starting)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, event: Event, *, fresh: bool) -> None:
        """Take one event; those of an earlier part of a resumed run are not printed again."""
        self.view.update(event)
        if not fresh:
            return
        self._waiting = False
        line = summary_line(self.view.history, event)
        if self._live is None and not self._quiet and line is not None:
            self._console.print(line, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return self._spinner if self._waiting else self.view.render()


def watch(link: FlowerCommands, run_id: str, run_dir: Path, display: Display) -> Outcome:
    """Show the run's events until Flower says that it is over.

    Raises:
        FedLLMError: the events cannot be read.
    """
    started, ended = time.time(), False
    poll = _StatusPoll(link, run_id)
    poll.start()
    try:
        with display:
            for event in follow_events(run_dir / "events.jsonl", poll.finished.is_set):
                fresh = event["time"] >= started
                ended = ended or (fresh and event["event"] in ("run-finished", "run-failed"))
                display.update(event, fresh=fresh)
    finally:
        poll.finished.set()
    return Outcome(poll.status, display.view.history, ended)


def last_traceback(log: str) -> str:
    """The last Python traceback in a log with the exception's message, or an empty string."""
    _, marker, rest = log.rpartition(_TRACEBACK)
    lines = rest.lstrip("\n").splitlines()
    message = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    after = range(message + 1, len(lines))
    end = next((i for i in after if not lines[i] or _LOG_PREFIX.match(lines[i])), len(lines))
    return "\n".join([marker, *lines[:end]]) if marker else ""
