"""The benchmark of gradient modes: its driver on a tiny model, its figures from given outcomes."""

import sys
from dataclasses import asdict

import pytest

from fedllm import client
from tests.benchmark_scripts import load, write_texts

KEYS = {
    "spry_accuracy",
    "spry_paper_accuracy",
    "best_zeroth_order_accuracy",
    "backprop_accuracy",
    "backprop_checkpointed_accuracy",
}


@pytest.fixture
def benchmark(monkeypatch):
    return load("forward_mode", monkeypatch)


@pytest.fixture
def data(tmp_path):
    """A csv with as many rows as a hundred clients need."""
    return write_texts(tmp_path, 2500, 40)


def test_every_method_runs_on_the_clients_of_a_flower_app(benchmark, data, monkeypatch):
    monkeypatch.setitem(benchmark.COMMON, "model.name", "tiny-random:bert")
    monkeypatch.setitem(benchmark.COMMON, "data.max-length", 12)
    monkeypatch.setitem(benchmark.COMMON, "train.local-steps", 1)
    monkeypatch.setitem(benchmark.COMMON, "data.partitioner", "iid")
    monkeypatch.setattr(benchmark, "PER_ROUND", 3)
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)
    up = {}
    for name, method in benchmark.METHODS.items():
        config = benchmark.configuration(method, data, 1.0, 3, 40)
        outcome = benchmark.run(config, 1e-6, looks=1)
        assert outcome.rounds == 1
        assert outcome.steps == 3
        assert 0 <= outcome.accuracy <= 1
        up[name] = outcome.bytes_up
    assert up["spry"] < up["spry_paper"] < up["backprop"] == up["fedmezo"]


def test_figures_have_the_keys_that_are_asked_for(benchmark):
    def outcome(accuracy):
        return benchmark.Outcome(accuracy, 2, 200, 4000, [(10.0, accuracy)])

    outcomes = {
        name: {
            **{(1.0, seed): outcome(0.1 * place + 0.01 * seed) for seed in (5, 6, 7)},
            (0.1, 5): outcome(0.3),
        }
        for place, name in enumerate(benchmark.METHODS, start=1)
    }
    figures = benchmark.summarise(outcomes, 5)
    assert set(figures) >= KEYS
    assert figures["spry_accuracy"] == pytest.approx(0.16)
    assert figures["spry_accuracy_alpha_01"] == 0.3
    assert figures["best_zeroth_order_accuracy"] == pytest.approx(
        max(figures["fedmezo_accuracy"], figures["fwdllm_accuracy"])
    )
    assert figures["spry_kilobytes_up"] == pytest.approx(4000 / 2 / 10 / 1000)


def test_finished_runs_are_not_repeated(benchmark, tmp_path):
    settings, file = {"seed": 1, "minutes": 1.0}, str(tmp_path / "new" / "partial.json")
    outcome = benchmark.Outcome(0.5, 3, 30, 100, [(1.0, 0.4), (2.0, 0.5)])
    benchmark.Finished(file).put(settings, asdict(outcome))
    again = benchmark.Finished(file)
    found = benchmark.Outcome(**again.get(settings))
    assert (found.accuracy, found.rounds, [tuple(point) for point in found.curve]) == (0.5, 3, outcome.curve)
    assert again.get({**settings, "seed": 2}) is None
    assert again.get({**settings, "minutes": 2.0}) is None


def test_it_says_what_to_pass_when_the_data_is_absent(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forward_mode.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data FOLDER"):
        benchmark.main()
