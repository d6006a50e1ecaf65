"""Progress bars of libraries, off for a while: a run shows its own progress, and logs are no terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the bars of datasets and of flwr-datasets, some of which are bare tqdm on standard error."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            enable_progress_bars()
