"""The memory benchmark on a small shape: its keys, and orders that must hold whatever the model is."""

import pytest
import torch
import transformers

from tests.benchmark_scripts import load


@pytest.fixture
def benchmark(monkeypatch):
    return load("client_memory", monkeypatch)


def test_keys_and_orders(benchmark):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    shape = benchmark.Shape("small", "small", config, 4, 32, True, torch.bfloat16)
    figures, rows = benchmark.measure(shape, "meta", False)
    for mode in benchmark.MODES:
        assert {
            f"small_{mode}_{end}"
            for end in ("activations_gib", "total_gib", "over_forward_ad", "flops_ratio")
        } <= set(figures)
    assert len(rows) == len(benchmark.MODES)
    assert figures["small_forward_ad_over_forward_ad"] == 1.0
    assert figures["small_bp_over_forward_ad"] > figures["small_bp_checkpointed_over_forward_ad"]
    assert figures["small_inference_flops_ratio"] == 1.0
    assert figures["small_zeroth_order_flops_ratio"] == pytest.approx(2.0)
    assert figures["small_bp_flops_ratio"] < figures["small_bp_checkpointed_flops_ratio"]


def test_the_named_keys_are_those_of_the_papers_models(benchmark):
    keys = {
        f"{shape.key}_{mode}_over_forward_ad"
        for shape in benchmark.shapes()
        for mode in ("bp", "bp_checkpointed")
    }
    assert keys == {
        f"{model}_{mode}_over_forward_ad"
        for model in ("roberta_large", "llama_7b", "opt_13b")
        for mode in ("bp", "bp_checkpointed")
    }
