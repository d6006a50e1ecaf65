"""Events of an invented run, for the tests of everything that reads events."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START = 1_700_000_000.0
CONFIG = {"strategy": "fedavg", "rounds": 3, "lora.rank": 16, "run.name": "sample", "fedadam.eta": 0.1}


class Script:
    """Writes events at a clock that the test moves."""

    def __init__(self) -> None:
        self.now = START
        self.events: list[dict[str, Any]] = []

    def add(self, event: str, **fields: Any) -> dict[str, Any]:
        self.events.append({"event": event, "time": self.now, **fields})
        return self.events[-1]

    def start(self, rounds: int = 3, first_round: int = 1, **changes: Any) -> None:
        fields = {
            "run": "sample",
            "strategy": "fedavg",
            "client": "backprop",
            "task": "sequence-classification",
            "rounds": rounds,
            "first_round": first_round,
            "config": CONFIG,
            "version": "0.1.0",
            "parameters": 1000,
            "adapter_bytes": 4000,
        }
        self.add("run-started", **fields | changes)

    def join(self, names: Iterable[str]) -> None:
        for name in names:
            self.add("node-joined", node=name, device="cpu", cpus=1, memory_bytes=10**9, num_examples=100)

    def reply(self, number: int, node: str, loss: float | None = 1.0, phase: str = "train") -> None:
        self.add(
            "node-replied", round=number, phase=phase, node=node, bytes_up=2_000_000, bytes_down=1_000_000,
            seconds=1.5, elapsed=2.0, num_examples=100, loss=loss,
        )  # fmt: skip

    def drop(self, number: int, node: str, reason: str) -> None:
        self.add("node-dropped", round=number, phase="train", node=node, reason=reason)

    def round(
        self,
        number: int,
        nodes: list[str],
        *,
        loss: float = 1.0,
        metrics: dict[str, Any] | None = None,
        dropped: dict[str, str] | None = None,
        seconds: float = 10.0,
    ) -> None:
        """One whole round; ``dropped`` are nodes with reasons, the others reply."""
        dropped = dropped or {}
        self.add("round-started", round=number, nodes=nodes)
        self.now += seconds
        for node, reason in dropped.items():
            self.drop(number, node, reason)
        replying = [node for node in nodes if node not in dropped]
        for node in replying:
            self.reply(number, node, loss)
        counts = {"replies": len(replying), "asked": len(nodes), "num_examples": 100 * len(replying)}
        self.add("aggregated", round=number, **counts, loss=loss, seconds=0.1, update_norm=0.5)
        if metrics is not None:
            self.add("evaluated", round=number, where="server", metrics=metrics, seconds=0.5)
        self.add("round-finished", round=number, seconds=seconds)

    def finish(self, **metrics: float) -> None:
        self.add("run-finished", rounds=3, seconds=self.now - START, metrics=metrics)


def finished_run(accuracies: tuple[float, ...] = (0.5, 0.8, 0.7), rounds: int = 3) -> Script:
    """Three nodes; node-2 is dropped in round 2."""
    script, nodes = Script(), ["node-0", "node-1", "node-2"]
    script.start(rounds=rounds)
    script.join(nodes)
    for index, accuracy in enumerate(accuracies, start=1):
        dropped = {"node-2": "loss is NaN"} if index == 2 else None
        metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
        script.round(index, nodes, loss=1.0 / index, metrics=metrics, dropped=dropped)
    script.finish(accuracy=accuracies[-1])
    return script


def save(events: list[dict[str, Any]], folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Write a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
