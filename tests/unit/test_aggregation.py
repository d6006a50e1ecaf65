"""The aggregations in whole rounds of a strategy, against dense matrices in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedllm import registry
from fedllm.accumulate import Reply, WeightedMean
from fedllm.adapter_means import ColumnMean, ProductMean, ServerProducts
from fedllm.aggregation import AdapterAggregation, ClientRanks, leading
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ReplyError
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.frozen import frozen_products
from fedllm.models import load_bundle
from fedllm.nodes import NodeInfo
from fedllm.records import FROZEN, decode, encode
from fedllm.rounds import run_rounds
from fedllm.strategy import BaseStrategy
from tests.fakes import FakeGrid, reply_with

D, K, RANK = 24, 20, 8
MODULES = ("first.query", "first.value")
HEAD = "classifier.weight"
PRODUCTS = ("svd", "stack", "exact")
ALL = ("factor-average", "zero-pad", *PRODUCTS)


def names(module):
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def adapter(seed=0, rank=RANK, modules=MODULES, zero=False):
    """An adapter with a clear spectrum, so that leading directions are well separated."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for module in modules:
        a, b = names(module)
        left = torch.linalg.qr(torch.randn(D, rank, generator=generator, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(K, rank, generator=generator, dtype=torch.float64))[0].T
        values = 2.0 ** -torch.arange(rank, dtype=torch.float64)
        arrays[a] = (values.sqrt()[:, None] * right).float()
        arrays[b] = torch.zeros(D, rank) if zero else (left * values.sqrt()).float()
    arrays[HEAD] = torch.randn(3, 5, generator=generator)
    return arrays


def product(arrays, module=MODULES[0]):
    a, b = names(module)
    return arrays[b].double() @ arrays[a].double()


def spectrum(arrays, module=MODULES[0]):
    return torch.linalg.svdvals(product(arrays, module))[:RANK]


def unchanged(message, node):
    return reply_with(message, encode(decode(message.content["arrays"])), num_examples=10 + node)


def moved(message, node):
    """A client whose answer depends on node and round only, of the form it was sent."""
    generator = torch.Generator().manual_seed(1000 * int(message.content["config"]["server-round"]) + node)
    arrays = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in decode(message.content["arrays"]).items()
    }
    return reply_with(message, encode(arrays), num_examples=10 + node)


def train(strategy, arrays, client, server_round, nodes=(1, 2, 3, 4)):
    grid = FakeGrid(nodes, client)
    messages = list(strategy.configure_train(server_round, encode(arrays), ConfigRecord(), grid))
    new, metrics = strategy.aggregate_train(
        server_round, iter([client(message, message.metadata.dst_node_id) for message in messages])
    )
    return decode(new), metrics, messages


def reply(arrays, weight=1.0, sent=None, node="n"):
    return Reply(node, weight, arrays, {}, RecordDict(), ArrayRecord() if sent is None else encode(sent))


def mean(accumulator, *replies):
    for one in replies:
        accumulator.add(one)
    return accumulator.result()


def exact(current, products=None):
    return ProductMean(current, "global-less-sent", products or ServerProducts())


# ------------------------------------------------------------------ five rounds in which nobody learns


def five_idle_rounds(aggregation):
    strategy = BaseStrategy(aggregation=aggregation, client_ranks=(1, 2, 4, 8))
    arrays = adapter()
    for server_round in range(1, 6):
        arrays, _, _ = train(strategy, arrays, unchanged, server_round)
    return arrays


def test_exact_keeps_the_spectrum_when_clients_return_what_they_got():
    before, after = adapter(), five_idle_rounds("exact")
    for module in MODULES:
        assert torch.allclose(spectrum(after, module), spectrum(before, module), rtol=1e-5)
        assert torch.linalg.norm(product(after, module) - product(before, module)) < 1e-5
    assert torch.allclose(after[HEAD], before[HEAD], rtol=1e-6)


def test_svd_loses_the_directions_that_few_clients_reach():
    """Direction j shrinks by the share of the weight whose rank reaches j, in every round."""
    ranks, weights = np.array([1, 2, 4, 8]), np.array([11.0, 12, 13, 14])
    share = np.array([weights[ranks > j].sum() for j in range(RANK)]) / weights.sum()
    expected = spectrum(adapter()) * torch.from_numpy(share) ** 5
    assert torch.allclose(spectrum(five_idle_rounds("svd")), expected, rtol=1e-4)
    assert expected[-1] < 0.01 * spectrum(adapter())[-1]


@pytest.mark.parametrize("aggregation", ["factor-average", "exact"])
def test_idle_rounds_before_anything_was_learnt_change_nothing(aggregation):
    strategy = BaseStrategy(aggregation=aggregation, client_ranks=(1, 2, 4, 8))
    start = adapter(zero=True)
    arrays, _, _ = train(strategy, start, unchanged, 1)
    for name, tensor in start.items():
        assert torch.allclose(arrays[name], tensor, rtol=1e-6), name


# ------------------------------------------------------------------ exactness


def dense_rounds(aggregation, ranks, rounds=3, cap=0):
    """Run rounds of clients that learn; also returns the dense product that must come out, before truncation."""
    strategy = BaseStrategy(aggregation=aggregation, client_ranks=ranks, accumulator_rank=cap)
    arrays = adapter()
    expected = {module: product(arrays, module) for module in MODULES}
    replies = {}

    def client(message, node):
        answer = moved(message, node)
        replies[node] = decode(answer.content["arrays"]), decode(message.content["arrays"])
        return answer

    for server_round in range(1, rounds + 1):
        arrays, _, _ = train(strategy, arrays, client, server_round)
        total = sum(10.0 + node for node in replies)
        for module in MODULES:
            step = sum(
                (10 + node)
                / total
                * (product(new, module) - (product(old, module) if aggregation == "exact" else 0))
                for node, (new, old) in replies.items()
            )
            expected[module] = step if aggregation == "svd" else expected[module] + step
    return strategy, arrays, expected


@pytest.mark.parametrize("ranks", [(1, 2, 4, 8), (8,), (3,)])
@pytest.mark.parametrize("aggregation", PRODUCTS)
def test_the_global_adapter_is_the_best_of_its_rank_to_the_dense_sum(aggregation, ranks):
    strategy, arrays, expected = dense_rounds(aggregation, ranks)
    for module in MODULES:
        u, s, vh = torch.linalg.svd(expected[module])
        best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        assert torch.linalg.norm(product(arrays, module) - best) < 1e-5 * torch.linalg.norm(best)
        if aggregation != "svd":
            kept = strategy.state_dict()["adapters"]["products"][module]
            found = kept["left"].double() @ kept["right"].double()
            assert torch.linalg.norm(found - expected[module]) < 1e-6 * torch.linalg.norm(expected[module])


def test_a_capped_accumulator_keeps_no_more_than_its_rank_and_tells_what_it_cut(caplog):
    with caplog.at_level("INFO"):
        strategy, _, expected = dense_rounds("exact", (1, 2, 4, 8), cap=10)
    for module in MODULES:
        kept = strategy.state_dict()["adapters"]["products"][module]
        assert kept["left"].shape == (D, 10)
        found = kept["left"].double() @ kept["right"].double()
        error = torch.linalg.norm(found - expected[module]) / torch.linalg.norm(expected[module])
        assert 1e-6 < error < 0.3
    assert "the rank limit cut at most" in caplog.text


def test_two_clients_with_one_update_at_other_ranks_count_alike():
    """The mean of one product at two ranks is that product, although the factors differ in every entry."""
    current, target = adapter(zero=True), adapter(5, rank=4)
    wide = dict(target)
    for module in MODULES:
        a, b = names(module)
        turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(3)))[0]
        wide[a] = turn @ torch.cat([target[a], torch.zeros(4, K)])
        wide[b] = torch.cat([target[b], torch.zeros(D, 4)], dim=1) @ turn.T
    result = mean(exact(current), reply(target, 3.0, current), reply(wide, 5.0, current))
    assert torch.allclose(product(result), product(target), atol=1e-6)


@pytest.mark.parametrize("aggregation", ALL)
def test_one_client_of_full_rank_is_returned(aggregation):
    current, target = adapter(zero=True), adapter(5)
    accumulator = AdapterAggregation(aggregation, (), 0, None).accumulator(current)
    result = mean(accumulator, reply(target, 7.0, current))
    assert torch.allclose(product(result), product(target), atol=1e-6)
    assert torch.allclose(result[HEAD].float(), target[HEAD])


@pytest.mark.parametrize("aggregation", ALL)
def test_the_order_of_replies_does_not_matter(aggregation):
    current = adapter()
    replies = [
        reply(adapter(seed, rank), 1.0 + seed, leading(current, rank))
        for seed, rank in enumerate((1, 8, 3, 8), 1)
    ]
    results = [
        mean(AdapterAggregation(aggregation, (), 0, None).accumulator(current), *order)
        for order in (replies, replies[::-1])
    ]
    for module in MODULES:
        assert torch.allclose(product(results[0], module), product(results[1], module), atol=1e-10)


# ------------------------------------------------------------------ some of the modules, some of the clients


@pytest.mark.parametrize("aggregation", ALL)
def test_a_module_is_averaged_over_its_holders_and_kept_if_there_are_none(aggregation):
    current = adapter(rank=4)
    partial = adapter(1, rank=4, modules=MODULES[:1])
    fuller = adapter(2, rank=4, modules=MODULES[:1])
    del fuller[HEAD]
    accumulator = AdapterAggregation(aggregation, (), 0, None).accumulator(current)
    result = mean(accumulator, reply(partial, 1.0, current), reply(fuller, 3.0, current))
    assert torch.allclose(product(result, MODULES[1]), product(current, MODULES[1]), atol=1e-7)
    assert torch.allclose(result[HEAD].float(), partial[HEAD])
    if aggregation == "exact":
        expected = (product(partial) + 3 * product(fuller)) / 4
        u, s, vh = torch.linalg.svd(expected)
        assert torch.allclose(product(result), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-6)


def test_what_nobody_trained_in_a_round_is_not_forgotten_under_exact():
    """Two clients take turns, each holds one module only; neither round disturbs the other's module."""
    strategy, arrays = BaseStrategy(aggregation="exact"), adapter(rank=4)
    for server_round, module in ((1, MODULES[0]), (2, MODULES[1]), (3, MODULES[0])):
        before = {m: product(arrays, m) for m in MODULES}

        def client(message, node, module=module):
            part = {
                name: tensor
                for name, tensor in decode(moved(message, node).content["arrays"]).items()
                if name.startswith(module)
            }
            return reply_with(message, encode(part))

        arrays, _, _ = train(strategy, arrays, client, server_round, nodes=(1,))
        other = next(m for m in MODULES if m != module)
        assert torch.allclose(product(arrays, other), before[other], atol=1e-7)
        assert not torch.allclose(product(arrays, module), before[module], atol=1e-2)


# ------------------------------------------------------------------ means of the factors


def test_factor_average_of_equal_ranks_is_the_weighted_mean_bit_for_bit():
    current, replies = adapter(), [reply(adapter(seed), 1.0 + seed) for seed in (1, 2, 3)]
    ours, plain = mean(ColumnMean(current, pad=False), *replies), mean(WeightedMean(), *replies)
    padded = mean(ColumnMean(current, pad=True), *replies)
    assert list(ours) == list(current)
    for name in current:
        assert torch.equal(ours[name], plain[name])
        assert torch.equal(padded[name], plain[name])


def test_columns_are_averaged_over_holders_or_diluted_with_zeros():
    current = {"lora_A.weight": torch.full((3, 1), 9.0), "lora_B.weight": torch.full((1, 3), 9.0)}
    low = {"lora_A.weight": torch.full((1, 1), 1.0), "lora_B.weight": torch.full((1, 1), 1.0)}
    high = {"lora_A.weight": torch.full((2, 1), 5.0), "lora_B.weight": torch.full((1, 2), 5.0)}
    held = mean(ColumnMean(current, pad=False), reply(low, 3.0), reply(high, 1.0))
    padded = mean(ColumnMean(current, pad=True), reply(low, 3.0), reply(high, 1.0))
    # Rank 3 is held by nobody and stays; the first is (3·1 + 1·5) / 4.
    assert held["lora_A.weight"].flatten().tolist() == [2.0, 5.0, 9.0]
    assert padded["lora_A.weight"].flatten().tolist() == [2.0, 1.25, 9.0]
    assert held["lora_B.weight"].flatten().tolist() == [2.0, 5.0, 9.0]
    assert padded["lora_B.weight"].flatten().tolist() == [2.0, 1.25, 9.0]


@pytest.mark.parametrize("make", [lambda c: ColumnMean(c, pad=False), exact], ids=["columns", "products"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(unknown=torch.ones(2)), "node n: 'unknown'"),
        (lambda a: a.pop("first.query.lora_A.weight"), "one of the two factors of 'first.query'"),
        (
            lambda a: a.update({"first.query.lora_A.weight": torch.ones(4, K)}),
            r"lora_B.*\(24, 8\), expected \(24, 4\)",
        ),
        (
            lambda a: a.update({"first.query.lora_A.weight": torch.ones(RANK, 3)}),
            r"\(8, 3\), expected \(8, 20\)",
        ),
        (lambda a: a.update({HEAD: torch.ones(2, 2)}), r"classifier.*\(2, 2\), expected \(3, 5\)"),
    ],
)
def test_a_reply_that_does_not_fit_is_named(make, change, message):
    arrays = adapter(1)
    change(arrays)
    with pytest.raises(ReplyError, match=message):
        make(adapter()).add(reply(arrays, sent=adapter()))


def test_a_rank_above_the_global_one_and_a_module_never_sent_are_refused():
    with pytest.raises(ReplyError, match="rank 9, the global adapter only 8"):
        ColumnMean(adapter(), pad=True).add(reply(adapter(1, rank=9)))
    with pytest.raises(ReplyError, match=r"first\.value.*not sent"):
        exact(adapter()).add(reply(adapter(1), sent=adapter(0, modules=MODULES[:1])))


# ------------------------------------------------------------------ ranks of the clients


def node(name, number=0):
    order = (0, int(name), name) if name.isdecimal() else (1, number, name)
    return NodeInfo(number, name, order)


def test_nodes_get_ranks_in_the_stable_order_of_their_names_and_keep_them():
    ranks = ClientRanks((2, 4, 8))
    ranks.see([node("10"), node("9"), node("edge")])
    assert [ranks.of(node(name)) for name in ("9", "10", "edge")] == [2, 4, 8]
    ranks.see([node("1"), node("10")])
    assert [ranks.of(node(name)) for name in ("1", "9", "10", "edge")] == [2, 2, 4, 8]
    again = ClientRanks((2, 4, 8))
    again.load_state_dict(ranks.state_dict())
    again.see([node("0")])
    assert [again.of(node(name)) for name in ("1", "edge", "0")] == [2, 8, 4]
    assert ClientRanks(()).of(node("unseen")) is None


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("aggregation", ["factor-average", "zero-pad", "svd", "exact"])
def test_every_client_gets_the_leading_ranks_and_equal_clients_share_a_message(aggregation, codec):
    strategy = BaseStrategy(aggregation=aggregation, client_ranks=(2, 4, 4), download_codec=codec)
    arrays = adapter()
    messages = list(
        strategy.configure_train(1, encode(arrays), ConfigRecord(), FakeGrid((1, 2, 3, 4), unchanged))
    )
    ranks = [4 if number % 3 else 2 for number in range(4)]
    for message, rank in zip(messages, ranks, strict=True):
        found = decode(message.content["arrays"])
        for module in MODULES:
            a, b = names(module)
            assert torch.allclose(found[a], arrays[a][:rank], atol=2e-2)
            assert torch.allclose(found[b], arrays[b][:, :rank], atol=2e-2)
        assert strategy.reply_spec(message)[names(MODULES[0])[0]].shape == (rank, K)
    assert messages[1].content is messages[2].content
    assert messages[0].content is messages[3].content


def test_exact_cancels_the_truncation_whatever_the_download_codec():
    """What a client was sent is what came out of the codec: idle clients change nothing, lossy or not."""
    strategy = BaseStrategy(client_ranks=(1, 2, 4, 8), download_codec="int8")
    arrays = adapter()
    for server_round in range(1, 4):
        arrays, _, _ = train(strategy, arrays, unchanged, server_round)
    assert torch.allclose(product(arrays), product(adapter()), atol=1e-5)


def test_a_reply_at_another_rank_than_planned_is_dropped_and_named():
    def wrong_rank(message, node):
        arrays = decode(message.content["arrays"])
        return reply_with(message, encode(leading(arrays, 1) if node == 2 else arrays))

    events = []
    sink = SimpleNamespace(emit=events.append, close=lambda: None)
    result = run_rounds(
        BaseStrategy(client_ranks=(2, 4), fraction_evaluate=0.0),
        FakeGrid((1, 2, 3), wrong_rank),
        encode(adapter()),
        1,
        options=LoopOptions(min_nodes=3, quorum=0.5),
        events=EventBus([sink]),
    )
    dropped = [event for event in events if event["event"] == "node-dropped"]
    assert [event["node"] for event in dropped] == ["2"]
    assert "has rank 1, expected rank 4" in dropped[0]["reason"]
    assert torch.allclose(product(decode(result.arrays)), product(adapter()), atol=1e-6)


# ------------------------------------------------------------------ resume, defaults, configuration


@pytest.mark.parametrize("aggregation", ALL)
def test_a_resumed_run_ends_with_the_same_bits(aggregation, tmp_path):
    def build():
        return BaseStrategy(aggregation=aggregation, client_ranks=(1, 8, 4), fraction_train=0.5, seed=3)

    first, arrays = build(), adapter(zero=True)
    for server_round in (1, 2):
        arrays, _, _ = train(first, arrays, moved, server_round, nodes=(1, 2, 3, 4, 5))
    store = CheckpointStore(tmp_path, "aggregation")
    store.save(ServerState(2, encode(arrays), first.state_dict(), {}))
    second, state = build(), store.latest()[0]
    second.load_state_dict(state.strategy)
    resumed = decode(state.arrays)
    for server_round in (3, 4):
        arrays, _, _ = train(first, arrays, moved, server_round, nodes=(1, 2, 3, 4, 5))
        resumed, _, _ = train(second, resumed, moved, server_round, nodes=(1, 2, 3, 4, 5))
    for name, tensor in arrays.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_fold_that_is_interrupted_leaves_the_products_as_they_were():
    strategy = BaseStrategy(aggregation="exact", client_ranks=(2, 4))
    arrays, _, _ = train(strategy, adapter(), moved, 1)
    before = strategy.state_dict()["adapters"]["products"]
    messages = list(strategy.configure_train(2, encode(arrays), ConfigRecord(), FakeGrid((1, 2), moved)))

    def broken():
        yield moved(messages[0], 1)
        raise RuntimeError("no quorum")

    with pytest.raises(RuntimeError, match="no quorum"):
        strategy.aggregate_train(2, broken())
    after = strategy.state_dict()["adapters"]["products"]
    for module, parts in before.items():
        assert all(torch.equal(part, after[module][side]) for side, part in parts.items())


def test_auto_is_the_plain_mean_unless_ranks_differ():
    class Planner(BaseStrategy):
        plans_ranks = True

    assert isinstance(BaseStrategy().accumulator(), WeightedMean)
    assert BaseStrategy().state_dict() == {}
    assert BaseStrategy(client_ranks=(4, 8)).adapters.name == "exact"
    assert Planner().adapters.name == "exact"
    assert Planner(aggregation="zero-pad").adapters.name == "zero-pad"


@pytest.mark.parametrize("aggregation", PRODUCTS)
def test_server_optimisers_go_with_means_of_factors_only(aggregation):
    def build(**keys):
        return registry.build("strategies", "fedadam", {}, **keys)

    with pytest.raises(ConfigError, match=f"{aggregation}.*FedAdam.*factor-average or zero-pad"):
        build(aggregation=aggregation)
    with pytest.raises(ConfigError, match=r"auto \(here exact\)"):
        build(client_ranks=(2, 4))
    strategy = build(aggregation="zero-pad", client_ranks=(2, 4))
    arrays, _, _ = train(strategy, adapter(), moved, 1)
    assert {name: t.shape for name, t in arrays.items()} == {n: t.shape for n, t in adapter().items()}


def test_a_strategy_with_ways_of_its_own_refuses_the_switch():
    class OwnFold(BaseStrategy):
        def accumulator(self):
            return WeightedMean()

    class OwnArrays(BaseStrategy):
        def arrays_for(self, node, arrays):
            return arrays

    OwnFold()
    OwnArrays(aggregation="exact")
    for build in (
        lambda: OwnFold(aggregation="svd"),
        lambda: OwnFold(client_ranks=(2,)),
        lambda: OwnArrays(client_ranks=(2,)),
    ):
        with pytest.raises(ConfigError, match=r"lora\.(aggregation|client-ranks) is .*a way of its own"):
            build()


def test_the_configuration_carries_ranks_and_aggregation():
    config = RunConfig.from_flat(
        {"lora.rank": 16, "lora.client-ranks": "2, 4,8,16", "lora.aggregation": "svd"}
    )
    assert config.lora.client_ranks == (2, 4, 8, 16)
    assert RunConfig.from_flat(config.to_flat()) == config
    assert config.to_flat()["lora.client-ranks"] == "2,4,8,16"
    assert config.fingerprint() != RunConfig.from_flat({"lora.rank": 16}).fingerprint()
    registry.check(config)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"lora.rank": 8, "lora.client-ranks": "2,16"}, r"client-ranks: 16 exceeds lora\.rank, which is 8"),
        ({"lora.client-ranks": "2,0"}, "client-ranks"),
        ({"lora.client-ranks": "2,four"}, "client-ranks"),
        ({"lora.aggregation": "mean"}, "aggregation"),
        ({"lora.rank": 8, "lora.accumulator-rank": 4}, "accumulator-rank"),
        ({"lora.aggregation": "exact", "strategy": "flwr.serverapp.strategy:FedMedian"}, "FedMedian"),
        ({"lora.client-ranks": "2", "strategy": "fedyogi"}, "FedYogi"),
    ],
)
def test_bad_configurations_are_refused_before_work_starts(flat, message):
    with pytest.raises(ConfigError, match=message):
        registry.check(registry.config_from_flat(flat))


# ------------------------------------------------------------------ stack: products beside a fresh adapter


def test_stack_sends_the_product_frozen_and_a_fresh_adapter():
    strategy, arrays = BaseStrategy(aggregation="stack", client_ranks=(2, 8)), adapter()
    messages = list(strategy.configure_train(1, encode(arrays), ConfigRecord(), FakeGrid((1, 2), moved)))
    frozen = decode(messages[0].content[FROZEN])
    assert set(frozen) == set(arrays) - {HEAD}
    for module in MODULES:
        a, b = names(module)
        assert torch.allclose(product(frozen, module), product(arrays, module), atol=1e-6)
        for message, rank in zip(messages, (2, 8), strict=True):
            sent = decode(message.content["arrays"])
            assert sent[a].shape == (rank, K)
            assert 0 < sent[a].abs().max() <= K**-0.5
            assert torch.equal(sent[b], torch.zeros(D, rank))
    assert torch.equal(decode(messages[0].content["arrays"])[HEAD], arrays[HEAD])
    again = list(strategy.configure_train(2, encode(arrays), ConfigRecord(), FakeGrid((1, 2), moved)))
    assert not np.array_equal(
        again[1].content["arrays"][names(MODULES[0])[0]].numpy(),
        messages[1].content["arrays"][names(MODULES[0])[0]].numpy(),
    )


def test_a_frozen_product_acts_like_the_adapter_that_it_came_from():
    """Model with the product frozen beside an empty adapter = model with that product as its adapter."""
    config = registry.config_from_flat({"model.name": "tiny-random:bert", "lora.rank": 2})
    bundle = load_bundle(config, ("a", "b"))
    generator = torch.Generator().manual_seed(0)
    learnt = {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in bundle.initial_state.items()}
    tokens = torch.randint(5, 50, (3, 7), generator=generator)

    def logits():
        with torch.no_grad():
            return bundle.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits

    heads = {name: tensor for name, tensor in learnt.items() if bundle.is_head(name)}
    bundle.load_adapter_state(learnt)
    expected = logits()
    bundle.load_adapter_state({**bundle.initial_state, **heads})
    without = logits()
    with frozen_products(bundle.model, {n: t for n, t in learnt.items() if n not in heads}):
        assert torch.allclose(logits(), expected, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-2)
    assert torch.equal(logits(), without)
