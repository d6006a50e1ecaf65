"""The second-order benchmarks' bookkeeping: tuning rows, costs, partial reports, and what a stored run depends on."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from fedllm.strategies.second_order.fagh import FAGH

from fedllm.records import encode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("second_order", "second_order_methods", "second_order_cost", "mnist", "harness", "code_identity")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import second_order

        yield second_order
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def digits(bench):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 10
    x = torch.randn(150, 1, 28, 28, generator=generator).mul_(0.05)
    x[:, 0, :10, 0] += torch.nn.functional.one_hot(y, 10) * 3.0  # ten pixels that tell the label
    return bench.mnist.Digits("made", x[:120], y[:120], x[120:], y[120:])


@pytest.fixture
def run(bench, digits, tmp_path, monkeypatch, capsys):
    """Run the script on the made-up digits; the JSON and what was printed."""
    setting = bench.Setting("logistic", 3, accuracy=0.8, loss=1.5, rounds=40)
    monkeypatch.setattr(bench, "QUICK_SETTINGS", (setting,))
    monkeypatch.setattr(bench.mnist, "load_digits", lambda seed: digits)
    threads = torch.get_num_threads()

    def start(*options):
        out = tmp_path / "out.json"
        line = [
            "second_order.py",
            "--quick",
            "--json",
            str(out),
            "--cache",
            str(tmp_path / "cache"),
            *options,
        ]
        monkeypatch.setattr(sys, "argv", line)
        bench.main()
        return json.loads(out.read_text(encoding="utf-8")), " ".join(capsys.readouterr().out.split())

    yield start
    torch.set_num_threads(threads)


def test_tuning_sees_no_test_row(bench, digits):
    tuning = bench.without_test_rows(digits)
    assert len(tuning.train_y) == 96
    assert len(tuning.test_y) == 24
    together = torch.cat([tuning.test_x, tuning.train_x])
    assert torch.equal(together, digits.train_x)


def test_a_partial_report_tells_what_it_covers_and_grows_with_the_cache(run):
    figures, printed = run("--methods", "fedsgdm,fagh")
    assert figures["complete"] is False
    assert figures["logistic_3_methods"] == "fedsgdm,fagh"
    assert figures["fagh_rounds"] is not None
    assert figures["sofim_rounds"] is None
    assert figures["best_other"] == "fedsgdm"
    assert figures["worst_ratio_to_fedsgdm"] == figures["fagh_rounds"] / figures["fedsgdm_rounds"]
    assert figures["worst_ratio_to_best_other"] is None
    assert "covers fedsgdm,fagh of 20 methods" in printed
    assert {"fagh_paper_rounds", "fedavg_rounds", "best_other_rounds", "hybrid_rounds"} <= set(figures)

    more, printed = run("--methods", "sofim")
    assert more["logistic_3_methods"] == "fedsgdm,sofim,fagh"
    assert "trial η/ρ" in printed  # SOFIM's, not the others'
    assert printed.count("trial") == 3
    assert more["fagh_rounds"] == figures["fagh_rounds"]


def sent_down():
    """Bytes that FAGH's own messages to a client have in a round with a direction."""
    start = {"weight": torch.ones(10, 784), "bias": torch.zeros(10)}
    optimizer = FAGH().server_optimizer
    optimizer.accumulator()
    optimizer.step(1, start, {name: torch.ones_like(tensor) for name, tensor in start.items()})
    sent = [encode(start), optimizer.ask(start)]
    return sum(len(array.data) for record in sent for array in record.values())


def test_costs_are_told_to_both_targets(run):
    figures, printed = run("--methods", "fagh")
    prefix = "logistic_3_fagh"
    for ending, rounds in (("", figures[f"{prefix}_rounds"]), ("_to_loss", figures[f"{prefix}_loss_rounds"])):
        assert figures[f"{prefix}_evaluations{ending}"] == rounds * 2
        assert figures[f"{prefix}_megabytes_up{ending}"] == pytest.approx(rounds * 2 * 4 * 7850 * 3 / 1e6)
        assert figures[f"{prefix}_megabytes_down{ending}"] == pytest.approx(
            rounds * sent_down() * 3 / 1e6, rel=0.01
        )
        assert figures[f"{prefix}_seconds{ending}"] == pytest.approx(
            rounds * figures[f"{prefix}_seconds_per_round"]
        )
    assert ("end of its grid" in printed) == bool(figures[f"{prefix}_at_edge"])


def test_a_best_value_at_the_end_of_its_grid_is_said(bench):
    first = next(m for m in bench.METHODS if m.key == "fedsgdm")
    method = dataclasses.replace(first, grids={"lenet": ((0.1, 0.2, 0.4), (0.8, 0.9, 0.95))})
    assert bench.grid_edges(method, "lenet", (0.2, 0.9), False) == []
    assert bench.grid_edges(method, "lenet", (0.4, 0.9), False) == ["η/ρ=0.4"]
    assert bench.grid_edges(method, "lenet", (0.1, 0.95), False) == ["η/ρ=0.1", "β₁=0.95"]
    assert bench.grid_edges(method, "lenet", (0.2, 0.9), True) == []  # the second one had no choice


def identities(bench):
    setting = bench.QUICK_SETTINGS[0]
    return {method.key: bench._identity(setting, method, 0, True) for method in bench.METHODS}


@pytest.mark.parametrize(
    ("module", "name", "changed"),
    [
        (
            "fedllm.strategies.second_order.sofim",
            "momentum_direction",
            {"sofim", "sofim_gradient"},
        ),
        (
            "fedllm.strategies.second_order.limited_memory",
            "CurvatureMemory",
            {"fagh", "fagh_untuned", "fagh_identity", "fagh_rank1", "fagh_off", "hybrid"},
        ),
        ("second_order_methods", "Scaffold", {"scaffold", "scaffold_2"}),
        ("second_order_methods", "Adaptive", {"fedadam", "fedyogi", "fedadam_2", "fedyogi_2"}),
        ("mnist", "FlatModel", None),
        ("fedllm.partition", "partition_rows", None),
        ("second_order", "play", None),
    ],
)
def test_a_change_of_code_begins_the_methods_anew_that_run_it(bench, monkeypatch, module, name, changed):
    before = identities(bench)
    assert before == identities(bench)
    import code_identity

    plain = code_identity._of_source

    def edited(found):
        names, text = plain(found)
        return names, text + "# changed" * (found.__module__ == module and found.__qualname__ == name)

    monkeypatch.setattr(code_identity, "_of_source", edited)
    after = identities(bench)
    assert {key for key in before if before[key] != after[key]} == (changed or set(before))


def test_docstrings_and_comments_change_no_identity(bench):
    import code_identity

    def one(x):
        """A."""
        return x + 1

    def two(x):
        """B, longer."""
        return x + 1  # a comment

    texts = [code_identity._of_source(f)[1].replace("'two'", "'one'") for f in (one, two)]
    assert texts[0] == texts[1]
    lambdas = [code_identity.code_identity((f,), (), 0) for f in (lambda r: r + 1, lambda r: r + 2)]
    assert lambdas[0] != lambdas[1]


def test_costs_of_server_updates_are_counted(bench):
    import second_order_cost as cost

    paper = cost.measure_update(cost.FaghPaper, 3_000_000, 2, 1, 0)
    assert 5 <= paper["vectors_peak"] < 5.5  # blocks of float64 beside five vectors
    sofim = cost.measure_update(cost.Sofim, 3_000_000, 2, 1, 0)
    assert 3 <= sofim["vectors_peak"] < 3.5
    assert paper["100m_seconds"] > 0
    # The model and m, v: 3; float64 sums of gradients and rows: 4; one reply and its row: 2. SOFIM: 2, 2 and 1.
    assert 9 <= cost.round_vectors(cost.FAGH(preset="paper"), 1_000_000, 1, 0) < 9.5
    assert 5 <= cost.round_vectors(cost.SOFIM(), 1_000_000, 1, 0) < 5.5
    figures = cost.measure_client(cost.lenet(20, 0), 2, 0)
    assert figures["row_over_gradient_peak"] > 1
    assert figures["row_over_gradient_seconds"] == figures["row_seconds"] / figures["gradient_seconds"]
