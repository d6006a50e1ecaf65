"""Whole runs in one process whose clients hold adapters of ranks 1, 2 and 4: real clients, server and checkpoints."""

import pytest
import torch
from safetensors.torch import load_file

from fedllm import client, server
from fedllm.events import read_events
from fedllm.records import decode
from tests.unit.test_server import NODES, ClientGrid, write_rows

WAYS = [
    "stack",
    "exact",
    *(pytest.param(way, marks=pytest.mark.slow) for way in ("factor-average", "zero-pad", "svd")),
]


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)  # tests keep to one thread
    source = write_rows(tmp_path / "train.csv", 0, 120)
    return {
        "model.name": "tiny-random:bert",
        "lora.rank": 4,
        "lora.client-ranks": "1,2,4",
        "data.source": str(source),
        "data.test-fraction": 0.2,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.learning-rate": 1e-2,
        "train.batch-size": 8,
        "train.local-steps": 20,
        "server.min-nodes": 3,
        "server.node-timeout": 5.0,
        "run.root": str(tmp_path / "runs"),
        "run.name": "r",
    }


class Watching(ClientGrid):
    """Notes the ranks that each node was sent, and how many array records."""

    def __init__(self, flat):
        super().__init__(flat)
        self.ranks, self.records = {}, set()

    def answer(self, message, node):
        arrays = decode(message.content["arrays"])
        self.ranks.setdefault(NODES[node], set()).update(
            tensor.shape[0] for name, tensor in arrays.items() if "lora_A" in name
        )
        self.records |= set(message.content)
        return super().answer(message, node)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_mixed_ranks_learns_and_saves_an_adapter_of_the_full_rank(flat, way, tmp_path):
    flat |= {"lora.aggregation": way, "rounds": 3, "server.fraction-evaluate": 1.0}
    grid = Watching(flat)
    result = server.run(grid, flat)
    first, last = result.evaluate_metrics_serverapp[0], result.evaluate_metrics_serverapp[3]
    assert last["loss"] < first["loss"] - 0.01
    assert result.evaluate_metrics_clientapp[3]["loss"] < first["loss"]
    assert grid.ranks == {0: {1}, 1: {2}, 2: {4}}
    assert ("frozen" in grid.records) == (way == "stack")
    saved = load_file(tmp_path / "runs/r/adapter/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {4}
    dropped = [e for e in read_events(tmp_path / "runs/r/events.jsonl") if e["event"] == "node-dropped"]
    assert not dropped


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stack", "exact"])
def test_a_resumed_run_of_mixed_ranks_ends_with_the_same_bits(flat, way):
    def run(**changes):
        own = flat | {"lora.aggregation": way, "train.local-steps": 3, **changes}
        return decode(server.run(ClientGrid(own), own).arrays)

    whole = run(**{"rounds": 4, "run.name": "whole"})
    run(**{"rounds": 2, "run.name": "cut"})
    resumed = run(**{"rounds": 4, "run.name": "cut", "run.resume": True})
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
