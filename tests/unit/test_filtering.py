"""What every defence holds against, whatever its rule: replies that cannot be judged, and what replies claim."""

import math

import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.filtering import Cohort, ReplyFilter, Verdict
from fedllm.strategies.robust.strategy import FLTrust

from fedllm import registry
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.records import decode, encode
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
