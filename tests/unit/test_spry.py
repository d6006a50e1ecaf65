"""Spry: who owns what, what comes up, what becomes of it."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedllm.strategies.fedopt import FedYogi
from fedllm.strategies.spry import Spry
from fedllm.strategies.spry.dealing import Units, deal
from fedllm.strategies.spry.merging import OwnersMean, UnitSgd, UnitYogi
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm import registry
from fedllm.accumulate import Reply
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.errors import ConfigError, PlanError, ReplyError
from fedllm.records import check_reply, decode, encode, wire_bytes
from fedllm.seeding import derive_seed
from fedllm.tangents import from_scalars
from tests.fakes import FakeGrid, reply_with
from tests.unit.test_strategy_contract import job

PAIRS = 6
NAMES = [f"m.layer.{i}.q.lora_{f}.weight" for i in range(PAIRS) for f in "AB"] + ["m.head.weight"]


def adapter(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator) for name in NAMES}


def train_config(client="backprop", **parameters):
    return ConfigRecord(
        {
            "client": client,
            "client-parameters": json.dumps(parameters),
            "seed": 7,
            "upload-codec": "fp32",
        }
    )


def owned_of(message):
    return list(message.content["config"]["owned"])


def messages_of(strategy, nodes, arrays=None, server_round=1, config=None):
    grid = FakeGrid(nodes, lambda message, node: message)
    arrays = encode(adapter() if arrays is None else arrays)
    return list(strategy.configure_train(server_round, arrays, config or train_config(), grid))


def answer(message, change, num_examples=10.0):
    """A client's reply: what it owns, changed."""
    sent = decode(message.content["arrays"])
    return reply_with(
        message, encode({name: change(name, sent[name]) for name in owned_of(message)}), num_examples
    )


# ------------------------------------------------------------------ dealing


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    units=st.integers(1, 60),
    clients=st.integers(1, 80),
    server_round=st.integers(1, 1000),
    how=st.sampled_from(["contiguous", "cyclic"]),
)
def test_every_unit_is_owned_and_shares_are_even(units, clients, server_round, how):
    hands = deal(units, clients, server_round, how)
    assert len(hands) == clients
    owners = Counter(index for hand in hands for index in hand)
    assert set(owners) == set(range(units))
    assert max(owners.values()) - min(owners.values()) <= 1
    sizes = {len(hand) for hand in hands}
    assert max(sizes) - min(sizes) <= 1
    assert 0 not in sizes
    assert all(hand == sorted(set(hand)) for hand in hands)
    if clients <= units:
        assert set(owners.values()) == {1}
    if how == "contiguous":
        assert all(hand == list(range(hand[0], hand[-1] + 1)) for hand in hands)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    units=st.integers(1, 30),
    clients=st.integers(2, 40),
    failing=st.integers(0, 39),
    start=st.integers(1, 50),
    how=st.sampled_from(["contiguous", "cyclic"]),
)
def test_a_unit_whose_owner_fails_is_owned_by_another_in_the_next_round(units, clients, failing, start, how):
    failing %= clients

    def living(server_round):
        hands = deal(units, clients, server_round, how)
        return {index for client, hand in enumerate(hands) if client != failing for index in hand}

    assert living(start) | living(start + 1) == set(range(units))


def test_cyclic_deals_every_mth_unit_and_all_deals_everything():
    assert deal(7, 3, 3, "cyclic") == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal(7, 3, 3, "contiguous") == [[0, 1], [2, 3], [4, 5, 6]]
    assert deal(2, 3, 2, "cyclic") == [[0], [1], [0]]
    assert deal(3, 2, 9, "all") == [[0, 1, 2], [0, 1, 2]]


def test_a_unit_is_the_pair_of_one_module_and_the_rest_is_shared():
    units = Units.of(
        ["a.q.lora_A.weight", "a.q.lora_B.weight", "a.v.lora_A.weight", "a.v.lora_B.weight", "head.bias"]
    )
    assert units.dealt == (
        ("a.q.lora_A.weight", "a.q.lora_B.weight"),
        ("a.v.lora_A.weight", "a.v.lora_B.weight"),
    )
    assert units.names([1]) == ("a.v.lora_A.weight", "a.v.lora_B.weight", "head.bias")


# ----------------------------------------------------------------- messages


@pytest.mark.parametrize("clients", [1, 4, 6, 9])
@pytest.mark.parametrize("dealing", ["contiguous", "cyclic", "all"])
def test_messages_carry_the_whole_adapter_and_every_tensor_has_an_owner(clients, dealing):
    messages = messages_of(Spry(dealing=dealing), range(1, clients + 1))
    assert all(list(message.content["arrays"]) == NAMES for message in messages)
    assert all("m.head.weight" in owned_of(message) for message in messages)
    assert {name for message in messages for name in owned_of(message)} == set(NAMES)


def test_a_reply_with_a_unit_that_it_was_not_dealt_is_refused():
    strategy = Spry()
    first, second = messages_of(strategy, [1, 2])
    good = answer(first, lambda name, value: value)
    check_reply(good, strategy.reply_spec(first))
    foreign = sorted(set(owned_of(second)) - set(owned_of(first)))[0]
    arrays = {**decode(good.content["arrays"]), foreign: torch.zeros(3, 2)}
    with pytest.raises(ReplyError, match=f"1 arrays were not asked for, the first is '{foreign}'"):
        check_reply(reply_with(first, encode(arrays)), strategy.reply_spec(first))
    arrays.pop(foreign), arrays.pop("m.head.weight")
    with pytest.raises(ReplyError, match=r"1 arrays are missing, the first is 'm\.head\.weight'"):
        check_reply(reply_with(first, encode(arrays)), strategy.reply_spec(first))


def test_more_clients_than_units_is_told_once(caplog):
    strategy = Spry()
    with caplog.at_level("INFO"):
        messages_of(strategy, range(1, 21))
        messages_of(strategy, range(1, 21), server_round=2)
    told = [record.message for record in caplog.records if "share" in record.message]
    assert told == ["spry: 20 clients share 6 units: each unit has 3 to 4 owners, whose replies are averaged"]


def test_an_adapter_without_low_rank_factors_is_refused():
    with pytest.raises(PlanError, match="pairs of low-rank factors"):
        messages_of(Spry(), [1], arrays={"head.weight": torch.zeros(2)})


def test_evaluation_deals_nothing():
    strategy = Spry()
    messages_of(strategy, [1, 2])
    grid = FakeGrid([1, 2], lambda message, node: message)
    asked = list(strategy.configure_evaluate(1, encode(adapter()), ConfigRecord(), grid))
    assert all("owned" not in message.content["config"] for message in asked)


def test_presets_set_what_the_configuration_leaves_out():
    paper = Spry(preset="paper")
    parameters = json.loads(
        messages_of(paper, [1], config=train_config("forward-ad", tangents=3))[0].content["config"][
            "client-parameters"
        ]
    )
    assert paper.dealing == "cyclic"
    assert repr(paper.server_optimizer) == "yogi (eta 0.01, beta_1 0.9, beta_2 0.99, tau 0.001)"
    assert parameters["tangents"] == 3
    assert parameters["distribution"] == "gaussian"
    assert parameters["optimizer"] == "adamw"
    assert parameters["exact-heads"] is False
    registry.check_parameters("clients", "forward-ad", parameters)
    other = messages_of(paper, [1], config=train_config("backprop", momentum=0.5))[0]
    assert json.loads(other.content["config"]["client-parameters"]) == {"momentum": 0.5}


# ------------------------------------------------------------------ merging


def test_a_tensor_is_the_mean_over_its_owners_by_hand():
    strategy = Spry(server="sgd")
    arrays = adapter()
    messages = messages_of(strategy, range(1, 9), arrays=arrays)
    weights = {message.metadata.dst_node_id: float(message.metadata.dst_node_id) for message in messages}
    replies = [
        answer(m, lambda name, value, m=m: value + m.metadata.dst_node_id, weights[m.metadata.dst_node_id])
        for m in messages
    ]
    new, _ = strategy.aggregate_train(1, iter(replies))
    for name, value in decode(new).items():
        owners = [m.metadata.dst_node_id for m in messages if name in owned_of(m)]
        shift = sum(weights[o] * o for o in owners) / sum(weights[o] for o in owners)
        torch.testing.assert_close(value, arrays[name] + shift)


def test_units_of_a_failed_owner_keep_value_and_moments():
    strategy = Spry(server="yogi", eta=0.1)
    arrays = adapter()
    grow = lambda name, value: value + 0.5  # noqa: E731
    messages = messages_of(strategy, [1, 2, 3], arrays=arrays)
    new, _ = strategy.aggregate_train(1, iter([answer(m, grow) for m in messages]))
    before = {key: dict(value) for key, value in strategy.server_optimizer.state_dict().items()}
    messages = messages_of(strategy, [1, 2, 3], arrays=decode(new), server_round=2)
    lost = set(owned_of(messages[0])) - {"m.head.weight"}
    newer, _ = strategy.aggregate_train(2, iter([answer(m, grow) for m in messages[1:]]))
    after = strategy.server_optimizer.state_dict()
    for name in NAMES:
        same = name in lost
        assert torch.equal(decode(newer)[name], decode(new)[name]) == same
        assert torch.equal(after["first"][name], before["first"][name]) == same
        assert torch.equal(after["second"][name], before["second"][name]) == same
    assert list(newer) == NAMES


def test_unit_yogi_is_flowers_yogi_where_everything_is_trained():
    flower, ours = FedYogi().server_optimizer, UnitYogi()
    current = adapter()
    for server_round in range(1, 4):
        folded = {name: value + 0.1 * value.sin() * server_round for name, value in current.items()}
        expected = flower.step(server_round, current, folded)
        found = ours.step(server_round, current, folded)
        for name in NAMES:
            torch.testing.assert_close(found[name].float(), expected[name], rtol=1e-4, atol=1e-6)
        current = {name: value.float() for name, value in expected.items()}


def test_owners_mean_and_sgd_step():
    mean = OwnersMean()
    mean.add(Reply("1", 1.0, {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, {}, None))
    mean.add(Reply("2", 3.0, {"a": torch.tensor([5.0])}, {}, None))
    assert {name: value.tolist() for name, value in mean.result().items()} == {"a": [4.0], "b": [2.0]}
    current = {"c": torch.tensor([9.0]), "a": torch.tensor([2.0])}
    stepped = UnitSgd(0.5).step(1, current, {"a": torch.tensor([4.0])})
    assert list(stepped) == ["c", "a"]
    assert [value.item() for value in stepped.values()] == [9.0, 3.0]


def test_rounds_after_a_resume_are_the_same_bits(tmp_path):
    def rounds(strategy, arrays, numbers):
        for number in numbers:
            messages = messages_of(strategy, [1, 2, 3, 4], arrays=arrays, server_round=number)
            noise = lambda name, value, n=number: value + (value * 10 * n).sin()  # noqa: E731
            sent = [message.content.get("direction") for message in messages]
            assert all((record is None) == (number == 1) for record in sent)
            new, _ = strategy.aggregate_train(number, iter([answer(m, noise) for m in messages[:3]]))
            arrays = decode(new)
        return arrays

    first = Spry(server="yogi", send_direction=True)
    middle = rounds(first, adapter(), [1, 2])
    store = CheckpointStore(tmp_path, "spry")
    store.save(ServerState(2, encode(middle), first.state_dict(), {}))
    state, _ = store.latest()
    second = Spry(server="yogi", send_direction=True)
    second.load_state_dict(state.strategy)
    expected, found = rounds(first, middle, [3, 4]), rounds(second, decode(state.arrays), [3, 4])
    assert all(np.array_equal(expected[name], found[name]) for name in NAMES)


def test_the_direction_is_the_servers_last_step():
    strategy = Spry(send_direction=True)
    arrays = adapter()
    messages = messages_of(strategy, [1, 2], arrays=arrays)
    new, _ = strategy.aggregate_train(1, iter([answer(m, lambda n, v: v + 1) for m in messages]))
    again = messages_of(strategy, [1, 2], arrays=decode(new), server_round=2)
    sent = decode(again[0].content["direction"])
    for name in NAMES:
        torch.testing.assert_close(sent[name], decode(new)[name] - arrays[name])


# ------------------------------------------------------------ per iteration


def run_client(message, node, run_seed=7):
    """What fedllm's client does with a training message, without the data."""
    found = job(local_steps=1)
    config = message.content["config"]
    seed = derive_seed(run_seed, int(config["server-round"]), node)
    start = decode(message.content["arrays"])
    found.bundle.load_adapter_state(start)
    update = registry.build("clients", config["client"], json.loads(config["client-parameters"]))
    task = replace(found, seed=seed, node=node, start=start, owned=tuple(owned_of(message)))
    return update, task


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_the_server_takes_the_step_that_the_clients_scalars_mean(preset):
    strategy = Spry(preset=preset, communication="per-iteration", server="sgd", eta=0.5)
    arrays = job().start
    messages = messages_of(strategy, [1, 2, 3], arrays=arrays, config=train_config("forward-ad"))
    replies, gradients = [], {}
    for message in messages:
        name = str(message.metadata.dst_node_id)
        update, task = run_client(message, name)
        result = update.run(task)
        upload = encode(result.arrays, message.content["config"]["upload-codec"], task.start)
        assert wire_bytes(upload) < 100
        reply = reply_with(message, upload, num_examples=10 * int(name))
        check_reply(reply, strategy.reply_spec(message))
        replies.append(reply)
        gradients[name] = regenerated(task, update, result.arrays["jvps"])
    new, _ = strategy.aggregate_train(1, iter(replies))
    for tensor, value in decode(new).items():
        owners = [name for name, gradient in gradients.items() if tensor in gradient]
        total = sum(10 * int(name) for name in owners)
        expected = arrays[tensor].double()
        for name in owners:
            expected = expected - 0.5 * 10 * int(name) / total * gradients[name][tensor].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)
    assert any(not torch.equal(decode(new)[name], arrays[name]) for name in arrays)


def regenerated(task, update, scalars):
    """The gradient from the client's own view: what it owns and how it perturbs."""
    shapes = {name: tuple(task.start[name].shape) for name in task.owned}
    heads = {
        name: shape for name, shape in shapes.items() if task.bundle.is_head(name) and update.exact_heads
    }
    factors = {name: shape for name, shape in shapes.items() if name not in heads}
    return from_scalars(task.seed, 1, scalars, factors, heads, update.tangents, update.distribution)


def test_the_regenerated_gradient_is_the_clients_bit_for_bit():
    """One step of SGD by the client itself, with factors only, against the server's gradient from its scalars."""
    strategy = Spry(communication="per-iteration", server="sgd")
    arrays = job().start
    message = messages_of(strategy, [1, 2], arrays=arrays, config=train_config("forward-ad"))[0]
    update, task = run_client(message, "1")
    factors = tuple(name for name in task.owned if "lora_B" in name)
    scalars = update.run(replace(task, owned=factors)).arrays["jvps"]
    shapes = {name: tuple(task.start[name].shape) for name in factors}
    server = from_scalars(task.seed, 1, scalars, shapes, {}, update.tangents, update.distribution)
    local = registry.build(
        "clients", "forward-ad", {"tangents": update.tangents, "b-only": True, "optimizer": "sgd"}
    )
    _, again = run_client(message, "1")
    moved = local.run(replace(again, owned=factors)).arrays
    rate = task.train.learning_rate
    for name in factors:
        expected = torch.sub(task.start[name], server[name], alpha=rate)
        assert torch.equal(moved[name], expected), name


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_an_opened_reply_is_the_step_along_the_clients_gradient_bit_for_bit(distribution):
    strategy = Spry(communication="per-iteration", server="sgd")
    config = train_config("forward-ad", tangents=2, distribution=distribution)
    message = messages_of(strategy, [1, 2], arrays=job().start, config=config)[0]
    update, task = run_client(message, "1")
    result = update.run(task)
    reply = strategy.open_reply(reply_with(message, encode(result.arrays, "raw")))
    gradient = regenerated(task, update, result.arrays["jvps"])
    assert set(reply.arrays) == set(gradient)
    for name, value in gradient.items():
        assert torch.equal(reply.arrays[name], task.start[name].double() - value), name


def test_heads_stay_without_tangents_of_their_own():
    strategy = Spry(communication="per-iteration", server="sgd")
    config = train_config("forward-ad", **{"head-tangents": 0})
    message = messages_of(strategy, [1, 2], arrays=job().start, config=config)[0]
    update, task = run_client(message, "1")
    result = update.run(task)
    assert result.arrays["jvps"].shape == (1,)
    check_reply(reply := reply_with(message, encode(result.arrays, "raw")), strategy.reply_spec(message))
    opened = strategy.open_reply(reply).arrays
    assert opened
    assert not any(task.bundle.is_head(name) for name in opened)


def test_per_iteration_needs_forward_mode_clients():
    with pytest.raises(PlanError, match="goes with forward-ad, found 'backprop'"):
        messages_of(Spry(communication="per-iteration"), [1])


SPRY = {"strategy": "spry", "client": "forward-ad"}
REFUSED = [
    ({"spry.communication": "per-iteration", "client": "backprop"}, 'set client = "forward-ad"'),
    (
        {"spry.communication": "per-iteration", "forward-ad.control-variate": True},
        "control-variate is for spry.communication per-epoch",
    ),
    ({"forward-ad.control-variate": True}, "set spry.send-direction = true"),
    ({"forward-ad.upload": "scalars"}, 'spry.communication = "per-iteration"'),
    ({"forward-ad.upload": "scalars", "strategy": "fedavg"}, "the strategy expects tensors"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_before_the_run(keys, message):
    config = registry.config_from_flat({**SPRY, **keys})
    with pytest.raises(ConfigError, match=message):
        registry.check(config)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"spry.communication": "per-iteration"},
        {"forward-ad.control-variate": True, "spry.send-direction": True},
        {"client": "backprop"},
    ],
)
def test_what_goes_together_is_accepted(keys):
    registry.check(registry.config_from_flat({**SPRY, **keys}))


def test_scalars_of_the_wrong_number_are_refused():
    strategy = Spry(communication="per-iteration")
    message = messages_of(strategy, [1], config=train_config("forward-ad"))[0]
    spec = strategy.reply_spec(message)
    count = spec["jvps"].shape[0]
    check_reply(reply_with(message, encode({"jvps": torch.zeros(count)}, "raw")), spec)
    with pytest.raises(ReplyError, match="shape"):
        check_reply(reply_with(message, encode({"jvps": torch.zeros(count + 1)}, "raw")), spec)
