"""Keep processes running: start, watch, restart with growing pauses, end all of them on a signal.

The state of every part stands in ``<state>/supervisor.json``, its output in ``<state>/<part>.log``. A guard process
ends what is left when the supervisor itself is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fedllm.errors import FedLLMError
from fedllm.node.logs import PartLog
from fedllm.processes import FLOWER_HOME, end_all, start_guard

logger = logging.getLogger(__name__)

STATUS_FILE = "supervisor.json"
_PATIENCE = 5.0
_TICK = 0.2
_KILLED = "killed by somebody, or by the system for lack of memory (see `dmesg`)"


class SupervisorError(FedLLMError):
    """A supervisor cannot start."""


@dataclass(frozen=True)
class Backoff:
    """Seconds between the end of a process and its next start."""

    first: float = 1.0
    factor: float = 2.0
    longest: float = 60.0
    stable: float = 300.0
    """A process that has run for so long starts anew after ``first``."""

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many ends in a row, counted from 1."""
        return min(self.first * self.factor ** min(failures - 1, 30), self.longest)


@dataclass(frozen=True)
class Watch:
    """How patiently a running process is asked whether it still does its work."""

    interval: float = 30.0
    """Seconds between two questions."""
    misses: int = 4
    """Bad answers in a row after which the process is killed and started anew."""


@dataclass(frozen=True)
class Part:
    """A process to keep running.

    Attributes:
        name: for logs and files.
        command: makes the command line of the next start.
        home: its ``FLWR_HOME``, by which all of its descendants are known; it is removed in the end.
        environment: of the process; ``FLWR_HOME`` is set besides.
        ready: whether the process does its work, judged by what it has printed so far or by asking it; the next part
            starts only then.
        folder: working directory.
        advice: what to do, by a part of the reason for its end.
        trouble: judges a process that was ready once, by what it has printed so far or by asking it: what is wrong, or
            empty; None: as long as it exists it is well.
    """

    name: str
    command: Callable[[], Sequence[str]]
    home: Path
    environment: Mapping[str, str]
    ready: Callable[[Sequence[str]], bool]
    folder: Path
    advice: Mapping[str, str] = field(default_factory=dict)
    trouble: Callable[[Sequence[str]], str] | None = None


@dataclass
class _Running:
    """One part and how it is doing."""

    part: Part
    log: PartLog
    process: subprocess.Popen[bytes] | None = None
    state: str = "waiting"
    started: float = 0.0
    failures: int = 0
    restarts: int = 0
    next_start: float = 0.0
    reason: str = ""
    was_ready: bool = False
    next_question: float = 0.0
    misses: int = 0
    trouble: str = ""


class Supervisor:
    """Runs parts until a signal comes.

    Args:
        title: for logs, for example ``node hospital-a``.
        parts: in the order in which they start; they end in the opposite order.
        state: folder of logs and of the status file; only one supervisor can use it.
        backoff: pauses between restarts.
        watch: how processes that run are watched.
        echo: gets every line that a part prints, as well as its log file.

    Raises:
        SupervisorError: the state folder cannot be written.
    """

    def __init__(
        self,
        title: str,
        parts: Sequence[Part],
        state: Path,
        *,
        backoff: Backoff | None = None,
        watch: Watch | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self._title, self._state = title, state
        self._backoff, self._watch = backoff or Backoff(), watch or Watch()
        try:
            self._running = [
                _Running(part, PartLog(state / f"{part.name}.log", part.name, echo)) for part in parts
            ]
        except OSError as error:
            raise SupervisorError(
                f"cannot write {error.filename or state}: {error.strerror}; set another state folder, or chown it"
            ) from None
        self._stop = threading.Event()
        self._written = ""

    def run(self) -> None:
        """Start everything and return when SIGTERM, SIGINT or SIGHUP has come and all processes have ended.

        Raises:
            SupervisorError: another supervisor uses the state folder.
        """
        with self._only_one(), self._until_signal():
            guard = start_guard(*(one.part.home for one in self._running))
            try:
                while not self._stop.wait(_TICK):
                    self._look()
                    self._write_status()
            finally:
                self._end()
                guard.communicate()
                for one in self._running:
                    one.log.close()
                (self._state / STATUS_FILE).unlink(missing_ok=True)
        logger.info("%s: stopped", self._title)

    def _look(self) -> None:
        """Start what may start, restart what has ended."""
        for one in self._running:
            if one.process is None:
                if time.monotonic() >= one.next_start:
                    self._try_start(one)
            elif (code := one.process.poll()) is not None:
                self._ended(one, code)
            elif one.state == "starting" and one.part.ready(one.log.lines()):
                one.state, one.was_ready = "running", True
                one.next_question, one.misses = time.monotonic() + self._watch.interval, 0
                logger.info("%s: %s is ready (process %d)", self._title, one.part.name, one.process.pid)
            elif one.state == "running":
                self._ask(one)
            if not one.was_ready:
                return  # the parts behind it need it

    def _ask(self, one: _Running) -> None:
        """Kill a process that exists but no longer does its work; its end is then handled like any other."""
        if one.part.trouble is None or time.monotonic() < one.next_question:
            return
        trouble = one.part.trouble(one.log.lines())
        one.next_question = time.monotonic() + self._watch.interval
        one.misses = one.misses + 1 if trouble else 0
        if one.misses >= self._watch.misses:
            assert one.process is not None
            one.trouble = f"{trouble}, {one.misses} times in {one.misses * self._watch.interval:g} s"
            one.process.kill()  # a process that hangs does not heed SIGTERM
            one.process.wait()

    def _try_start(self, one: _Running) -> None:
        """Start a part; a full disk or a missing command is tried again like a crash."""
        one.started = time.monotonic()
        try:
            self._start(one)
        except (OSError, FedLLMError) as error:
            self._again(one, "could not be started", str(error))

    def _start(self, one: _Running) -> None:
        part = one.part
        end_all(part.home)  # descendants of a killed process may still hold its port
        part.home.mkdir(parents=True, exist_ok=True)
        one.process = subprocess.Popen(
            list(part.command()),
            env={**part.environment, FLOWER_HOME: str(part.home)},
            cwd=part.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert one.process.stdout is not None
        one.log.begin()
        one.trouble = ""
        threading.Thread(target=_copy, args=(one.process.stdout, one.log), daemon=True).start()
        one.state = "starting"

    def _ended(self, one: _Running, code: int) -> None:
        one.log.settle()
        reason = one.trouble or one.log.reason()
        reason = reason or (_KILLED if code == -signal.SIGKILL else "it printed no error")
        advice = next((text for known, text in one.part.advice.items() if known in reason), "")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._again(one, how, f"{reason} → {advice}" if advice else reason)

    def _again(self, one: _Running, how: str, reason: str) -> None:
        """Say why a part does not run, and when it is started next."""
        lasted = time.monotonic() - one.started
        one.failures = 1 if lasted >= self._backoff.stable else one.failures + 1
        one.restarts += 1
        delay = self._backoff.delay(one.failures)
        one.process, one.state, one.next_start = None, "waiting", time.monotonic() + delay
        one.reason = reason
        again = f", {one.failures} times in a row" if one.failures > 1 else ""
        logger.error(
            "%s: %s %s after %.1f s%s; next start in %g s; reason: %s",
            self._title, one.part.name, how, lasted, again, delay, reason,
        )  # fmt: skip

    def _end(self) -> None:
        for one in reversed(self._running):
            if one.process is not None and one.process.poll() is None:
                one.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(_PATIENCE)
            end_all(one.part.home)
            if one.process is not None:
                one.process.wait()

    def _write_status(self) -> None:
        parts = {
            one.part.name: {
                "pid": one.process.pid if one.process is not None else None,
                "state": one.state,
                "restarts": one.restarts,
                "reason": one.reason,
            }
            for one in self._running
        }
        text = json.dumps({"pid": os.getpid(), "title": self._title, "parts": parts}, indent=1)
        if text == self._written:
            return
        self._written = text
        partial = self._state / f"{STATUS_FILE}.part"
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._state / STATUS_FILE)
        except OSError as error:
            logger.error("%s: cannot write %s: %s", self._title, self._state / STATUS_FILE, error.strerror)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        self._state.mkdir(parents=True, exist_ok=True)
        with (self._state / "lock").open("w") as lock:
            if not _locked(lock):
                raise SupervisorError(
                    f"{self._state} is in use by another supervisor (see {STATUS_FILE} there); "
                    "stop that one, or set another state folder"
                )
            yield

    @contextlib.contextmanager
    def _until_signal(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _locked(file: IO[str], patience: float = 0.5) -> bool:
    """Lock a file; :func:`read_status` may hold it for a moment."""
    ends = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > ends:
                return False
            time.sleep(0.05)
        else:
            return True


def _copy(source: IO[bytes], log: PartLog) -> None:
    with source:
        for line in source:
            log.write(line)


def read_status(state: Path) -> dict[str, object] | None:
    """What the supervisor of a state folder says of itself; None if none runs.

    Keys: ``pid``, ``title`` and ``parts``; by name of the part ``pid`` (None while it waits), ``state`` (``waiting``,
    ``starting`` or ``running``), ``restarts`` and ``reason`` (of its last end).
    """
    try:
        told: dict[str, object] = json.loads((state / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    try:
        with (state / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return told  # it holds the lock: it runs
    return None
