"""Event sinks for a purpose: the newest plan as a file of its own, and TensorBoard (an extra package).

A user's own sink is a class registered in the entry-point group ``fedllm.sinks``. It is constructed with the
run's folder and has the methods of :class:`fedllm.events.EventSink`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedLLMError
from fedllm.history import RunHistory


class PlanSink:
    """Keeps the plan that holds, of a strategy that plans, in ``<run folder>/plan.json``."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "plan.json"

    def emit(self, event: Mapping[str, Any]) -> None:
        """Replace the file whole when there is a new plan."""
        if event["event"] == "planned":
            new = self._path.with_suffix(".json.new")
            new.write_text(json.dumps(dict(event), indent=1) + "\n", encoding="utf-8")
            os.replace(new, self._path)

    def close(self) -> None:
        """Nothing to let go of."""


class TensorBoardSink:
    """Writes losses, metrics, bytes and seconds of every round to ``<run folder>/tensorboard``.

    Raises:
        FedLLMError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise FedLLMError(
                f"sink 'tensorboard' needs a package that is missing ({error}); "
                'install the extra: pip install "fedllm[tensorboard]"'
            ) from None
        self._make_writer = SummaryWriter
        self._folder = run_dir / "tensorboard"
        self._writer = SummaryWriter(str(self._folder))
        self._history = RunHistory()

    def emit(self, event: Mapping[str, Any]) -> None:
        """Write the scalars that the event completes."""
        self._history.update(event)
        kind = event["event"]
        if kind == "aggregated":
            self._write(event, "train", {"loss": event["loss"], "update-norm": event["update_norm"]})
        elif kind == "evaluated":
            self._write(event, f"evaluate-{event['where']}", event["metrics"])
        elif kind == "round-finished":
            record = self._history.rounds[event["round"]]
            figures = {
                "seconds": record.seconds,
                "bytes-up": record.bytes_up,
                "bytes-down": record.bytes_down,
            }
            self._write(event, "round", figures)
            self._writer.flush()
        elif kind == "run-resumed":
            self._writer.close()
            # TensorBoard hides what a killed process wrote for the rounds that are done again.
            self._writer = self._make_writer(str(self._folder), purge_step=event["round"] + 1)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _write(self, event: Mapping[str, Any], group: str, scalars: Mapping[str, float | None]) -> None:
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, event["round"], walltime=event["time"])
