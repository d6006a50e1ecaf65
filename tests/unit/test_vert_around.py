"""VERT around mixed ranks, gradients and split clients, most of them hostile: whole runs with real clients."""

import pytest
import torch
from fedllm.strategies.vert.strategy import VERT
from flwr.app import ConfigRecord

from fedllm import client, server
from fedllm.events import EventBus, read_events
from fedllm.lora.pairs import pair_names
from fedllm.records import decode, encode
from tests.fakes import FakeGrid, reply_with
from tests.unit.test_fedpipe import flat as fedpipe_flat  # noqa: F401
from tests.unit.test_fedpipe import run as run_fedpipe
from tests.unit.test_hsplitlora import deep_model, perturbed, prepared  # noqa: F401  # the fixture is used by name
from tests.unit.test_server import ClientGrid, write_rows
from tests.unit.test_vert import Told, normal

NODES = {31: 0, 8: 1, 55: 2, 12: 3, 77: 4, 40: 5}
ONSET, ROUNDS = 4, 6


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_ID", "01")
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)
    return {
        "model.name": "tiny-random:bert",
        "lora.rank": 8,
        "data.source": str(write_rows(tmp_path / "train.csv", 0, 240)),
        "data.test-fraction": 0.1,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.learning-rate": 1e-2,
        "train.batch-size": 16,
        "train.local-steps": 6,
        "rounds": ROUNDS,
        "seed": 1,
        "defence": "vert",
        "attack": "sign-flip",
        "attack-from-round": ONSET,
        "server.min-nodes": len(NODES),
        "server.node-timeout": 5.0,
        "run.root": str(tmp_path / "runs"),
        "run.name": "r",
    }


def events(tmp_path, kind):
    return [e for e in read_events(tmp_path / "runs/r/events.jsonl") if e["event"] == kind]


def check(tmp_path, hostile_count):
    """Nobody is rejected before the attack, all attackers and hardly an honest client from then on."""
    verdicts = {v["round"]: {n for n, kept in v["kept"].items() if kept} for v in events(tmp_path, "verdict")}
    assert set(verdicts) == set(range(1, ROUNDS + 1))
    scores = [v["scores"] for v in events(tmp_path, "verdict") if v["round"] >= ONSET]
    hostile = set(sorted(scores[0], key=scores[0].__getitem__)[:hostile_count])
    for server_round in range(1, ONSET):
        assert len(verdicts[server_round]) == len(NODES), server_round
    for server_round in range(ONSET, ROUNDS + 1):
        assert not verdicts[server_round] & hostile, server_round
        assert len(verdicts[server_round]) >= len(NODES) - hostile_count - 1, server_round
    # Those whose sign is turned agree with nothing that was expected of them.
    assert all(of_round[name] < 0 for of_round in scores for name in hostile)
    assert not events(tmp_path, "node-dropped")


@pytest.mark.parametrize("strategy", ["fedavg", "fagh"])
def test_around_plain_strategies_with_a_majority(flat, tmp_path, strategy):
    flat |= {"strategy": strategy, "attack-fraction": 0.67}
    flat |= {"client": "gradient-and-hessian-row"} if strategy == "fagh" else {"lora.client-ranks": "2,4,8"}
    server.run(ClientGrid(flat, nodes=NODES), flat)
    check(tmp_path, 4)


def test_around_the_merging_of_split_clients_with_unequal_cuts_and_ranks(deep_model):  # noqa: F811
    """Three of four turn in round 3; what is merged then is the honest client's part alone."""
    strategy, bundle = prepared(deep_model, cuts="2,3", client_ranks=(4, 8))
    guarded = VERT(strategy)
    guarded.nodes = strategy.nodes
    told = Told()
    guarded._events = EventBus([told])
    arrays = encode(perturbed(bundle.initial_state, 1))
    try:
        for server_round in (1, 2, 3, 4):
            messages = guarded.configure_train(server_round, arrays, ConfigRecord(), FakeGrid([], None))
            replies = [split_reply(message, server_round) for message in messages]
            arrays, _ = guarded.aggregate_train(server_round, iter(replies))
    finally:
        strategy.close()
    kept = [{name for name, is_kept in v["kept"].items() if is_kept} for v in told.of("verdict")]
    assert kept == [{"0", "1", "2", "3"}] * 2 + [{"0"}] * 2
    assert strategy._examples == {"0": 10}


def split_reply(message, server_round):
    """Moves every product that the client owns in a common direction, with noise; three clients turn around."""
    node = message.metadata.dst_node_id
    sent = decode(message.content["arrays"])
    new = {name: sent[name] for name in message.content["config"]["owned"]}
    turned = node > 10 and server_round > 2
    return reply_with(message, encode(moved(new, turned, node, server_round)))


def moved(adapter, turned, *key):
    """The adapter after a step of every product in a direction of its own name, with noise of the key."""
    new = dict(adapter)
    for module, pair in pair_names(new).modules.items():
        a, b = new[pair.lora_A], new[pair.lora_B]
        shape = (b.shape[0], a.shape[1])
        wanted = normal(module, shape=shape) + 0.5 * normal(module, *key, shape=shape)
        new[pair.lora_B] = b + (-0.1 if turned else 0.1) * wanted @ torch.linalg.pinv(a)
    return new


def test_around_fedpipes_plans_of_unequal_ranks_and_weights(fedpipe_flat, tmp_path):  # noqa: F811
    """Two of three turn in round 5, each with an adapter of another form; what they send is made up."""

    def change(message, name, reply):
        if message.metadata.message_type == "train" and not reply.has_error():
            server_round = int(message.content["config"]["server-round"])
            forms.setdefault(server_round, set()).add(
                tuple(sorted((n, array.shape) for n, array in message.content["arrays"].items()))
            )
            turned = name != "1" and server_round > 4
            step = moved(decode(message.content["arrays"]), turned, name, server_round)
            reply.content["arrays"] = encode(step)
        return reply

    forms = {}
    run_fedpipe(fedpipe_flat, change=change, rounds=6, defence="vert", vert__warm_up=3)
    assert len(forms[6]) > 1
    kept = [{n for n, is_kept in v["kept"].items() if is_kept} for v in events(tmp_path, "verdict")]
    assert kept == [{"0", "1", "2"}] * 4 + [{"1"}] * 2
