"""The C library's allocator, which keeps what is freed for as long as the process lives, once for every thread."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back_memory() -> None:
    """Return free memory of all threads to the system; without glibc nothing happens.

    A thread that trains leaves gigabytes of free activations in an arena of its own, and the next one may get another
    arena: without this a server that starts a thread in every round grows by that much for many rounds.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
