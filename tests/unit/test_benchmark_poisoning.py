"""The attack bench: what is played, what is kept of it, and the figures of given cells."""

import argparse
import itertools

import pytest

from tests.benchmark_scripts import BENCHMARKS, load

ISSUE_KEYS = {
    "vert_worst_gap_to_oracle_at_80",
    "vert_loss_without_attack",
    "temporal_cosine_worst_gap_to_oracle_at_80",
    "vert_paper_worst_gap_to_oracle_at_80",
}


@pytest.fixture
def bench(monkeypatch):
    return load("poisoning", monkeypatch)


@pytest.fixture
def figures(bench):
    import poisoning_figures

    return poisoning_figures


@pytest.fixture
def store(bench):
    import poisoning_cells

    return poisoning_cells


def options(**changes):
    chosen = {
        "clients": "20", "alphas": "100,0.3", "shares": "0,0.8", "only_share": "", "seed": 0, "seeds": 1,
        "attacks": "sign-flip,min-max", "defences": "mean,vert", "rounds": 20, "onset": 2,
    }  # fmt: skip
    return argparse.Namespace(**chosen | changes)


def outcome(accuracy=0.9, by_round=(0.0, 0.0), **changes):
    from poisoning_arena import Outcome

    rest = {"attack_success": 0.1, "honest_kept": 1.0, "hostile_kept": 0.0, "queries": 0, "candidates": 0}
    rest |= {"attack_seconds": 0.0, "strength": 0.0}
    return Outcome(accuracy=accuracy, hostile_by_round=by_round, **rest | changes)


def rows_of(store, accuracies, **changes):
    """Rows of ``{(α, share, attack, defence): accuracy}``, or with further settings at the end."""
    rows = []
    for (alpha, share, attack, defence), accuracy in accuracies.items():
        given = {"clients": 20, "onset": 2, "rounds": 20, "seed": 0, **changes}
        cell = {"alpha": alpha, "share": share, "attack": attack, "defence": defence, **given}
        rows.append({**vars(outcome(accuracy)), **cell})
    return rows


# -------------------------------------------------------------------- cells


def test_no_cell_is_played_twice(bench):
    cells = bench.planned(options(), bench.PARTS)
    assert len(cells) == len(set(cells))
    table = [cell for cell in cells if cell.onset == 2]
    unattacked = {(c.alpha, c.attack, c.defence) for c in table if c.share == 0}
    assert unattacked == {
        (alpha, *pair)
        for alpha in (100.0, 0.3)
        for pair in (("none", "mean"), ("none", "vert"), ("any", "oracle"))
    }
    attacked = {(c.alpha, c.attack, c.defence) for c in table if c.share == 0.8}
    assert attacked == {
        (alpha, *pair)
        for alpha in (100.0, 0.3)
        for pair in (*itertools.product(("sign-flip", "min-max"), ("mean", "vert")), ("any", "oracle"))
    }
    assert {c.defence for c in cells if c.onset == 5} == {"vert", "oracle"}
    assert {c.defence for c in cells if c.onset == 0} == {"vert-root", "fltrust", "oracle"}


def test_a_part_can_be_run_by_itself(bench):
    cells = bench.planned(options(only_share="0.8", alphas="1.0", seeds=2, seed=4), ["table"])
    assert {(c.clients, c.alpha, c.share, c.onset) for c in cells} == {(20, 1.0, 0.8, 2)}
    assert {c.seed for c in cells} == {4, 5}
    assert bench.planned(options(), ["cost"]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": "sign-flp"}, "--attacks: unknown sign-flp; known: sign-flip"),
        ({"defences": "none"}, "--defences: unknown none"),
        ({"shares": "0,1.5"}, "--shares: expected shares from 0 to below 1"),
        ({"alphas": "one"}, "--alphas: expected numbers with commas, found 'one'"),
    ],
)
def test_a_wrong_selection_is_refused(bench, changes, message):
    with pytest.raises(SystemExit, match=message):
        bench.planned(options(**changes), bench.PARTS)


def test_finished_cells_survive(store, tmp_path):
    cell = store.Cell(20, 0.3, 0.8, 2, 20, "sign-flip", "vert", 1)
    cells = store.Cells(tmp_path / "new" / "cells.csv", "digits")
    cells.put(cell, outcome(0.875, (0.5, 0.0625)), 1.234)
    again = store.Cells(cells.path, "digits")
    assert again.rows == {cell: {**cells.rows[cell]}}
    assert again.rows[cell]["hostile_by_round"] == (0.5, 0.0625)
    assert again.stale == 0


def test_a_file_that_was_cut_or_has_its_head_twice_is_read(store, tmp_path):
    first = store.Cell(20, 0.3, 0.8, 2, 20, "sign-flip", "vert", 1)
    cells = store.Cells(tmp_path / "cells.csv", "digits")
    cells.put(first, outcome(), 1.0)
    cells.put(first._replace(seed=2), outcome(), 1.0)
    content = cells.path.read_text()
    head = content.splitlines()[0]
    cells.path.write_text(content.replace("\n", f"\n{head}\n", 1)[:-25])
    again = store.Cells(cells.path, "digits")
    assert list(again.rows) == [first]
    again.put(first._replace(seed=3), outcome(), 1.0)
    assert list(store.Cells(cells.path, "digits").rows) == [first, first._replace(seed=3)]
    assert cells.path.read_text().count(head) == 1
    cells.path.write_text("clients,alpha\n20,0.3\n")
    assert store.Cells(cells.path, "digits").rows == {}
    assert (tmp_path / "cells.old.csv").read_text() == "clients,alpha\n20,0.3\n"


def test_a_change_of_one_defence_costs_no_other_ones_cells(store, tmp_path, monkeypatch):
    vert = store.Cell(20, 0.3, 0.8, 2, 20, "sign-flip", "vert", 1)
    rival = vert._replace(defence="krum")
    cells = store.Cells(tmp_path / "cells.csv", "digits")
    cells.put(vert, outcome(), 1.0)
    cells.put(rival, outcome(), 1.0)
    code = store._code
    monkeypatch.setattr(store, "_code", lambda path: code(path) + ("!" if path.stem == "detector" else ""))
    again = store.Cells(cells.path, "digits")
    assert (list(again.rows), again.stale) == ([rival], 1)
    assert "sign-flip,vert," in (tmp_path / "cells.stale.csv").read_text()
    assert store.Cells(cells.path, "other digits").rows == {}


def test_comments_do_not_change_an_identity(store, tmp_path):
    one, other, third = (tmp_path / f"{name}.py" for name in "abc")
    one.write_text('"""A."""\nx = 1\n')
    other.write_text('"""B."""\n# why\nx  =  1\n')
    third.write_text("x = 2\n")
    assert store._code(one) == store._code(other) != store._code(third)


def test_every_named_module_is_there(store):
    for defence in ("mean", *store.OWN):
        assert len(store.identity(defence, "digits")) == 16
    assert store.identity("mean", "d") == store.identity("krum", "d") != store.identity("vert", "d")


# ------------------------------------------------------------------ figures


def test_the_worst_gap_counts_the_backdoor_but_not_the_adaptive_attack(figures, store):
    rows = rows_of(
        store,
        {
            (100.0, 0.8, "any", "oracle"): 0.9,
            (100.0, 0.8, "sign-flip", "vert"): 0.895,
            (100.0, 0.8, "backdoor", "vert"): 0.88,
            (100.0, 0.8, "min-max", "vert"): 0.80,
            (100.0, 0.8, "adaptive", "vert"): 0.5,
            (0.3, 0.8, "any", "oracle"): 0.8,
            (0.3, 0.8, "min-max", "vert"): 0.79,
        },
    )
    found = figures.main_figures(rows)
    assert found["vert_worst_gap_to_oracle_at_80"] == pytest.approx(10)
    assert found["vert_worst_gap_outside_exempt_at_80"] == pytest.approx(2)
    assert found["vert_gap_under_adaptive_attack_at_80"] == pytest.approx(40)
    assert found["vert_backdoor_success_at_80"] == pytest.approx(0.1)
    assert found["vert_paper_worst_gap_to_oracle_at_80"] is None
    assert found.keys() >= ISSUE_KEYS


def test_auto_and_known_and_rivals_are_compared_cell_by_cell(figures, store):
    rows = rows_of(
        store,
        {
            (100.0, 0.8, "any", "oracle"): 0.9,
            (100.0, 0.8, "min-max", "vert"): 0.80,
            (100.0, 0.8, "min-max", "vert-known"): 0.75,
            (100.0, 0.8, "min-max", "krum"): 0.60,
            (100.0, 0.8, "min-max", "fltrust"): 0.83,
            (100.0, 0.8, "zero", "vert"): 0.86,
            (100.0, 0.8, "zero", "vert-known"): 0.89,
            (100.0, 0.8, "zero", "krum"): 0.9,
        },
    )
    found = figures.main_figures(rows)
    assert found["vert_auto_minus_known_worst_at_80"] == pytest.approx(-3)
    assert found["vert_minus_best_rival_on_exempt_at_80"] == pytest.approx(-3)
    assert found["vert_minus_best_rival_without_trusted_data_on_exempt_at_80"] == pytest.approx(20)


def test_seeds_are_averaged_and_those_without_an_oracle_left_out(figures, store):
    cells = {(0.3, 0.8, "any", "oracle"): 0.9, (0.3, 0.8, "zero", "vert"): 0.8}
    rows = rows_of(store, cells) + rows_of(store, {**cells, (0.3, 0.8, "zero", "vert"): 0.7}, seed=1)
    rows += rows_of(store, {(0.3, 0.8, "zero", "vert"): 0.1}, seed=2)
    assert figures.main_figures(rows)["vert_worst_gap_to_oracle_at_80"] == pytest.approx(15)


def test_what_the_adaptive_attacker_spent(figures, store):
    rows = rows_of(store, {(0.3, 0.8, "any", "oracle"): 0.9, (0.3, 0.8, "adaptive", "vert"): 0.8})
    rows[1] |= {"queries": 198, "candidates": 3168, "attack_seconds": 9.0, "strength": 0.1}
    found = figures.main_figures(rows)
    assert (found["adaptive_queries_per_round"], found["adaptive_candidates_per_round"]) == (11, 176)
    assert (found["adaptive_seconds_per_round"], found["adaptive_strength"]) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("by_round", "expected"),
    [((0.0, 0.0, 0.06), 1), ((1.0, 0.0, 0.0), 2), ((0.0, 0.5, 0.0), 3), ((1.0, 1.0, 1.0), 4)],
)
def test_rounds_until_attackers_are_caught_for_good(figures, by_round, expected):
    assert figures.rounds_to_catch(by_round) == expected


def test_late_attackers_have_a_figure_each(figures, store):
    cells = {
        (100.0, 0.8, "min-max", "vert"): 0.8,
        (0.3, 0.8, "min-max", "vert"): 0.8,
        (0.3, 0.8, "zero", "vert"): 0.8,
    }
    rows = rows_of(store, cells, onset=5, rounds=10)
    for row, by_round in zip(rows, [(1.0,) * 5, (1.0, 0, 0, 0, 0), (0.0,) * 5], strict=True):
        row["hostile_by_round"] = by_round
    found = figures.late_figures(rows)
    assert found["late_rounds_to_catch_min-max"] == found["late_rounds_to_catch_worst"] == 6
    assert found["late_rounds_to_catch_worst_outside_exempt"] == 2
    assert found["late_rounds_to_catch_zero"] == 1
    assert found["late_caught_at_once_share"] == pytest.approx(1 / 3)
    assert figures.late_figures([])["late_rounds_to_catch_worst"] is None


def test_missing_cells_are_drawn_as_missing(figures, store, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *args, **kw: texts.append(args[3]) or original(*args, **kw))
    cells = {
        (0.3, 0.8, "any", "oracle"): 0.9,
        (0.3, 0.8, "zero", "vert"): 0.9,
        (0.3, 0.8, "zero", "mean"): 0.5,
        (0.3, 0.8, "replay", "mean"): 0.6,
    }
    figures.draw(figures.gaps(rows_of(store, cells)), tmp_path / "map.png", 0.8)
    assert sorted(texts) == ["0", "30", "40", "–"]
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_figures_say_what_they_cover(bench, store):
    rows = rows_of(store, {(0.3, 0.8, "any", "oracle"): 0.9, (0.3, 0.8, "zero", "vert"): 0.8})
    rows += rows_of(store, {(0.3, 0.8, "any", "oracle"): 0.9}, rounds=12)
    found = bench.figures(rows, options())
    assert (found["cells"], found["covered_clients"], found["covered_alphas"]) == (2, "20", "0.3")
    assert (found["covered_attacks"], found["covered_seeds"]) == ("any,zero", "0")
    assert not any(isinstance(value, dict | list) for value in found.values())


# --------------------------------------------------------------------- game


@pytest.fixture(scope="module")
def arena():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import poisoning_arena

        return poisoning_arena.Arena(5, 100.0, 0.6, seed=0, root_examples=20)


def test_attackers_of_a_game(bench, arena):
    from poisoning_arena import play

    defence = bench.defences(5, 3, 0)
    plain = play(arena, "adaptive", defence["vert"](), 4, 2)
    assert len(plain.hostile_by_round) == 2
    assert (plain.queries, plain.candidates) == (2 * 11, 2 * 11 * 3)
    assert plain.attack_seconds > 0
    assert plain.strength >= 0
    assert plain.hostile_kept == pytest.approx(sum(plain.hostile_by_round) / 2)
    flipped = play(arena, "sign-flip", defence["vert"](), 3, 2)
    assert (flipped.hostile_by_round, flipped.queries) == ((0.0,), 0)


def test_gradients_of_all_clients_are_those_of_autograd(arena):
    import torch
    from poisoning_arena import mlp_gradients

    generator = torch.Generator().manual_seed(1)
    vectors = arena.model.initial + 0.1 * torch.randn(3, arena.model.size, generator=generator)
    x = torch.randn(3, 7, 1, 28, 28, generator=generator)
    y = torch.randint(10, (3, 7), generator=generator)
    found = mlp_gradients(vectors, x.flatten(2), y)
    for row, vector in enumerate(vectors):
        expected = arena.model.gradient(vector, x[row], y[row])[1]
        assert torch.allclose(found[row], expected, atol=1e-6, rtol=1e-4)


def test_attackers_train_only_where_that_matters(bench, arena):
    import torch
    from poisoning_arena import FORGED, TRAINING

    weights, hostile = arena.model.initial, arena.hostile
    (some, root), (everybody, same) = (arena.train(weights, 3, all_clients=all_) for all_ in (False, True))
    assert not some[hostile].any()
    assert everybody[hostile].any(dim=1).all()
    assert torch.allclose(some[~hostile], everybody[~hostile], atol=1e-6)
    assert torch.allclose(root, same, atol=1e-6)
    for attack in FORGED:
        sent = [
            FORGED[attack](everybody[~hostile], own, torch.Generator().manual_seed(0))
            for own in (everybody[hostile], some[hostile])
        ]
        assert torch.equal(*sent) == (attack not in TRAINING), attack


def test_the_oracle_is_the_same_whatever_the_attack(bench, arena):
    from poisoning_arena import play

    oracle = bench.defences(5, 3, 0)["oracle"]
    quiet, loud = (play(arena, attack, oracle(), 3, 1) for attack in ("any", "label-flip"))
    assert quiet == loud
    assert quiet.hostile_kept == 0


def test_cost_counts_waiting_replies(bench):
    from poisoning_cost import cost

    found = cost(clients=4, parameters=300_000, rounds=2)
    assert found["cost_seconds_per_round_worst"] >= found["cost_seconds_per_round"] > 0
    assert found["cost_share_of_all_updates"] == pytest.approx(found["cost_peak_bytes"] / (4 * 4 * 300_000))
