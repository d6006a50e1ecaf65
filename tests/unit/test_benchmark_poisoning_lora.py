"""The attack bench on adapters: its runs on a tiny model, its figures from given outcomes."""

import sys

import pytest
import torch

from fedllm import client
from fedllm.records import decode
from tests.benchmark_scripts import load, write_texts


@pytest.fixture
def bench(monkeypatch):
    return load("poisoning_lora", monkeypatch)


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path, 120, 20)


@pytest.fixture
def tiny(bench, monkeypatch):
    small = {
        "model.name": "tiny-random:bert",
        "data.max-length": 12,
        "data.partitioner": "iid",
        "train.batch-size": 4,
    }
    for key, value in small.items():
        monkeypatch.setitem(bench.COMMON, key, value)
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)
    monkeypatch.setenv("RAY_JOB_ID", "01")
    bench.pretend_to_be_flower()
    return bench


@pytest.mark.parametrize(
    ("cell", "kept"),
    [(("any", "oracle"), (1.0, 0.0)), (("label-flip", "mean"), (1.0, 1.0)), (("none", "vert"), (None, 0.0))],
)
def test_who_counts(tiny, data, cell, kept):
    outcome = tiny.run(tiny.configuration(cell, data, 1, 3, 1, 20), clients=5)
    assert 0 <= outcome.accuracy <= 1
    assert outcome.hostile_kept == kept[1]
    assert kept[0] in (None, outcome.honest_kept)


def test_a_colluding_attack_meets_each_defence(tiny, data):
    for defence in ("multi-krum", "temporal-cosine", "vert"):
        outcome = tiny.run(tiny.configuration(("ipm", defence), data, 1, 3, 1, 20), clients=5)
        kept = 4 * outcome.hostile_kept + outcome.honest_kept  # of five, 80 % hostile
        assert kept == pytest.approx({"multi-krum": 3, "temporal-cosine": 1}.get(defence, kept))
        assert 0 <= kept <= 5


@pytest.mark.parametrize("attack", ["ipm", "alie", "min-max"])
def test_hostile_clients_whose_replies_are_overwritten_need_not_train(tiny, data, monkeypatch, attack):
    def ended():
        states, trained = [], []
        real = client.train
        with monkeypatch.context() as patch:
            patch.setattr(client, "train", lambda *given: trained.append(0) or real(*given))
            patch.setattr(tiny.Arena, "accuracy", lambda self, arrays: states.append(decode(arrays)) or 0.5)
            outcome = tiny.run(tiny.configuration((attack, "vert"), data, 1, 4, 1, 20), clients=5)
        return outcome.hostile_kept, states[0], len(trained)

    assert attack in tiny.FORGED
    spared = ended()
    monkeypatch.setattr(tiny, "FORGED", ())
    whole = ended()
    assert spared[0] == whole[0]
    assert all(torch.equal(spared[1][name], value) for name, value in whole[1].items())
    assert (spared[2], whole[2]) == (4 * 5 - 2 * 4, 4 * 5)


def test_every_attack_is_run_against_every_defence_once(bench):
    cells = bench.cells()
    assert len(cells) == len(set(cells)) == 3 + 5 * 4


def test_gaps_are_to_the_oracle(bench):
    def outcome(accuracy):
        return bench.Outcome(accuracy, 1.0, 0.0, 1.0)

    found = bench.summarise(
        {
            bench.ORACLE: outcome(0.85),
            ("none", "mean"): outcome(0.86),
            ("none", "vert"): outcome(0.855),
            ("ipm", "vert"): outcome(0.84),
            ("alie", "vert"): outcome(0.8),
            ("alie", "mean"): outcome(0.2),
        }
    )
    assert found["vert_worst_gap_to_oracle"] == pytest.approx(5)
    assert found["mean_worst_gap_to_oracle"] == pytest.approx(65)
    assert found["multi_krum_worst_gap_to_oracle"] is None
    assert found["vert_loss_without_attack"] == pytest.approx(0.5)
    assert found["vert_accuracy_ipm"] == 0.84


def test_finished_runs_are_not_repeated(tiny, data, tmp_path, monkeypatch):
    played = []

    def played_run(config):
        played.append(config.attack)
        return tiny.Outcome(0.5, 1.0, 0.0, 1.0)

    monkeypatch.setattr(tiny, "run", played_run)
    arguments = ["x", "--data", str(data), "--only", "ipm", "--partial", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--csv", str(tmp_path / "cells.csv")])
    tiny.main()
    assert played == [tiny.HONEST_ONLY, *["ipm"] * 4]
    tiny.main()
    assert len(played) == 5
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 6


def test_it_says_what_to_pass_when_the_data_is_absent(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["poisoning_lora.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data FOLDER"):
        bench.main()
