"""The contract that every registered strategy keeps, and that every client update keeps."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fedllm import registry
from fedllm.batches import count_steps
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.models import load_bundle
from fedllm.records import check_reply, spec_of
from fedllm.tasks import get_task
from fedllm.update import TrainJob
from tests.fakes import FakeGrid, drifting_client, initial_arrays

STRATEGIES = sorted(registry.available("strategies"))
CLIENTS = sorted(registry.available("clients"))


def build(name):
    return registry.build("strategies", name, {}, fraction_evaluate=1.0, min_available_nodes=3, seed=5)


def one_round(strategy, grid, arrays, server_round):
    messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
    assert messages
    replies = [drifting_client(message, message.metadata.dst_node_id) for message in messages]
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
    first, arrays = build(name), initial_arrays()
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
    arrays = one_round(build(name), FakeGrid([4, 9, 2], drifting_client), initial_arrays(), 1)
    assert {key: tuple(array.shape) for key, array in arrays.items()} == {
        key: tuple(array.shape) for key, array in initial_arrays().items()
    }
    for array in arrays.values():
        assert array.dtype == "float32"
        assert np.isfinite(array.numpy()).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_moves_towards_the_clients(name):
    """All clients agree on a target: the next global model is nearer to it."""

    def towards(message, node):
        from fedllm.records import decode, encode
        from tests.fakes import reply_with

        arrays = {key: value + 1.0 for key, value in decode(message.content["arrays"]).items()}
        return reply_with(message, encode(arrays))

    strategy, grid, arrays = build(name), FakeGrid([4, 9, 2], towards), initial_arrays()
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    new, _ = strategy.aggregate_train(1, iter([towards(message, 0) for message in messages]))
    for key, array in arrays.items():
        assert (new[key].numpy() > array.numpy()).all(), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_reply_changes_nothing(name):
    strategy, grid = build(name), FakeGrid([4, 9, 2], drifting_client)
    list(strategy.configure_train(1, initial_arrays(), ConfigRecord(), grid))
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


@pytest.mark.parametrize("name", CLIENTS)
def test_client_returns_a_new_adapter_and_believable_numbers(name):
    task = job(local_epochs=2.0)
    result = registry.build("clients", name, {}).run(task)
    assert set(result.arrays) == set(task.start)
    assert all(torch.isfinite(value).all() for value in result.arrays.values())
    assert any(not torch.equal(result.arrays[key], task.start[key]) for key in task.start)
    assert result.num_examples == len(task.examples)
    assert math.isfinite(result.loss)
    assert result.metrics["steps"] == count_steps(20, task.train)


@pytest.mark.parametrize("name", CLIENTS)
def test_client_depends_on_its_seed_only(name):
    def run(seed):
        torch.manual_seed(seed)
        return registry.build("clients", name, {}).run(job(seed, local_steps=3)).arrays

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
