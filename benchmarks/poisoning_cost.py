"""What a round of VERT costs the server, for :mod:`poisoning`: seconds to sketch and judge, memory with a spool."""

from __future__ import annotations

import time
from statistics import median

import torch
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.sketch import Sketcher
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import (
    TaskIdentity,
)  # flwr's processes set it; messages cannot be made without

from fedllm.config import ServerConfig
from fedllm.peak_memory import PeakMemory
from fedllm.records import ARRAYS, decode, encode, only_arrays
from fedllm.spool import ReplySpool

_SIZE, _PASSES = 512, 3


def cost(clients: int, parameters: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds of a round, and the server's peak memory against holding all updates.

    Args:
        clients: of a round.
        parameters: of the adapter, float32.
        rounds: that are timed; the first, which draws the tables, is not.
    """
    sketcher, detector = Sketcher(_SIZE), Detector(_SIZE)
    start = torch.zeros(parameters)
    seconds = _timed(sketcher, detector, start, clients, rounds)
    # Pages that the kernel took back while they lay idle count as growth when they are touched again: least of some.
    peak = min(_peak(sketcher, detector, start, clients, rounds + 2 + k) for k in range(_PASSES))
    return {
        "cost_clients": clients,
        "cost_parameters": parameters,
        "cost_seconds_per_round": median(seconds),
        "cost_seconds_per_round_worst": max(seconds),
        "cost_bytes": detector.nbytes + sketcher.nbytes + 4 * _SIZE * clients,
        "cost_peak_bytes": peak,
        "cost_share_of_all_updates": peak / (4.0 * clients * parameters),
    }


def _timed(
    sketcher: Sketcher, detector: Detector, start: torch.Tensor, clients: int, rounds: int
) -> list[float]:
    """Seconds of each round but the first. Clients share one update, scaled: no step's time depends on values."""
    new, names, seconds = torch.randn(len(start)), [str(index) for index in range(clients)], []
    for server_round in range(1, rounds + 2):
        sketches, began = [], time.perf_counter()
        for index in range(clients):
            vector, square = sketcher.tensor("w", new, start)
            sketches.append((vector * (1 + 0.01 * index), square**0.5))
        vectors, norms = torch.stack([v for v, _ in sketches]), torch.tensor([norm for _, norm in sketches])
        detector.judge(server_round, names, vectors, norms)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _peak(
    sketcher: Sketcher, detector: Detector, start: torch.Tensor, clients: int, server_round: int
) -> int:
    """Bytes by which this process grows while a round's replies come, wait, are judged, and are handed on one by one.

    What is there before the first reply, such as the model, does not count; a reply's own bytes do.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    sent = {"w": start}
    array = next(iter(encode({"w": torch.randn(len(start))}).values()))
    data = array.data
    before = PeakMemory(torch.device("cpu")).bytes
    watched = PeakMemory(torch.device("cpu"))
    vectors, norms = [], []
    with ReplySpool(int(ServerConfig().spool_megabytes * 2**20)) as spool:
        for index in range(clients):
            own = data[:-1] + data[-1:]  # bytes of its own, as a reply that has come
            record = ArrayRecord({"w": Array(array.dtype, array.shape, array.stype, own)})
            del own
            message = Message(RecordDict({ARRAYS: record}), dst_node_id=index + 1, message_type="train")
            sketch = sketcher.update(sent, decode(record, sent))
            spool.put(index, message)
            vectors.append(sketch.vector)
            norms.append(sketch.norm)
            del record, message
        names = [str(index) for index in range(clients)]
        detector.judge(server_round, names, torch.stack(vectors), torch.tensor(norms))
        for index in range(clients):
            decode(only_arrays(spool.take(index)), sent)
    return max(watched.bytes - before, 0)
