"""A step after which losses are not finite: taken back where that is possible, and named everywhere."""

import logging

import pytest
import torch
from fedllm.strategies.second_order.fagh import FAGH, FAGHOpt
from fedllm.strategies.second_order.optimizer import flatten, unflatten
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.strategies import FedSGDM
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.checkpoint import CheckpointStore
from fedllm.curvature import gradient_and_hvp
from fedllm.errors import NonFiniteLossError, RoundError
from fedllm.events import EventBus
from fedllm.records import LOSS_NOT_FINITE, decode, encode
from tests.fakes import Recorder
from tests.unit.test_second_order_strategies import NODES, START, loss_at, pooled, run, second_order_client


def told(message, node):
    """What a client answers whose loss is not finite."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in START.items()}
    metrics = MetricRecord({"num-examples": 10 * node, LOSS_NOT_FINITE: 1})
    return Message(RecordDict({"arrays": encode(zeros), "metrics": metrics}), reply_to=message)


def fragile(broken=tuple(NODES), bound=50.0):
    """Clients whose loss overflows farther than ``bound`` from the origin."""

    def client(message, node):
        if message.metadata.message_type.startswith("train") and node in broken:
            w = flatten(decode(message.content["arrays"]), START)
            if not float(w.norm()) < bound:
                return told(message, node)
        return second_order_client(message, node)

    return client


def recorded(strategy, rounds, client, **kwargs):
    recorder = Recorder()
    with EventBus([recorder]) as events:
        strategy.prepare(None, None, events)
        return run(strategy, rounds, client, events=events, **kwargs), recorder


def mean_loss(arrays):
    w = flatten(decode(arrays), START)
    return sum(10 * node * loss_at(w, node) for node in NODES) / (10 * sum(NODES))


def build():
    return FAGH(metric="identity", rho=1e-9, beta1=0.0, direction_codec="fp32")


@pytest.mark.parametrize("broken", [(3, 5, 8), (5,)])
def test_a_step_to_a_loss_that_is_not_finite_is_taken_back(broken):
    """The first steps are about 1e10 long: beside them the parameters are lost, so only the kept origin helps."""
    result, recorder = recorded(build(), 30, fragile(broken))
    h, linear = pooled()
    best = mean_loss(encode(unflatten(torch.linalg.solve(h, linear).float(), START)))
    assert mean_loss(result.arrays) - best < 1e-2 * (mean_loss(encode(START)) - best)
    taken = recorder.of("step-taken-back")
    assert taken[0]["round"] == 2
    assert "inf" in taken[0]["reason"]
    for name in (f"n{node}" for node in NODES):
        assert (name in taken[0]["reason"]) == (name in {f"n{node}" for node in broken})
    assert not recorder.of("round-skipped")


def test_after_the_step_is_taken_back_a_shorter_one_goes_from_where_it_began():
    strategy = build()
    result, _ = recorded(strategy, 2, fragile())
    h, linear = pooled()
    gradient = h @ flatten(START, START).double() - linear
    expected = flatten(START, START).double() - gradient / 2e-9
    found = flatten(decode(result.arrays), START).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert result.train_metrics_clientapp[2]["server-rho"] == pytest.approx(2e-9)
    assert result.train_metrics_clientapp[2][LOSS_NOT_FINITE] == 1


@pytest.mark.parametrize("cut", [1, 2, 4, 9, 12])
def test_a_run_resumed_amid_the_recovery_ends_with_the_same_bits(cut, tmp_path):
    whole = run(build(), 14, fragile())
    store = CheckpointStore(tmp_path, "x")
    run(build(), cut, fragile(), checkpoints=store)
    resumed = run(build(), 14, fragile(), checkpoints=store, resume=True)
    assert torch.equal(flatten(decode(whole.arrays), START), flatten(decode(resumed.arrays), START))
    assert mean_loss(resumed.arrays) < mean_loss(encode(START))


def test_pseudo_gradients_recover_too():
    def client(message, node):
        reply = fragile()(message, node)
        sent = decode(message.content["arrays"]) if "arrays" in message.content else {}
        if "arrays" in reply.content:
            moves = decode(reply.content["arrays"])
            reply.content["arrays"] = encode({name: sent[name] - 0.01 * moves[name] for name in moves})
        return reply

    strategy = FAGHOpt(local_scale=0.01, metric="identity", rho=1e-4, beta1=0.0, direction_codec="fp32")
    result, recorder = recorded(strategy, 25, client)
    assert recorder.of("step-taken-back")
    assert mean_loss(result.arrays) < 0.5 * mean_loss(encode(START))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: FAGH(preset="paper", eta=1e5),
        lambda: FAGH(damping="fixed", metric="identity", rho=1e-6),
        lambda: FedSGDM(eta=1e5),
    ],
)
def test_where_nothing_can_be_taken_back_the_run_stops_with_the_reason(strategy):
    with pytest.raises(RoundError, match="loss at the model that was sent is not finite"):
        run(strategy(), 3, fragile())


def test_a_client_that_never_had_a_finite_loss_is_left_out(caplog):
    def client(message, node):
        training = message.metadata.message_type.startswith("train")
        return told(message, node) if training and node == 5 else second_order_client(message, node)

    with caplog.at_level(logging.WARNING):
        result, recorder = recorded(FAGH(metric="identity", rho=40.0, beta1=0.0), 12, client)
    (dropped,) = recorder.of("node-dropped")
    assert dropped["node"] == "n5"
    assert "not finite" in dropped["reason"]
    assert not recorder.of("step-taken-back")
    assert "not finite at n5; the last step stands" in caplog.text
    assert mean_loss(result.arrays) < mean_loss(encode(START))


def test_a_client_that_stays_broken_stops_the_run_by_name():
    after = []

    def client(message, node):
        if message.metadata.message_type.startswith("train") and node == 8:
            after.append(message)
            if len(after) > 3:
                return told(message, node)
        return second_order_client(message, node)

    with pytest.raises(RoundError, match=r"10 steps in a row.*n8"):
        run(FAGH(metric="identity", rho=40.0), 40, client)
    assert len(after) == 3 + 10


def test_without_gradient_and_without_a_step_there_is_nothing_to_do():
    with pytest.raises(ValueError, match="no step to take back"):
        Fagh().step(None, losses={"a": (1.0, float("inf"))})


def test_a_finite_loss_with_an_infinite_gradient_is_of_no_use_either():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(NonFiniteLossError, match="gradient of 'x'"):
        gradient_and_hvp(lambda batch: x.sqrt().sum(), {"x": x}, [(None, 1.0)])
