"""End all processes of a SuperLink, known by the ``FLWR_HOME`` they were started with; hold signals meanwhile.

Run as ``python -m fedllm.processes HOME…`` this is the guard of what was started with these homes: it waits until its
standard input ends, which happens however its parent ends, and then cleans up after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

FLOWER_HOME = "FLWR_HOME"
_PATIENCE = 5.0


def of_home(home: Path) -> list[psutil.Process]:
    """Everything alive that was started with this ``FLWR_HOME``, and its descendants.

    Flower and Ray start helpers in sessions of their own, which lose their parent when that ends first: only
    the environment tells whose they are.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(FLOWER_HOME) == str(home):
                found |= {entry.pid: entry for entry in [process, *process.children(recursive=True)]}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if alive(process)]


def end_all(home: Path) -> None:
    """End everything that belongs to a home, politely at first."""
    for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        processes = of_home(home)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(processes, timeout=_PATIENCE)


def clean_up(home: Path) -> None:
    """End everything that belongs to a home, and remove its folder."""
    end_all(home)
    shutil.rmtree(home, ignore_errors=True)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs: it has neither ended, nor left its number to another one."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command_name(process: psutil.Process) -> str:
    """Name of the installed command that a process runs, behind its interpreter and that one's options."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return ""
    return Path(next((word for word in arguments[1:] if not word.startswith("-")), "")).name


@contextlib.contextmanager
def _handling(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Set signal handlers for a while; only the main thread may, others are left as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminate_with_exception() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that context managers clean up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling({signal.SIGTERM: leave, signal.SIGHUP: leave}):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore further signals while cleaning up, which takes some seconds at most."""
    with _handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


def start_guard(*homes: Path) -> subprocess.Popen[bytes]:
    """Start a guard of these homes: what belongs to them ends with this process, even if that is killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedllm.processes", *map(str, homes)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _guard(homes: Sequence[Path]) -> None:
    with uninterrupted():
        sys.stdin.buffer.read()
        for home in homes:
            clean_up(home)


if __name__ == "__main__":
    _guard([Path(home) for home in sys.argv[1:]])
