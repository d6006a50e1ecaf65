"""The contract that every registered strategy keeps, and that every client update keeps."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from fedllm.strategies.hsplitlora.server_part import loss_of
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fedllm import registry
from fedllm.batches import count_steps
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.events import EventBus
from fedllm.models import load_bundle
from fedllm.records import ADAPTER, GRADIENT, HESSIAN_ROW, MEAN_GRADIENT, OWNED, check_reply, encode, spec_of
from fedllm.split.model import SplitModel
from fedllm.split.server import SplitServer
from fedllm.split.session import Session, Ticket
from fedllm.split.trainer import SplitTrainer
from fedllm.tasks import get_task
from fedllm.update import TrainJob
from tests.fakes import FakeGrid, drifting_client, initial_arrays

STRATEGIES = sorted(registry.available("strategies"))
CLIENTS = sorted(registry.available("clients"))
GRADIENT_CLIENTS = {
    name for name in CLIENTS if getattr(registry.load("clients", name), "sends", ADAPTER) == GRADIENT
}


WITH_MODEL = {name for name in STRATEGIES if getattr(registry.load("strategies", name), "needs_model", False)}
"""Strategies that train a part of the model themselves: they get a tiny one, and its adapter is what travels."""
PARAMETERS = {"hsplitlora": {"cuts": "1", "join-timeout": 5.0}}
BUILT = []


@pytest.fixture(autouse=True)
def _closed():
    yield
    while BUILT:
        BUILT.pop().close()


def model(name):
    config = registry.config_from_flat({"model.name": "tiny-random:bert", "lora.rank": 2, "strategy": name})
    return config, load_bundle(config, ("a", "b"))


def initial(name):
    return encode(model(name)[1].initial_state) if name in WITH_MODEL else initial_arrays()


def build(name):
    given = {"fraction_evaluate": float(name not in WITH_MODEL), "min_available_nodes": 3, "seed": 5}
    strategy = registry.build("strategies", name, PARAMETERS.get(name, {}), **given)
    if name in WITH_MODEL:
        strategy.prepare(*model(name), EventBus([]))
        BUILT.append(strategy)
    return strategy


def answer(message, client=drifting_client):
    """A client's reply with the further records that some methods want of it."""
    reply = client(message, message.metadata.dst_node_id)
    if owned := message.content["config"].get(OWNED):
        arrays = reply.content["arrays"]
        reply.content["arrays"] = ArrayRecord({name: arrays[name] for name in owned})
    for name in (HESSIAN_ROW, MEAN_GRADIENT):
        reply.content[name] = ArrayRecord(dict(reply.content["arrays"]))
    return reply


def one_round(strategy, grid, arrays, server_round):
    messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
    assert messages
    replies = [answer(message) for message in messages]
    for reply, message in zip(replies, messages, strict=True):
        spec = (
            strategy.reply_spec(message)
            if hasattr(strategy, "reply_spec")
            else spec_of(message.content["arrays"])
        )
        check_reply(reply, spec)
    new, metrics = strategy.aggregate_train(server_round, iter(replies))
    assert isinstance(new, ArrayRecord)
    assert isinstance(metrics, MetricRecord)
    asked = list(strategy.configure_evaluate(server_round, new, ConfigRecord(), grid))
    if strategy.fraction_evaluate == 0:
        assert not asked
        return new
    evaluated = strategy.aggregate_evaluate(
        server_round, iter([drifting_client(message, message.metadata.dst_node_id) for message in asked])
    )
    assert asked
    assert isinstance(evaluated, MetricRecord)
    return new


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_survives_a_checkpoint(name, tmp_path):
    """Two rounds, checkpoint, two more rounds: a fresh strategy with the stored state gives the same bits."""
    grid = FakeGrid([4, 9, 2, 7], drifting_client)
    first, arrays = build(name), initial(name)
    for server_round in (1, 2):
        arrays = one_round(first, grid, arrays, server_round)
    store = CheckpointStore(tmp_path, "contract")
    store.save(ServerState(2, arrays, first.state_dict(), {}))
    state, _ = store.latest()
    second, resumed = build(name), state.arrays
    second.load_state_dict(state.strategy)
    for server_round in (3, 4):
        arrays = one_round(first, grid, arrays, server_round)
        resumed = one_round(second, grid, resumed, server_round)
    for key, array in arrays.items():
        assert np.array_equal(array.numpy(), resumed[key].numpy()), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_keep_keys_shapes_and_are_finite(name):
    before = initial(name)
    arrays = one_round(build(name), FakeGrid([4, 9, 2], drifting_client), before, 1)
    assert {key: tuple(array.shape) for key, array in arrays.items()} == {
        key: tuple(array.shape) for key, array in before.items()
    }
    for array in arrays.values():
        assert array.dtype == "float32"
        assert np.isfinite(array.numpy()).all()


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - WITH_MODEL))
def test_the_model_moves_towards_the_clients(name):
    """All clients agree on a target: the next global model is nearer to it."""

    def towards(message, node):
        from fedllm.records import decode, encode
        from tests.fakes import reply_with

        sent = decode(message.content["arrays"])
        if getattr(strategy, "reads", ADAPTER) == GRADIENT:
            return reply_with(
                message, encode({key: value.new_full(value.shape, -1.0) for key, value in sent.items()})
            )
        return reply_with(message, encode({key: value + 1.0 for key, value in sent.items()}))

    strategy, grid, arrays = build(name), FakeGrid([4, 9, 2], towards), initial_arrays()
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    new, _ = strategy.aggregate_train(1, iter([answer(message, towards) for message in messages]))
    assert (new["bias"].numpy() > arrays["bias"].numpy()).all()

    def update(arrays, step=0.0):
        return (arrays["lora_B.weight"].numpy() + step) @ (arrays["lora_A.weight"].numpy() + step)

    # What the factors mean is their product: a strategy may write the same one with other factors.
    wanted = update(arrays, 1.0)
    assert np.linalg.norm(update(new) - wanted) < np.linalg.norm(update(arrays) - wanted)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_reply_changes_nothing(name):
    strategy, grid = build(name), FakeGrid([4, 9, 2], drifting_client)
    list(strategy.configure_train(1, initial(name), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, iter([])) == (None, None)


@pytest.mark.parametrize("name", STRATEGIES)
def test_summary_can_be_logged(name, caplog):
    with caplog.at_level("INFO"):
        build(name).summary()
    assert caplog.text


# --------------------------------------------------------------------- clients


def job(seed=1, **train):
    config = registry.config_from_flat({"model.name": "tiny-random:bert", "lora.rank": 2})
    bundle = load_bundle(config, ("a", "b"))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 50, (6,), generator=generator).tolist() for _ in range(20)]
    examples = Encoded.from_lists(tokens, [i % 2 for i in range(20)])
    bundle.load_adapter_state(bundle.initial_state)
    settings = TrainConfig(batch_size=4, learning_rate=1e-2, **train)
    return TrainJob(bundle, get_task(config.task), examples, settings, seed, 1, "0", bundle.adapter_state())


def run_client(name, task):
    """Run an update rule; a split one with a server that holds the head."""
    if name != "split":
        return registry.build("clients", name, {}).run(task)
    split = SplitModel(copy.deepcopy(task.bundle.model).get_base_model())
    session = Session([Ticket("0", "t", split.num_blocks)], join_timeout=20, step_timeout=20)
    optimizer = torch.optim.SGD(split.model.parameters(), lr=0.0)
    server = SplitServer("127.0.0.1:0")
    trainer = threading.Thread(target=SplitTrainer(split, session, optimizer, loss_of(task.task)).run)
    try:
        server.open(session)
        trainer.start()
        where = {"address": f"127.0.0.1:{server.port}", "token": "t"}
        return registry.build("clients", name, where).run(task)
    finally:
        session.close("test over")
        trainer.join()
        server.close()


@pytest.mark.parametrize("name", CLIENTS)
def test_client_returns_a_new_adapter_and_believable_numbers(name):
    task = job(local_epochs=2.0)
    result = run_client(name, task)
    assert set(result.arrays) == set(task.start)
    assert all(torch.isfinite(value).all() for value in result.arrays.values())
    assert any(not torch.equal(result.arrays[key], task.start[key]) for key in task.start)
    assert result.num_examples == len(task.examples)
    assert math.isfinite(result.loss)
    steps = count_steps(20, task.train) if name not in GRADIENT_CLIENTS else 0
    assert result.metrics["steps"] == steps


@pytest.mark.parametrize("name", CLIENTS)
def test_client_depends_on_its_seed_only(name):
    def run(seed):
        torch.manual_seed(seed)
        return run_client(name, job(seed, local_steps=3)).arrays

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    # The gradient over all examples leaves nothing to chance.
    assert all(torch.equal(first[key], other[key]) for key in first) == (name in GRADIENT_CLIENTS)
