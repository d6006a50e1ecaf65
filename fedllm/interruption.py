"""Ask what this process computes to stop at its next batch, because nobody waits for the result any more."""

from __future__ import annotations

import threading

from fedllm.errors import FedLLMError

_asked = threading.Event()


class Interrupted(FedLLMError):
    """A computation was stopped because its result is not wanted any more."""


def interrupt() -> None:
    """Let the computation that runs, in whatever thread, raise :class:`Interrupted` at its next batch."""
    _asked.set()


def start_anew() -> None:
    """Forget an earlier :func:`interrupt`, before another computation begins."""
    _asked.clear()


def check() -> None:
    """Stop here if that was asked for.

    Raises:
        Interrupted: it was.
    """
    if _asked.is_set():
        raise Interrupted("stopped between two batches: nobody waits for the result")
