"""Clients without work: what remains of a round is the loop's own cost."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from fedllm.strategies.fedavg import FedAvg
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as StockFedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def echo(message: Message, context: Context) -> Message:
    """Send the arrays back."""
    metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


class PeakMemory:
    """Largest private resident size of this process while it is open, above that at its start.

    Pages shared with Ray's object store are not counted: they are mapped whatever the loop does.
    """

    def _size(self) -> int:
        memory = self._process.memory_info()
        return memory.rss - memory.shared

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._start = self._peak = self._size()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._size())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self._peak - self._start


def measure(start: Callable[..., object], grid: Grid, arrays: ArrayRecord, rounds: int) -> tuple[float, int]:
    """Seconds per round and growth of memory in bytes."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
        seconds = time.perf_counter() - started
    return seconds / rounds, memory.growth


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run both loops in turn, ours first so that it cannot profit from memory that the other has mapped."""
    config = context.run_config
    nodes, rounds = int(config["min-nodes"]), int(config["rounds"])
    arrays = ArrayRecord({"w": Array(np.zeros(int(config["values"]), dtype=np.float32))})
    warm_up = FedAvg(fraction_evaluate=0.0, min_available_nodes=nodes)
    warm_up.start(grid, ArrayRecord({"w": Array(np.zeros(4, dtype=np.float32))}), 2)
    figures: dict[str, list[tuple[float, int]]] = {"ours": [], "stock": []}
    for _ in range(int(config["repeats"])):
        ours = FedAvg(fraction_evaluate=0.0, min_available_nodes=nodes)
        figures["ours"].append(measure(ours.start, grid, arrays, rounds))
        stock = StockFedAvg(fraction_evaluate=0.0, min_available_nodes=nodes)
        figures["stock"].append(measure(stock.start, grid, arrays, rounds))
    Path(str(config["out"])).write_text(
        json.dumps(
            {
                name: {"seconds": median(s for s, _ in runs), "growth": max(g for _, g in runs)}
                for name, runs in figures.items()
            }
        )
    )
