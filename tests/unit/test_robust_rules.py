"""Robust rules against byzfl and against formulas written out in NumPy."""

import math
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.filtering import Cohort
from fedllm.strategies.robust import rules
from fedllm.strategies.robust import strategy as wrappers
from fedllm.strategies.robust.temporal import Flanders, FLDetector, TemporalCosine, best, split_high
from fedllm.strategies.vert.paper import PaperDetector
from fedllm.strategies.vert.paper_strategy import PaperVERT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedllm import registry
from fedllm.errors import PlanError
from tests.unit.test_vert import inner, loop, normal

GENERATOR = torch.Generator().manual_seed(0)
UPDATES = torch.cat(
    [torch.randn(9, 30, generator=GENERATOR) + 1, 4 * torch.randn(2, 30, generator=GENERATOR)]
)
F = 2


@pytest.fixture(scope="module")
def byzfl():
    """The library imports torchvision for a benchmark of its own, which is not needed here."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            patch.setitem(sys.modules, "torchvision", MagicMock())
        return pytest.importorskip("byzfl")


def test_rules_agree_with_byzfl(byzfl):
    # byzfl's Krum looks at one neighbour more than the paper: f + 1 gives the same number.
    pairs = {
        "median": (rules.median(UPDATES), byzfl.Median()),
        "trimmed mean": (rules.trimmed_mean(UPDATES, F), byzfl.TrMean(f=F)),
        "multi-krum": (rules.multi_krum_weights(UPDATES, F) @ UPDATES, byzfl.MultiKrum(f=F)),
        "krum": (rules.krum_weights(UPDATES, F) @ UPDATES, byzfl.Krum(f=F + 1)),
        "geometric median": (
            rules.geometric_median_weights(UPDATES) @ UPDATES,
            byzfl.GeometricMedian(nu=1e-6, T=200),
        ),
        "centred clipping": (
            rules.centred_clipping(UPDATES, torch.zeros(30), 3.0, 2),
            byzfl.CenteredClipping(L=2, tau=3.0),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        assert torch.allclose(ours, theirs(UPDATES.clone()), atol=1e-3), name
    assert torch.allclose(rules.nnm(UPDATES, F), byzfl.NNM(f=F)(UPDATES.clone()), atol=1e-5)


def pairwise(x):
    return ((x[:, None] - x[None]) ** 2).sum(2)


def test_krum_by_its_formula():
    x = UPDATES.numpy().astype(float)
    distances = pairwise(x)
    expected = [np.sort(np.delete(row, i))[: 11 - F - 2].sum() for i, row in enumerate(distances)]
    assert np.allclose(rules.krum_scores(UPDATES, F).numpy(), expected, rtol=1e-5)
    assert int(rules.krum_weights(UPDATES, F).argmax()) == int(np.argmin(expected))
    chosen = np.argsort(expected)[: 11 - F]
    assert set(rules.multi_krum_weights(UPDATES, F).nonzero()[:, 0].tolist()) == set(chosen.tolist())


def test_bulyan_by_its_formula():
    x, left, chosen = UPDATES.numpy().astype(float), list(range(11)), []
    for _ in range(11 - 2 * F):
        d = pairwise(x[left])
        scores = [np.sort(np.delete(row, i))[: max(1, len(left) - F - 2)].sum() for i, row in enumerate(d)]
        chosen.append(left.pop(int(np.argmin(scores))))
    rows = x[chosen]
    expected = []
    for column in rows.T:
        nearest = np.argsort(abs(column - np.median(column)))[: 11 - 4 * F]
        expected.append(column[nearest].mean())
    assert np.allclose(rules.bulyan(UPDATES, F).numpy(), expected, atol=1e-5)


def test_the_geometric_median_is_where_unit_pulls_cancel():
    median = rules.geometric_median_weights(UPDATES, steps=300) @ UPDATES
    pulls = torch.nn.functional.normalize(UPDATES - median, dim=1).sum(0)
    assert float(pulls.norm()) < 1e-2


def test_dnc_removes_those_along_the_top_singular_vector():
    direction = torch.zeros(30)
    direction[:3] = 5.0
    updates = torch.cat([UPDATES[:9], UPDATES[:2] + direction])
    weights = rules.dnc_weights(updates, 2, torch.Generator().manual_seed(0))
    assert (weights[9:] == 0).all()
    assert float(weights.sum()) == pytest.approx(1.0)


def test_fltrust_by_its_formula():
    root = torch.ones(30)
    x, r = UPDATES.numpy().astype(float), np.ones(30)
    trust = np.maximum(0, x @ r / np.linalg.norm(x, axis=1) / np.linalg.norm(r))
    scaled = x / np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(r)
    expected = (trust[:, None] * scaled).sum(0) / trust.sum()
    weights = rules.fltrust_weights(UPDATES, UPDATES.norm(dim=1), root, float(root.norm()))
    assert np.allclose((weights @ UPDATES).numpy(), expected, atol=1e-5)
    assert not rules.fltrust_weights(-root.expand(3, -1), torch.ones(3), root, 1.0).any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    arrays(np.float32, (7, 5), elements=st.floats(-100, 100, width=32)),
    st.integers(0, 6),
    st.permutations(range(7)),
)
def test_rules_do_not_depend_on_the_order_and_stay_inside(values, f, order):
    updates = torch.from_numpy(values)
    low, high = updates.min(0).values - 1e-3, updates.max(0).values + 1e-3
    for rule in (
        rules.median,
        lambda x: rules.trimmed_mean(x, f),
        lambda x: rules.bulyan(x, f),
        lambda x: rules.geometric_median_weights(x) @ x,
        lambda x: rules.multi_krum_weights(x, f) @ x,
        lambda x: rules.nnm(x, f).mean(0),
    ):
        found = rule(updates)
        assert ((found >= low) & (found <= high)).all()
    for rule in (rules.median, lambda x: rules.trimmed_mean(x, f)):
        assert torch.allclose(rule(updates), rule(updates[order]), atol=1e-4)


def test_norms_are_bounded():
    factors = rules.norm_bound_factors(torch.tensor([0.5, 2.0, 4.0]), 1.0)
    assert factors.tolist() == [1.0, 0.5, 0.25]


# --------------------------------------------------------------------- through rounds


def made_up(server_round, hostile=0):
    """A slowly changing matrix: each client its own direction; the last clients send noise."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(8, 60, generator=generator) + 1
    noise = torch.randn(8, 60, generator=torch.Generator().manual_seed(100 + server_round))
    updates = (1 - 0.02 * server_round) * base + 0.05 * noise
    if hostile:
        updates[-hostile:] = 2 * noise[-hostile:]
    return updates


@pytest.mark.parametrize(
    "make",
    [
        lambda: TemporalCosine(3),
        lambda: Flanders(3, coordinates=20),
        FLDetector,
    ],
    ids=["temporal-cosine", "flanders", "fldetector"],
)
def test_rivals_with_memory_keep_the_predictable(make):
    rival, names = make(), [str(i) for i in range(8)]
    for server_round in range(1, 8):
        kept, scores = rival.judge(names, made_up(server_round, 5 if server_round > 3 else 0))
        if server_round == 1:
            assert kept.all()
        if server_round > 3:
            assert kept.tolist() == [True] * 3 + [False] * 5, server_round
            assert scores[:3].min() > scores[3:].max()


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, 1), (3, 3), (3.0, 3), (100, 8), (0.5, 4), (0.25, 2), (0.01, 1), (math.inf, 8)]
)
def test_a_number_is_a_number_from_one_on_and_a_share_below(keep, kept):
    assert best(torch.arange(8.0), keep).tolist() == [False] * (8 - kept) + [True] * kept


@pytest.mark.parametrize("rival", [TemporalCosine(1), Flanders(1, coordinates=20)])
def test_one_honest_client_can_be_told(rival):
    names = [str(i) for i in range(8)]
    for server_round in range(1, 6):
        kept, _ = rival.judge(names, made_up(server_round, 7 if server_round > 3 else 0))
    assert kept.tolist() == [True] + [False] * 7


@pytest.mark.parametrize("name", ["temporal-cosine", "flanders"])
def test_the_key_keep_is_a_share_up_to_all(name):
    for keep, expected in ((1.0, 8), (0.5, 4)):
        _, told = loop(registry.load("defences", name)(FedAvg(fraction_evaluate=0), keep=keep), rounds=4)
        assert [sum(v["kept"].values()) for v in told.of("verdict")] == [8, 8, expected, expected]


def test_the_temporal_cosine_forgets_whom_it_has_not_seen_for_longest():
    def see(rival, *clients):
        rival.judge(list(clients), torch.stack([normal(client, shape=(20,)) for client in clients]))

    rival = TemporalCosine(0.5, clients=3)
    see(rival, "a", "b", "c")
    see(rival, "a")
    see(rival, "d")
    assert list(rival._own) == ["c", "a", "d"]
    other = TemporalCosine(0.5, clients=3)
    other.load_state_dict(rival.state_dict())
    see(other, "c")
    see(other, "e")
    assert set(other._own) == {"c", "d", "e"}
    for index in range(50):
        see(other, f"fresh {index}")
    assert len(other.state_dict()["own"]) == 3


@pytest.mark.parametrize(("share", "n", "f"), [(0.29, 100, 29), (0.2, 100, 20), (0.3, 11, 3), (0.19, 10, 1)])
def test_the_attackers_share_is_not_rounded_one_too_low(share, n, f):
    cohort = Cohort([str(i) for i in range(n)], torch.zeros(n, 2), torch.zeros(n))
    assert wrappers.Krum(FedAvg(), attackers=share).attackers(cohort) == f


def test_two_clusters_are_told_from_one():
    one = torch.linspace(0, 1, 20)
    assert split_high(one).all()
    two = torch.cat([torch.linspace(0, 0.1, 12), torch.linspace(0.9, 1, 8)])
    assert split_high(two).tolist() == [False] * 12 + [True] * 8


def test_the_published_form_finds_noise_and_shows_its_flaw():
    """Large noise is found; at small norms its projection's bias makes an update and its negative look alike."""
    names = [str(i) for i in range(8)]
    detector = PaperDetector(3, size=32)
    for server_round in range(1, 6):
        kept, _ = detector.judge(names, 3 * made_up(server_round, 5 if server_round > 2 else 0))
    assert kept.tolist() == [True] * 3 + [False] * 5

    def spread(bias):
        detector = PaperDetector(4, size=32, bias=bias)
        for server_round in (1, 2):
            detector.judge(names, 1e-3 * made_up(server_round))
        updates = 1e-3 * made_up(3)
        _, scores = detector.judge(names, torch.cat([updates[:4], -updates[4:]]))
        return float(scores[:4].mean() - scores[4:].mean())

    assert abs(spread(True)) < 0.1 < 0.2 < spread(False)


def test_the_published_form_survives_a_checkpoint():
    names = [str(i) for i in range(8)]
    first, second = PaperDetector(3, size=16), PaperDetector(3, size=16)
    for server_round in (1, 2, 3):
        first.judge(names, made_up(server_round, 5))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.judge(names, made_up(4, 5))[1], second.judge(names, made_up(4, 5))[1])


# ------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "DivideAndConquer", "GeometricMedian", "NormBound"])
def test_weights_of_a_wrapper_give_the_rules_result(name):
    wrapper = getattr(wrappers, name)(FedAvg())
    cohort = Cohort([str(i) for i in range(11)], UPDATES, UPDATES.norm(dim=1))
    verdict = wrapper.judge(1, cohort)
    kept = verdict.factors != 0
    mean = (verdict.factors[:, None] * UPDATES)[kept].mean(0)
    assert torch.allclose(mean, wrapper.weights(1, cohort) @ UPDATES, atol=1e-5)


@pytest.mark.parametrize("name", ["multi-krum", "geometric-median", "temporal-cosine"])
@pytest.mark.parametrize("kind", ["ours", "flower"])
def test_wrappers_run_around_any_strategy(name, kind):
    result, told = loop(registry.load("defences", name)(inner(kind)), hostile={8}, rounds=4)
    assert len(told.of("verdict")) == 4
    last = told.of("verdict")[-1]
    assert last["scores"]["n8"] == min(last["scores"].values())
    assert result.arrays is not None


def test_the_published_form_runs_as_a_wrapper():
    _, told = loop(PaperVERT(inner("ours"), keep=3, size=16), hostile={4, 5, 6, 7, 8}, rounds=4)
    assert [sum(v["kept"].values()) for v in told.of("verdict")] == [8, 8, 3, 3]
    assert not told.of("warning")


def test_the_published_form_warns_of_rounds_with_fewer_replies_than_it_keeps():
    _, told = loop(PaperVERT(inner("ours"), keep=9, size=16), rounds=3)
    assert [sum(v["kept"].values()) for v in told.of("verdict")] == [8, 8, 8]
    assert [event["message"].split(",")[0] for event in told.of("warning")] == [
        f"round {number}: vert-paper.keep is 9" for number in (1, 2, 3)
    ]


def test_whole_updates_of_different_length_are_refused():
    wrapper = PaperVERT(FedAvg())
    sketch = wrapper.represent({}, {"w": torch.ones(3)})
    message = type("M", (), {"metadata": type("D", (), {"src_node_id": 4})})()
    with pytest.raises(PlanError, match="node 4: its update has 3 numbers, those of the others 5"):
        wrapper._check_length(sketch, [torch.ones(5)], message)
