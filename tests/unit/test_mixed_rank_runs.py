"""Whole runs in one process whose clients hold adapters of ranks 1, 2 and 4: real clients, server and checkpoints."""

import pytest
import torch
from safetensors.torch import load_file

from fedllm import client, registry, server
from fedllm.aggregation import leading, remainder
from fedllm.events import read_events
from fedllm.frozen import frozen_products
from fedllm.models import load_bundle
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
    assert ("frozen" in grid.records) == (way in ("stack", "exact"))
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


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_client_of_any_rank_starts_from_the_global_model(flat, rank):
    bundle = load_bundle(registry.config_from_flat(flat), ("a", "b"))
    generator = torch.Generator().manual_seed(rank)
    whole = {name: torch.randn(t.shape, generator=generator) for name, t in bundle.initial_state.items()}
    tokens = torch.randint(5, 50, (3, 12), generator=generator)
    bundle.model.eval()

    def logits(state, rest):
        bundle.load_adapter_state(state, any_ranks=True)
        with torch.no_grad(), frozen_products(bundle.model, rest):
            return bundle.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits

    share = leading(whole, rank)
    rest = remainder(whole, {name: tensor.shape for name, tensor in share.items()})
    assert bool(rest) == (rank < 4)
    expected = logits(whole, {})
    torch.testing.assert_close(logits(share, rest), expected, rtol=1e-4, atol=1e-5)
    if rank < 4:
        assert not torch.allclose(logits(share, {}), expected, atol=1e-3)


def test_nothing_travels_for_terms_of_product_zero_and_for_modules_that_a_client_lacks():
    a, b = torch.randn(4, 6), torch.randn(5, 4)
    b[:, 2:] = 0
    arrays = {f"m{i}.lora_{side}.weight": value for i in (0, 1) for side, value in (("A", a), ("B", b))}
    held = {"m0.lora_A.weight": (1, 6), "m0.lora_B.weight": (5, 1)}
    rest = remainder(arrays, held)
    assert set(rest) == set(held)
    assert torch.equal(rest["m0.lora_A.weight"], a[1:2])
    assert torch.equal(rest["m0.lora_B.weight"], b[:, 1:2])
    assert remainder(arrays, {"m0.lora_A.weight": (2, 6), "m0.lora_B.weight": (5, 2)}) == {}
