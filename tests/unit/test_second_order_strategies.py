"""FAGH, SOFIM, momentum FedSGD and SCAFFOLD as Flower strategies, on clients with quadratic losses."""

import logging

import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.scaffold import Scaffold
from fedllm.strategies.second_order.fagh import FAGH, FAGHOpt
from fedllm.strategies.second_order.optimizer import flatten, unflatten
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.strategies import SOFIM, FedSGDM, SOFIMOpt, sofim_optimizer
from fedllm.strategies.second_order.updates import FaghPaper, FedSgdMomentum, Sofim
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm import registry
from fedllm.accumulate import Reply
from fedllm.checkpoint import CheckpointStore
from fedllm.errors import ConfigError, PlanError
from fedllm.events import EventBus
from fedllm.records import CORRECTION, HESSIAN_DIRECTION, HESSIAN_ROW, MEAN_GRADIENT, decode, encode
from fedllm.rounds import run_rounds
from tests.fakes import FakeGrid, Recorder

NODES = [3, 5, 8]
SIZE = 12
START = {"layer.weight": torch.ones(2, 4), "layer.bias": torch.full((4,), -1.0)}


def hessian(node):
    q = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(node))).Q
    values = torch.linspace(0.1, 1.0, SIZE)
    values[0] = 30.0
    return q @ torch.diag(values) @ q.T


def optimum(node):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100 + node))


def weight(node):
    return 10 * node


def loss_at(vector, node):
    away = vector - optimum(node)
    return float(away @ hessian(node) @ away) / 2


def flat_direction(message):
    sent = decode(message.content[HESSIAN_DIRECTION])
    full = {name: sent.get(name, torch.zeros_like(tensor)) for name, tensor in START.items()}
    return flatten(full, START)


def second_order_client(message, node):
    """What ``gradient-and-hessian-row`` answers, for ½ (w − w_i)ᵀ H_i (w − w_i)."""
    if message.metadata.message_type.startswith("evaluate"):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
    w = flatten(decode(message.content["arrays"]), START)
    content = {"arrays": encode(unflatten(hessian(node) @ (w - optimum(node)), START))}
    if HESSIAN_DIRECTION in message.content:
        content[HESSIAN_ROW] = encode(unflatten(hessian(node) @ flat_direction(message), START))
    content["metrics"] = MetricRecord({"num-examples": weight(node), "loss": loss_at(w, node)})
    return Message(RecordDict(content), reply_to=message)


def run(strategy, rounds, client=second_order_client, **kwargs):
    grid = FakeGrid(NODES, client, names={node: f"n{node}" for node in NODES})
    return run_rounds(strategy, grid, encode(START), rounds, **kwargs)


def pooled(count=3):
    total = sum(weight(node) for node in NODES[:count])
    h = sum(hessian(node).double() * weight(node) for node in NODES[:count]) / total
    linear = sum(hessian(n).double() @ optimum(n).double() * weight(n) for n in NODES[:count]) / total
    return h, linear


@pytest.mark.parametrize(
    ("strategy", "update"),
    [
        (lambda: FAGH(preset="paper", eta=0.05), lambda: FaghPaper(eta=0.05)),
        (
            lambda: FAGH(metric="identity", rho=40.0, direction_codec="fp32"),
            lambda: Fagh(metric="identity", rho=40.0),
        ),
        (lambda: FAGH(direction_codec="fp32"), Fagh),
        (lambda: FedSGDM(eta=0.03), lambda: FedSgdMomentum(eta=0.03)),
    ],
)
def test_a_federated_run_equals_the_update_on_the_pooled_loss(strategy, update):
    """Weighted by examples, the clients' gradients and products are those of all examples together."""
    final = flatten(decode(run(strategy(), 8).arrays), START)
    h, linear = pooled()
    w, alone = flatten(START, START), update()
    for _ in range(8):
        gradient = (h @ w.double() - linear).float()
        if isinstance(alone, FedSgdMomentum):
            w = w + alone.step(gradient)
            continue
        direction = alone.request()
        row = (
            None
            if direction is None
            else h[direction]
            if isinstance(direction, int)
            else h @ direction.double()
        )
        losses = {f"n{node}": (weight(node), loss_at(w, node)) for node in NODES}
        w = w + alone.step(gradient, None if row is None else row.float(), direction, losses)
    assert torch.allclose(final, w, atol=2e-3 * float((w - flatten(START, START)).norm()))


def test_fagh_reaches_the_optimum_and_tells_its_damping():
    result = run(
        FAGH(metric="identity", rho=1.0, beta1=0.0, secants=False), 40
    )  # of curvature only the products tell
    h, linear = pooled()
    best = torch.linalg.solve(h, linear).float()
    assert float((flatten(decode(result.arrays), START) - best).norm()) < 1e-2
    assert result.train_metrics_clientapp[40]["server-rho"] > 0
    assert "server-eigenvalue" in result.train_metrics_clientapp[40]


@pytest.mark.parametrize(
    ("strategy", "update", "direction"),
    [
        (lambda: SOFIM(eta=0.05), lambda: Sofim(eta=0.05), "momentum"),
        (
            lambda: SOFIM(eta=0.05, direction="gradient"),
            lambda: Sofim(eta=0.05, direction="gradient"),
            "gradient",
        ),
        (lambda: FedSGDM(eta=0.03), lambda: FedSgdMomentum(eta=0.03), "momentum"),
    ],
)
def test_gradient_methods_tell_how_long_their_momentum_is(strategy, update, direction):
    """Of the mean of the gradients by the weights (1 − β) β^(t−i), corrected where the step is along it."""
    told = run(strategy(), 4).train_metrics_clientapp
    h, linear = pooled()
    w, alone, gradients = flatten(START, START), update(), []
    for count in range(1, 5):
        gradients.append(h @ w.double() - linear)
        weights = [0.1 * 0.9 ** (count - 1 - i) for i in range(count)]
        mean = sum(weight * g for weight, g in zip(weights, gradients, strict=True))
        corrected = mean / (1 - 0.9**count) if direction == "momentum" else mean
        assert told[count]["server-momentum-norm"] == pytest.approx(float(corrected.norm()), rel=1e-4)
        w = w + alone.step(gradients[-1].float())


def test_int8_directions_are_what_the_server_reckons_with():
    """The product belongs to the decoded direction; taken for the exact one, the model of curvature would be wrong."""
    exact = run(FAGH(metric="identity", rho=1.0, beta1=0.0, secants=False, direction_codec="fp32"), 40)
    coarse = run(FAGH(metric="identity", rho=1.0, beta1=0.0, secants=False), 40)
    h, linear = pooled()
    best = torch.linalg.solve(h, linear).float()
    for result in (exact, coarse):
        assert float((flatten(decode(result.arrays), START) - best).norm()) < 5e-2


def test_paper_preset_asks_for_the_first_row_and_sends_one_small_tensor():
    strategy, seen = FAGH(preset="paper"), []

    def client(message, node):
        if HESSIAN_DIRECTION in message.content:
            seen.append(decode(message.content[HESSIAN_DIRECTION]))
        return second_order_client(message, node)

    run(strategy, 1, client)
    assert list(seen[0]) == ["layer.weight"]
    assert seen[0]["layer.weight"].reshape(-1).tolist() == [1.0] + [0.0] * 7


def test_a_client_without_a_row_counts_for_the_gradient_and_is_named(caplog):
    def lazy(message, node):
        reply = second_order_client(message, node)
        if node == 5 and HESSIAN_ROW in reply.content:
            del reply.content[HESSIAN_ROW]
        return reply

    strategy = FAGH(preset="paper", eta=0.01)
    with caplog.at_level(logging.WARNING):
        result = run(strategy, 1, lazy)
    assert "no Hessian product from n5" in caplog.text
    h, linear = pooled()
    gradient = h @ flatten(START, START).double() - linear
    row = (hessian(3)[0] * 30 + hessian(8)[0] * 80) / 110
    alone = FaghPaper(eta=0.01)
    expected = flatten(START, START) + alone.step(gradient.float(), row)
    assert torch.allclose(flatten(decode(result.arrays), START), expected, atol=1e-6)


@pytest.mark.parametrize("broken", ["nan", "shape", "missing"])
def test_a_bad_row_drops_the_reply_of_that_node_only(broken):
    def client(message, node):
        reply = second_order_client(message, node)
        if node == 5 and HESSIAN_ROW in reply.content:
            row = {name: tensor.clone() for name, tensor in decode(reply.content[HESSIAN_ROW]).items()}
            if broken == "nan":
                row["layer.bias"][1] = float("nan")
            elif broken == "shape":
                row["layer.bias"] = torch.zeros(3)
            else:
                del row["layer.bias"]
            reply.content[HESSIAN_ROW] = encode(row)
        return reply

    events = []

    class Sink:
        def emit(self, event):
            events.append(event)

        def close(self):
            pass

    result = run(FAGH(preset="paper", eta=0.01), 1, client, events=EventBus([Sink()]))
    dropped = [event for event in events if event["event"] == "node-dropped"]
    assert [event["node"] for event in dropped] == ["n5"]
    assert "hessian-row" in dropped[0]["reason"]
    assert "layer.bias" in dropped[0]["reason"]
    assert torch.isfinite(flatten(decode(result.arrays), START)).all()


@pytest.mark.parametrize(
    "build", [FAGH, lambda: FAGH(preset="paper", eta=0.02), SOFIM, lambda: FedSGDM(eta=0.02)]
)
def test_a_resumed_run_ends_with_the_same_bits(build, tmp_path):
    whole = run(build(), 7)
    store = CheckpointStore(tmp_path, "x")
    run(build(), 3, checkpoints=store)
    resumed = run(build(), 7, checkpoints=store, resume=True)
    assert torch.equal(flatten(decode(whole.arrays), START), flatten(decode(resumed.arrays), START))


def test_replies_are_weighted_by_targets_where_they_have_them():
    def client(message, node):
        reply = second_order_client(message, node)
        reply.content["metrics"]["num-targets"] = weight(node)
        reply.content["metrics"]["num-examples"] = 1
        return reply

    one = run(FedSGDM(), 3)
    other = run(FedSGDM(), 3, client)
    assert torch.equal(flatten(decode(one.arrays), START), flatten(decode(other.arrays), START))


def test_integer_arrays_are_refused_with_their_name():
    record = ArrayRecord(dict(encode(START)) | {"bn.num_batches_tracked": encode_integers()})
    with pytest.raises(PlanError, match=r"bn\.num_batches_tracked.*int64"):
        list(SOFIM().configure_train(1, record, ConfigRecord(), FakeGrid(NODES, second_order_client)))


def encode_integers():
    import numpy as np
    from flwr.app import Array

    return Array(np.zeros(1, dtype=np.int64))


def test_what_the_paper_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"fagh\.memory"):
        FAGH(preset="paper", memory=3)


# ------------------------------------------------------- pseudo-gradients


def local_client(message, node):
    """Five steps of gradient descent from what was sent; returns parameters."""
    if message.metadata.message_type.startswith("evaluate"):
        return second_order_client(message, node)
    w = flatten(decode(message.content["arrays"]), START)
    metrics = MetricRecord({"num-examples": weight(node), "loss": 1.0})
    arrays = encode(unflatten(local_steps(w, node), START))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def local_steps(w, node):
    for _ in range(5):
        w = w - 0.01 * hessian(node) @ (w - optimum(node))
    return w


def test_sofim_wraps_an_averaging_strategy():
    """The distance to the mean of the clients' parameters, over learning rate times steps, is what SOFIM is given."""
    alone, w = Sofim(eta=0.5, rho=0.5), flatten(START, START)
    for _ in range(4):
        mean = sum(weight(node) * local_steps(w, node) for node in NODES) / sum(map(weight, NODES))
        w = w + alone.step((w - mean) / 0.05)
    wrapped = run(FedAvg(server_optimizer=sofim_optimizer(0.5, 0.5, local_scale=0.05)), 4, local_client)
    own = run(SOFIMOpt(eta=0.5, rho=0.5, local_scale=0.05), 4, local_client)
    plain = flatten(decode(run(FedAvg(), 4, local_client).arrays), START)
    for result in (wrapped, own):
        assert result.train_metrics_clientapp[4]["server-momentum-norm"] == pytest.approx(
            alone.diagnostics["momentum-norm"], rel=1e-3
        )
        assert torch.allclose(flatten(decode(result.arrays), START), w, atol=1e-4)
    assert not torch.allclose(plain, w, atol=1e-2)


def test_hybrid_takes_faghs_steps_on_pseudo_gradients():
    def hybrid(message, node):
        reply = local_client(message, node)
        if HESSIAN_DIRECTION in message.content:
            reply.content[HESSIAN_ROW] = encode(unflatten(hessian(node) @ flat_direction(message), START))
        return reply

    def as_gradient(message, node):
        """The same clients, with the division by η_l τ done by themselves."""
        reply = hybrid(message, node)
        if "arrays" in reply.content:
            sent, got = decode(message.content["arrays"]), decode(reply.content["arrays"])
            reply.content["arrays"] = encode({k: (sent[k].double() - got[k]) / 0.05 for k in got})
        return reply

    keywords = {"metric": "identity", "rho": 5.0, "secants": False}
    one = run(FAGHOpt(local_scale=0.05, **keywords), 8, hybrid)
    other = run(FAGH(**keywords), 8, as_gradient)
    blind = run(FAGHOpt(local_scale=0.05, **keywords), 8, local_client)
    one, other, blind = (flatten(decode(result.arrays), START) for result in (one, other, blind))
    assert torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, blind, atol=1e-2)  # the products count


@pytest.mark.parametrize(
    ("keywords", "train", "scale", "warned"),
    [
        ({}, {"train.learning-rate": 0.02, "train.local-steps": 5}, 0.1, False),
        ({"local_scale": 3.0}, {"train.learning-rate": 0.02, "train.local-steps": 5}, 3.0, False),
        ({}, {"train.learning-rate": 0.02}, 1.0, True),
    ],
)
def test_the_hybrid_scales_moves_by_what_the_configuration_says(keywords, train, scale, warned):
    events, strategy = Recorder(), FAGHOpt(**keywords)
    strategy.prepare(registry.config_from_flat({"strategy": "fagh-opt", **train}), None, EventBus([events]))
    assert strategy._optimizer.pseudo == pytest.approx(scale)
    assert ["fagh-opt.local-scale" in event["message"] for event in events.of("warning")] == [True] * warned


# ---------------------------------------------------------------- SCAFFOLD


def scaffold_client(message, node, steps=4, rate=0.01):
    if message.metadata.message_type.startswith("evaluate"):
        return second_order_client(message, node)
    w = flatten(decode(message.content["arrays"]), START)
    correction = message.content.get(CORRECTION)
    shift = torch.zeros(SIZE) if correction is None else flatten(decode(correction), START)
    total = torch.zeros(SIZE)
    for _ in range(steps):
        gradient = hessian(node) @ (w - optimum(node))
        total += gradient
        w = w - rate * (gradient + shift)
    content = {
        "arrays": encode(unflatten(w, START)),
        MEAN_GRADIENT: encode(unflatten(total / steps, START)),
        "metrics": MetricRecord({"num-examples": weight(node), "loss": loss_at(w, node)}),
    }
    return Message(RecordDict(content), reply_to=message)


def test_scaffold_equals_algorithm_1_with_option_ii():
    """All clients, K = 4 steps: c_i⁺ = c_i − c + (x − y_i)/(K η_l), written out as in the paper."""
    x, c, steps, rate = flatten(START, START).double(), torch.zeros(SIZE).double(), 4, 0.01
    controls = {node: torch.zeros(SIZE).double() for node in NODES}
    for _ in range(6):
        moves, changes = [], []
        for node in NODES:
            y = x.clone()
            for _ in range(steps):
                y = y - rate * (hessian(node).double() @ (y - optimum(node).double()) - controls[node] + c)
            new = controls[node] - c + (x - y) / (steps * rate)
            moves.append(y - x)
            changes.append(new - controls[node])
            controls[node] = new
        x = x + sum(moves) / len(NODES)
        c = c + sum(changes) / len(NODES)
    found = flatten(decode(run(Scaffold(), 6, scaffold_client).arrays), START)
    assert torch.allclose(found.double(), x, atol=1e-5)


def test_scaffold_resumes_with_the_same_bits(tmp_path):
    store = CheckpointStore(tmp_path, "x")
    run(Scaffold(), 2, scaffold_client, checkpoints=store)
    resumed = run(Scaffold(), 5, scaffold_client, checkpoints=store, resume=True)
    whole = run(Scaffold(), 5, scaffold_client)
    assert torch.equal(flatten(decode(whole.arrays), START), flatten(decode(resumed.arrays), START))


def test_scaffold_refuses_a_reply_without_its_control():
    strategy = Scaffold()
    grid = FakeGrid(NODES, local_client)
    message = next(iter(strategy.configure_train(1, encode(START), ConfigRecord(), grid)))
    from fedllm.errors import ReplyError

    with pytest.raises(ReplyError, match="scaffold-sgd"):
        strategy.check_train_reply(local_client(message, 3), message)


def test_reply_weight_is_kept_without_targets():
    strategy = SOFIM()
    grid = FakeGrid(NODES, second_order_client)
    message = next(iter(strategy.configure_train(1, encode(START), ConfigRecord(), grid)))
    reply = strategy.open_reply(second_order_client(message, 3))
    assert isinstance(reply, Reply)
    assert reply.weight == 30
