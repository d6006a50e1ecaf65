"""What every defence holds against, whatever its rule: replies that cannot be judged, and what replies claim."""

import math
import re

import flwr.serverapp.strategy as flower
import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.filtering import ReplyFilter, Verdict
from fedllm.strategies.flat_updates import flat_update, set_update
from fedllm.strategies.robust.strategy import FLTrust
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from fedllm import registry
from fedllm.errors import NonFiniteLossError
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.records import ADAPTER, GRADIENT, MAX_EXAMPLES, decode, encode, only_arrays
from fedllm.rounds import run_rounds
from tests.fakes import FakeGrid, Recorder, initial_arrays, reply_with
from tests.unit.test_vert import normal

DEFENCES = sorted(registry.available("defences"))
NODES = range(1, 9)
LAST = 8
ROUNDS = 5


def wanted(name, value):
    """Where all clients want to go from what they were sent."""
    return 0.1 * normal(name, shape=value.shape)


def honest(start, node, server_round):
    return {
        name: value + wanted(name, value) + 0.03 * normal(name, node, server_round, shape=value.shape)
        for name, value in start.items()
    }


def answering(change, num_examples=lambda node: 10):
    """A client whose new adapter, after ``change(round, node, start, new)``, is what it replies."""

    def client(message, node):
        server_round = int(message.content["config"]["server-round"])
        start = decode(message.content["arrays"])
        new = change(server_round, node, start, honest(start, node, server_round))
        return reply_with(message, encode(new), num_examples(node))

    return client


def made(name, **parameters):
    defence = registry.load("defences", name)
    if issubclass(defence, FLTrust):
        parameters["root"] = lambda server_round, current: honest(current, 0, server_round)
    return defence(FedAvg(fraction_evaluate=0), **parameters)


def run(defence, client, initial=None, rounds=ROUNDS):
    told = Recorder()
    events = EventBus([told])
    defence.prepare(registry.config_from_flat({}), None, events)
    names = {node: f"n{node}" for node in NODES}
    initial = initial_arrays() if initial is None else initial
    options = LoopOptions(min_nodes=len(names), node_timeout=5)
    result = run_rounds(
        defence, FakeGrid(names, client, names=names), initial, rounds, options=options, events=events
    )
    return decode(result.arrays), told


# ------------------------------------------------------- replies that cannot be judged


@pytest.mark.parametrize("rounds", [{1}, {3}, {4, 5}], ids=["first", "third", "last"])
@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30])
@pytest.mark.parametrize("name", DEFENCES)
def test_a_huge_reply_costs_its_sender_its_vote_and_nobody_else(name, scale, rounds):
    def change(server_round, node, start, new):
        if node != LAST or server_round not in rounds:
            return new
        return {key: start[key] + scale * (value - start[key]) for key, value in new.items()}

    arrays, told = run(made(name), answering(change))
    assert all(bool(torch.isfinite(value).all()) for value in arrays.values())
    judged = {verdict["round"]: verdict for verdict in told.of("verdict")}
    assert set(judged) == set(range(1, ROUNDS + 1))
    assert not told.of("round-skipped")
    for verdict in judged.values():
        assert all(math.isfinite(score) for score in verdict["scores"].values())
        assert all(math.isfinite(factor) for factor in verdict["factors"].values())
    dropped = {event["round"]: event for event in told.of("node-dropped")}
    for event in dropped.values():
        assert event["node"] == f"n{LAST}"
        assert event["kind"] == "invalid"
        assert "norm of its update" in event["reason"]
    for server_round in rounds:
        assert any(kept for name, kept in judged[server_round]["kept"].items() if name != f"n{LAST}")
        assert (server_round in dropped) == (f"n{LAST}" not in judged[server_round]["kept"])
        assert scale < 1e20 or server_round in dropped
    assert set(dropped) <= rounds


@pytest.mark.parametrize("name", ["vert", "median"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda new: {}, "the reply has no tensors"),
        (lambda new: {**new, "other": torch.ones(2)}, "'other' was not sent"),
        (lambda new: {**new, "bias": new["bias"] > 0}, "'bias' is of truth values"),
        (lambda new: {**new, "bias": new["bias"][:2]}, r"'bias' has shape \(2,\), expected \(5,\)"),
        (lambda new: {**new, "bias": new["bias"].double() * math.inf}, "the norm of its update is inf"),
    ],
    ids=["empty", "unknown", "bool", "shape", "infinite"],
)
def test_a_malformed_reply_is_dropped_and_named(name, change, reason):
    """The loop checks replies itself; around a strategy that asks for other arrays, or in another loop, nobody does."""
    defence, told = made(name), Recorder()
    defence.prepare(registry.config_from_flat({}), None, EventBus([told]))
    messages = list(defence.configure_train(1, initial_arrays(), ConfigRecord(), FakeGrid([1, 2, 3], None)))
    replies = []
    for message in messages:
        node = message.metadata.dst_node_id
        new = honest(decode(message.content["arrays"]), node, 1)
        arrays = {key: Array(value.numpy()) for key, value in (change(new) if node == 2 else new).items()}
        replies.append(reply_with(message, ArrayRecord(arrays)))
    arrays, _ = defence.aggregate_train(1, iter(replies))
    (dropped,) = told.of("node-dropped")
    assert (dropped["round"], dropped["phase"], dropped["node"], dropped["kind"]) == (
        1,
        "train",
        "2",
        "invalid",
    )
    assert re.match(reason, dropped["reason"])
    assert set(told.of("verdict")[0]["kept"]) == {"1", "3"}
    assert all(bool(torch.isfinite(value).all()) for value in decode(arrays).values())


def test_where_every_reply_is_malformed_the_round_is_skipped():
    _, told = run(
        made("vert"), answering(lambda server_round, node, start, new: {k: 1e20 * v for k, v in new.items()})
    )
    assert [event["reason"] for event in told.of("round-skipped")] == [
        "no reply was left to judge; the model stays as it was"
    ] * ROUNDS


class Careless(ReplyFilter):
    """Divides by zero."""

    def judge(self, server_round, cohort):
        factors = torch.ones(len(cohort.clients))
        factors[-1] = math.nan
        return Verdict(factors, factors)


class Worse(Careless):
    def judge(self, server_round, cohort):
        verdict = super().judge(server_round, cohort)
        return Verdict(
            torch.ones(len(cohort.clients)), verdict.scores, replacement=torch.full((19,), math.nan)
        )


def test_a_verdict_that_is_not_finite_rejects():
    client = answering(lambda server_round, node, start, new: new)
    arrays, told = run(Careless(FedAvg(fraction_evaluate=0)), client, rounds=1)
    assert all(bool(torch.isfinite(value).all()) for value in arrays.values())
    assert [e["message"] for e in told.of("warning")] == [
        "round 1: Careless came to no finite number for 1 replies, which are rejected: n8"
    ]
    assert [name for name, kept in told.of("verdict")[0]["kept"].items() if not kept] == ["n8"]
    arrays, told = run(Worse(FedAvg(fraction_evaluate=0)), client, rounds=1)
    assert "rejected all 8 replies" in told.of("round-skipped")[0]["reason"]


class Halved(ReplyFilter):
    def judge(self, server_round, cohort):
        return Verdict(torch.full((len(cohort.clients),), 0.5), torch.ones(len(cohort.clients)))


def test_the_counters_of_a_model_are_scaled_and_rounded():
    """Models of stock Flower apps have integer buffers, which stay integers."""
    sent = {"w": torch.zeros(3), "batches": torch.tensor(7)}
    record = ArrayRecord({name: Array(value.numpy()) for name, value in sent.items()})
    defence = Halved(flower.FedAvg(fraction_evaluate=0, min_available_nodes=2, min_train_nodes=2))
    messages = list(defence.configure_train(1, record, ConfigRecord(), FakeGrid([1, 2], None)))
    new = {"w": torch.ones(3), "batches": torch.tensor(13)}
    replies = [reply_with(m, ArrayRecord({n: Array(v.numpy()) for n, v in new.items()})) for m in messages]
    arrays, _ = defence.aggregate_train(1, iter(replies))
    found = decode(arrays)
    assert found["w"].tolist() == [0.5] * 3
    assert found["batches"].item() == 10
    assert only_arrays(replies[0])["batches"].dtype == "int64"


# ------------------------------------------------------------------ order of tensors


@pytest.mark.parametrize("reads", [ADAPTER, GRADIENT])
@pytest.mark.parametrize("name", DEFENCES)
def test_the_order_of_a_replys_tensors_does_not_matter(name, reads, monkeypatch):
    monkeypatch.setattr(FedAvg, "reads", reads)
    sent = {"c": torch.zeros(4, 3), "a": torch.zeros(6), "b": torch.zeros(2, 3)}
    outcome = []
    for turned in (set(), {3, LAST}):

        def change(server_round, node, start, new, turned=turned):
            return dict(reversed(new.items())) if node in turned else new

        outcome.append(run(made(name), answering(change), encode(sent)))
    (plain, _), (other, _) = outcome
    for key, value in plain.items():
        assert value.abs().min() > 0
        assert torch.allclose(value, other[key], atol=1e-5), key
    first, second = ([v["kept"] for v in told.of("verdict")] for _, told in outcome)
    assert first == second


def test_a_flat_update_and_the_way_back_follow_what_was_sent():
    start = {"c": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]]), "b": torch.tensor([4.0])}
    new = {"a": torch.tensor([[30.0]]), "c": torch.tensor([10.0, 20.0])}
    assert flat_update(start, new).tolist() == [9.0, 18.0, 27.0]
    record = encode(new)
    set_update(record, start, torch.tensor([0.5, 0.25, 0.125]))
    found = {name: value.tolist() for name, value in decode(record).items()}
    assert found == {"a": [[3.125]], "c": [1.5, 2.25]}


# ----------------------------------------------------------------- what replies claim

START = {"w": torch.zeros(40)}


def claiming(claim, honest_claim=lambda node: 10):
    """All go the same way but for noise; the last one also a little elsewhere, and claims to have many examples."""

    def change(server_round, node, start, new):
        aside = 0.02 * normal("aside", shape=(40,)) if node == LAST else 0.0
        return {
            "w": start["w"]
            + 0.1 * normal("w", shape=(40,))
            + aside
            + 0.01 * normal(node, server_round, shape=(40,))
        }

    return answering(change, lambda node: claim if node == LAST else honest_claim(node))


@pytest.mark.parametrize("reads_key", ["num-examples", "num-targets"])
def test_a_claim_of_a_billion_examples_weighs_four_ordinary_ones(reads_key):
    """Norm bounding keeps all: the mean that is expected follows from the bound."""
    outcome = {}
    for claim in (40, 10**9):
        strategy = FedAvg(fraction_evaluate=0, weighted_by_key=reads_key)
        client = claiming(claim)

        def answer(message, node, client=client):
            reply = client(message, node)
            reply.content["metrics"]["num-targets"] = reply.content["metrics"]["num-examples"]
            return reply

        outcome[claim] = run(
            registry.load("defences", "norm-bound")(strategy), answer, encode(START), rounds=2
        )
    assert torch.equal(outcome[40][0]["w"], outcome[10**9][0]["w"])
    assert [v["weights"] for v in outcome[40][1].of("verdict")] == [{}, {}]
    assert [v["weights"] for v in outcome[10**9][1].of("verdict")] == [{f"n{LAST}": 40}] * 2
    claims = [e["num_examples"] for e in outcome[10**9][1].of("node-replied") if e["node"] == f"n{LAST}"]
    assert claims == [10**9] * 2


@pytest.mark.parametrize("rule", ["mean", "geometric-median", "median"])
def test_a_claim_of_a_billion_examples_does_not_own_a_round_of_vert(rule):
    def made_vert():
        return registry.load("defences", "vert")(FedAvg(fraction_evaluate=0), rule=rule)

    modest, _ = run(made_vert(), claiming(40), encode(START))
    boasting, told = run(made_vert(), claiming(10**9), encode(START))
    assert told.of("verdict")[0]["kept"][f"n{LAST}"]
    assert torch.equal(modest["w"], boasting["w"])


def test_the_published_form_weighs_all_alike():
    defence = registry.load("defences", "vert-paper")
    outcome = []
    for client in (claiming(10), claiming(10**9, lambda node: 3 * node)):
        paper = defence(FedAvg(fraction_evaluate=0), keep=len(NODES), size=16)
        outcome.append(run(paper, client, encode(START), rounds=3)[0]["w"])
    assert torch.allclose(*outcome, atol=1e-6)


@given(st.lists(st.integers(1, MAX_EXAMPLES), min_size=1, max_size=30))
def test_what_is_believed_is_bounded_and_honest_claims_are_left_alone(claims):
    believed = made("norm-bound").believed(claims)
    ordinary = sorted(claims)[(len(claims) - 1) // 2]
    assert all(0 < weight <= 4 * ordinary for weight in believed)
    assert all(
        weight == claim for claim, weight in zip(claims, believed, strict=True) if claim <= 4 * ordinary
    )


# ------------------------------------------------------------------- trusted updates


def useless(kind, good):
    """A trusted update that cannot be compared with anything in round 3."""

    def root(server_round, current):
        if server_round != 3:
            return good(server_round, current)
        if kind == "diverged":
            raise NonFiniteLossError("the loss is nan")
        return {name: value + (math.nan if kind == "nan" else 1e20) for name, value in current.items()}

    return root


@pytest.mark.parametrize("kind", ["nan", "huge", "diverged"])
@pytest.mark.parametrize("name", ["vert", "fltrust"])
def test_a_trusted_update_of_no_use_is_told_and_costs_one_round_at_most(name, kind):
    root = useless(kind, lambda server_round, current: honest(current, 0, server_round))
    defence = registry.load("defences", name)(FedAvg(fraction_evaluate=0), root=root)
    arrays, told = run(defence, answering(lambda server_round, node, start, new: new))
    (warning,) = told.of("warning")
    assert warning["message"].startswith(f"round 3: the trusted update ({name}.root-examples) is of no use")
    skipped = [(event["round"], event["reason"]) for event in told.of("round-skipped")]
    reason = "FLTrust has no trusted update in this round; the model stays as it was"
    assert skipped == ([(3, reason)] if name == "fltrust" else [])
    kept = {verdict["round"]: sum(verdict["kept"].values()) for verdict in told.of("verdict")}
    assert kept == {r: len(NODES) for r in range(1, ROUNDS + 1) if (r, reason) not in skipped}
    assert all(bool(torch.isfinite(value).all()) for value in arrays.values())
