"""The rivals as ``defence=``: what each makes of a round, against formulas written out in NumPy and against byzfl."""

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.filtering import Cohort
from fedllm.strategies.robust import coordinates, rules
from fedllm.strategies.robust.strategy import FLTrust
from fedllm.strategies.robust.temporal import Flanders, FLDetector, TemporalCosine
from fedllm.strategies.vert.sketch import Sketcher
from flwr.app import ConfigRecord

from fedllm import registry
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.errors import PlanError
from fedllm.records import ADAPTER, GRADIENT, decode, encode
from tests.fakes import FakeGrid, initial_arrays, reply_with
from tests.unit.test_vert import client, inner, loop, normal

N, D, F = 11, 30, 2
UPDATES = torch.cat([normal("honest", shape=(N - F, D)) + 1, 4 * normal("hostile", shape=(F, D))])
COHORT = Cohort([str(i) for i in range(N)], UPDATES, UPDATES.norm(dim=1))
COORDINATES = ["median", "trimmed-mean", "bulyan", "centred-clipping", "nnm"]


@pytest.fixture(scope="module")
def byzfl():
    """The library imports torchvision for a benchmark of its own, which is not needed here."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            patch.setitem(sys.modules, "torchvision", MagicMock())
        return pytest.importorskip("byzfl")


def made(name, **parameters):
    return registry.load("defences", name)(FedAvg(), **parameters)


# -------------------------------------------------------------- one round


def test_coordinate_rules_agree_with_byzfl(byzfl):
    clip = float(UPDATES.norm(dim=1).median())
    expected = {
        "median": byzfl.Median()(UPDATES.clone()),
        "trimmed-mean": byzfl.TrMean(f=F)(UPDATES.clone()),
        "centred-clipping": byzfl.CenteredClipping(L=3, tau=clip)(UPDATES.clone()),
        "nnm": byzfl.TrMean(f=F)(byzfl.NNM(f=F)(UPDATES.clone())),
    }
    for name, theirs in expected.items():
        assert torch.allclose(made(name).judge(1, COHORT).replacement, theirs, atol=1e-4), name


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"])
def test_rules_over_mixed_updates_agree_with_byzfl(byzfl, rule):
    theirs = {
        "mean": byzfl.Average(),
        "median": byzfl.Median(),
        "trimmed-mean": byzfl.TrMean(f=F),
        "krum": byzfl.Krum(f=F + 1),  # looks at one neighbour more than the paper
        "multi-krum": byzfl.MultiKrum(f=F),
        "geometric-median": byzfl.GeometricMedian(nu=1e-6, T=200),
    }[rule]
    found = made("nnm", rule=rule).judge(1, COHORT).replacement
    assert torch.allclose(found, theirs(byzfl.NNM(f=F)(UPDATES.clone())), atol=1e-3)


def test_mixing_by_its_formula():
    x = UPDATES.numpy().astype(float)
    distances = ((x[:, None] - x[None]) ** 2).sum(2)
    mixed = np.stack([x[np.argsort(row)[: N - F]].mean(0) for row in distances])
    expected = np.sort(mixed, 0)[F : N - F].mean(0)
    assert np.allclose(made("nnm").judge(1, COHORT).replacement.numpy(), expected, atol=1e-5)


def test_median_and_trimmed_mean_by_their_formulas():
    x = np.sort(UPDATES.numpy().astype(float), 0)
    assert np.allclose(made("median").judge(1, COHORT).replacement.numpy(), x[N // 2], atol=1e-6)
    trimmed = made("trimmed-mean", attackers=0.3).judge(1, COHORT).replacement  # f = 3 of 11
    assert np.allclose(trimmed.numpy(), x[3:8].mean(0), atol=1e-5)


def test_bulyan_is_the_rule_on_whole_updates():
    assert torch.equal(made("bulyan").judge(1, COHORT).replacement, rules.bulyan(UPDATES, F))


def test_centred_clipping_goes_on_from_its_last_result():
    defence = made("centred-clipping", steps=1, radius=0.5)
    centre = np.zeros(D)
    for server_round in (1, 2):
        x = UPDATES.numpy().astype(float) + server_round
        difference = x - centre
        norms = np.linalg.norm(difference, axis=1)
        centre = centre + (difference * np.minimum(1, 0.5 * np.median(norms) / norms)[:, None]).mean(0)
        found = defence.judge(server_round, Cohort(COHORT.clients, UPDATES + server_round, COHORT.norms))
    assert np.allclose(found.replacement.numpy(), centre, atol=1e-4)


@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("kind", ["ours", "flower"])
def test_the_inner_strategy_ends_at_the_rules_update_whatever_its_weights(name, kind):
    """Replies weigh 10 and 1,000 examples; a mean of what they carry is the rule's update all the same."""
    updates = {node: 0.1 * normal("update", node, shape=(19,)) for node in range(1, 8)}

    def answer(message, node):
        start = decode(message.content["arrays"])
        pieces = updates[node].split([value.numel() for value in start.values()])
        moved = {
            n: value + piece.view_as(value) for (n, value), piece in zip(start.items(), pieces, strict=True)
        }
        return reply_with(message, encode(moved), num_examples=10 if node < 4 else 1000)

    defence = registry.load("defences", name)(inner(kind))
    grid = FakeGrid(updates, answer)
    messages = list(defence.configure_train(1, initial_arrays(), ConfigRecord(), grid))
    replies = [answer(message, message.metadata.dst_node_id) for message in messages]
    for reply, message in zip(replies, messages, strict=True):
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
    order = [message.metadata.dst_node_id for message in messages]
    stacked = torch.stack([updates[node] for node in order])
    names = [str(node) for node in order]
    expected = registry.load("defences", name)(FedAvg()).judge(1, Cohort(names, stacked, stacked.norm(dim=1)))
    arrays, metrics = defence.aggregate_train(1, iter(replies))
    start = decode(initial_arrays())
    moved = torch.cat([(value - start[n]).flatten() for n, value in decode(arrays).items()])
    assert torch.allclose(moved, expected.replacement, atol=1e-5)
    assert metrics["loss"] == pytest.approx(1.0)


def test_adapters_of_different_ranks_are_refused_by_rules_over_coordinates():
    start = {"m.lora_A.weight": torch.ones(4, 6), "m.lora_B.weight": torch.zeros(5, 4)}
    strategy = coordinates.Median(FedAvg(fraction_evaluate=0, aggregation="exact", client_ranks=(2, 4)))
    grid = FakeGrid([1, 2], client())
    messages = list(strategy.configure_train(1, encode(start), ConfigRecord(), grid))
    replies = [client()(message, message.metadata.dst_node_id) for message in messages]
    for reply, message in zip(replies, messages, strict=True):
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
    with pytest.raises(PlanError, match=r"node 2: .*Median cannot compare adapters of different forms"):
        strategy.aggregate_train(1, iter(replies))


# ---------------------------------------------------------- trusted updates


def trusted(updates, root, **options):
    """FLTrust's verdict on a cohort whose sketches are as long as needed to be exact."""
    defence = FLTrust(FedAvg(), root=lambda server_round, current: {}, **options)
    defence.root_sketch = type("Root", (), {"vector": root, "norm": float(root.norm())})()
    return defence.judge(1, Cohort([str(i) for i in range(len(updates))], updates, updates.norm(dim=1)))


def test_fltrust_by_its_formula():
    root = torch.ones(D)
    verdict = trusted(UPDATES, root)
    kept = verdict.factors != 0
    x, r = UPDATES.numpy().astype(float), np.ones(D)
    trust = np.maximum(0, x @ r / np.linalg.norm(x, axis=1) / np.linalg.norm(r))
    scaled = x / np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(r)
    expected = (trust[:, None] * scaled).sum(0) / trust.sum()
    mean = (verdict.factors[:, None] * UPDATES)[kept].mean(0)
    assert np.allclose(mean.numpy(), expected, atol=1e-5)


def test_fltrust_holds_from_the_first_round_with_a_hostile_majority():
    def root(server_round, current):
        return {name: value + 0.1 * normal(name, shape=value.shape) for name, value in current.items()}

    _, told = loop(FLTrust(FedAvg(fraction_evaluate=0), root=root), hostile={4, 5, 6, 7, 8}, rounds=5)
    for verdict in told.of("verdict")[2:]:
        assert verdict["kept"] == {f"n{node}": node < 4 for node in range(1, 9)}


def test_fltrust_without_a_trusted_update_says_what_it_needs():
    with pytest.raises(PlanError, match="FLTrust has no trusted update: give root"):
        FLTrust(FedAvg()).judge(1, COHORT)


@pytest.mark.parametrize("reads", [ADAPTER, GRADIENT])
def test_a_trusted_gradient_is_not_taken_for_an_adapter(reads, monkeypatch):
    """Strategies that read gradients get the trusted gradient as it is, not its distance to the adapter."""
    monkeypatch.setattr(FedAvg, "reads", reads)
    found = {name: value + 0.5 for name, value in decode(initial_arrays()).items()}
    defence = FLTrust(FedAvg(), root=lambda server_round, current: found, sketch_size=64)
    defence.configure_train(1, initial_arrays(), ConfigRecord(), FakeGrid([1], client()))
    start = decode(initial_arrays()) if reads == ADAPTER else {}
    expected = Sketcher(64).update(start, found)
    assert torch.equal(defence.root_sketch.vector, expected.vector)


# ------------------------------------------------------------ through rounds


def test_fldetectors_curvature_is_the_bfgs_matrix():
    """The compact form against the recursive BFGS update B ← B − Bss'B/s'Bs + yy'/y's, from σI."""
    rule = FLDetector(window=4)
    curvature = torch.diag(torch.linspace(1, 3, 12))
    steps = [normal("step", i, shape=(12,)) for i in range(4)]
    changes = [curvature @ step for step in steps[:3]]
    rule._steps.extend(steps)
    rule._changes.extend(changes)
    s, y = steps[2].double().numpy(), changes[2].double().numpy()
    matrix = float(s @ y / (s @ s)) * np.eye(12)
    for step, change in zip(steps[:3], changes, strict=True):
        s, y = step.double().numpy(), change.double().numpy()
        bs = matrix @ s
        matrix = matrix - np.outer(bs, bs) / (s @ bs) + np.outer(y, y) / (y @ s)
    expected = matrix @ steps[3].double().numpy()
    assert np.allclose(rule._hessian_times(steps[3]).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_flanders_forecasts_what_follows_its_own_model():
    """Rows that follow X ← A X B exactly are forecast; a round later than they were fitted to."""
    a = torch.eye(6) * 0.9 + 0.05 * normal("a", shape=(6, 6))
    b = torch.eye(8) * 0.95 + 0.05 * normal("b", shape=(8, 8))
    rule, x, names = Flanders(6, coordinates=8, window=8), normal("x", shape=(6, 8)), list("abcdef")
    for _ in range(8):
        _, scores = rule.judge(names, x)
        x = a @ x @ b
    error = float(-scores.mean())
    naive = float((a @ x @ b - x).norm(dim=1).mean())
    assert error < 0.2 * naive


@pytest.mark.parametrize("make", [lambda: TemporalCosine(0.5), lambda: Flanders(0.5), FLDetector])
def test_memories_survive_a_checkpoint_and_clients_that_come_and_go(make, tmp_path):
    def round_of(server_round):
        present = [c for c in range(10) if (c + server_round) % 3]
        rows = [normal("common", shape=(40,)) + 0.3 * normal(c, server_round, shape=(40,)) for c in present]
        return [str(c) for c in present], torch.stack(rows)

    first, second = make(), make()
    for server_round in range(1, 6):
        first.judge(*round_of(server_round))
    CheckpointStore(tmp_path, "x").save(ServerState(5, encode({}), first.state_dict(), {}))
    second.load_state_dict(CheckpointStore(tmp_path, "x").latest()[0].strategy)
    for server_round in range(6, 9):
        one, other = first.judge(*round_of(server_round)), second.judge(*round_of(server_round))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_flanders_keeps_its_share_after_the_warm_up():
    defence = registry.load("defences", "flanders")(FedAvg(fraction_evaluate=0), keep=0.25, warm_up=3)
    _, told = loop(defence, rounds=5)
    assert [sum(v["kept"].values()) for v in told.of("verdict")] == [8, 8, 8, 2, 2]


def test_a_hostile_node_scores_last():
    defence = registry.load("defences", "temporal-cosine")(FedAvg(fraction_evaluate=0))
    _, told = loop(defence, hostile={8}, rounds=4)
    last = told.of("verdict")[-1]
    assert last["scores"]["n8"] == min(last["scores"].values())
