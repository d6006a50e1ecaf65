"""HSplitLoRA's rounds with real clients in threads: equal to an unsplit step, exact merging, cuts by budget."""

import threading

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message
from transformers import BertConfig, BertModel

from fedllm import client, registry, server
from fedllm.errors import ConfigError, PlanError, RoundError, SplitError
from fedllm.events import EventBus, read_events
from fedllm.lora.pairs import pair_names
from fedllm.models import load_bundle
from fedllm.nodes import NodeInfo
from fedllm.records import decode, encode
from fedllm.tiny_models import build_tokenizer
from tests.fakes import FakeGrid, reply_with
from tests.unit.test_server import ClientGrid, write_rows


class ThreadGrid(ClientGrid):
    """Clients that work at the same time, as Ray's workers and real nodes do."""

    def __init__(self, flat, **options):
        super().__init__(flat, **options)
        self._answers = {}
        self._threads = []
        self.client = self._begin
        # One process serves all clients here: each gets a model of its own, as it would in a process of its own.
        self._models = threading.local()

    def _begin(self, message, node):
        raise NotImplementedError

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.message_type == "query.describe":
                ids += super().push_messages([message])
                continue
            self._count += 1
            message_id = f"m{self._count}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            thread = threading.Thread(target=self._work, args=(message_id, message))
            self._threads.append(thread)
            thread.start()
        return ids

    def _work(self, message_id, message):
        self._answers[message_id] = self.receive(message, message.metadata.dst_node_id)

    def pull_messages(self, message_ids):
        message_ids = list(message_ids)
        ready = [self._answers.pop(i) for i in message_ids if i in self._answers]
        return ready + super().pull_messages([i for i in message_ids if i in self._due])


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)
    # Bundles are shared in a process; clients that work at once need one each.
    own = threading.local()

    def own_bundle(config, labels=()):
        key = config.model_dump_json(include={"model", "lora", "task", "seed"})
        held = own.__dict__.setdefault("held", {})
        if key not in held:
            from fedllm.models import _build_bundle

            held[key] = _build_bundle(config, labels)
        return held[key]

    monkeypatch.setattr(client, "load_bundle", own_bundle)
    source = write_rows(tmp_path / "train.csv", 0, 120)
    return {
        "model.name": "tiny-random:bert",
        "strategy": "hsplitlora",
        "hsplitlora.cuts": "1",
        "hsplitlora.join-timeout": 20.0,
        "hsplitlora.step-timeout": 20.0,
        "lora.rank": 4,
        "data.source": str(source),
        "data.test-fraction": 0.2,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.learning-rate": 1e-2,
        "train.batch-size": 8,
        "train.local-steps": 4,
        "rounds": 2,
        "run.root": str(tmp_path / "runs"),
        "run.name": "r",
        "server.min-nodes": 3,
        "server.node-timeout": 10,
        "server.poll-interval": 0.005,
        "simulation.clients": 3,
    }


def run(flat, **changes):
    flat = flat | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return server.run(ThreadGrid(flat), flat)


def events(tmp_path, kind):
    return [event for event in read_events(tmp_path / "runs/r/events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("aggregation", ["exact", "stack"])
def test_a_run_trains_both_sides(flat, tmp_path, labels, aggregation):
    result = run(flat, hsplitlora__labels=labels, lora__aggregation=aggregation)
    assert not events(tmp_path, "node-dropped")
    assert len(events(tmp_path, "aggregated")) == 2
    config = registry.config_from_flat(flat)
    start = load_bundle(config, ("food", "sky", "sport")).initial_state
    final = decode(result.arrays)
    for part in ("layer.0.", "layer.1.", "classifier"):
        changed = [name for name in final if part in name and not torch.equal(final[name], start[name])]
        assert changed, part
    assert not [t for t in threading.enumerate() if "split" in t.name]


# ------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A BERT with four blocks, so that clients can be cut at different ones."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(deep_model, described=None, **parameters):
    flat = {"model.name": deep_model, "lora.rank": 8, "strategy": "hsplitlora", "data.max-length": 32}
    config = registry.config_from_flat(flat)
    bundle = load_bundle(config, ("a", "b"))
    client_ranks = parameters.pop("client_ranks", ())
    strategy = registry.build("strategies", "hsplitlora", parameters, client_ranks=client_ranks, seed=3)
    strategy.prepare(config, bundle, EventBus([]))
    names = {10 + i: str(i) for i in range(4)}
    strategy.nodes = [
        NodeInfo(i, name, (0, int(name), name), 10, ConfigRecord((described or {}).get(name, {})))
        for i, name in names.items()
    ]
    return strategy, bundle


def perturbed(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in state.items()
    }


def products(state):
    """Dense product of every module in float64."""
    return {
        module: state[pair.lora_B].double() @ state[pair.lora_A].double()
        for module, pair in pair_names(state).modules.items()
        if pair.lora_A in state
    }


@pytest.mark.parametrize("labels", ["server", "client"])
def test_blocks_on_both_sides_are_merged_without_error(deep_model, labels):
    strategy, bundle = prepared(deep_model, cuts="1,3,2", client_ranks=(4, 8, 2), labels=labels)
    start = perturbed(bundle.initial_state, 1)
    try:
        messages = list(strategy.configure_train(1, encode(start), ConfigRecord(), FakeGrid([], None)))
        replies, sent, returned = [], {}, {}
        for index, message in enumerate(messages):
            sent[index] = decode(message.content["arrays"])
            owned = message.content["config"]["owned"]
            returned[index] = perturbed({name: sent[index][name] for name in owned}, 20 + index)
            replies.append(reply_with(message, encode(returned[index]), num_examples=10 * (index + 1)))
        for name, parameter in bundle.trainable().items():
            parameter.data += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
        on_server = bundle.adapter_state()
        new, _ = strategy.aggregate_train(1, iter(replies))
    finally:
        strategy.close()
    cuts, weights = [1, 3, 2, 1], [10.0, 20.0, 30.0, 40.0]
    merged = {
        module: f.left.double() @ f.right.double()
        for module, f in strategy.adapters._products.modules.items()
    }
    before, server_side = products(start), products(on_server)
    assert merged.keys() == before.keys()
    for module, found in merged.items():
        block = strategy._split.block_of(module)
        expected = before[module].clone()
        for index, (cut, weight) in enumerate(zip(cuts, weights, strict=True)):
            on_client = labels == "client" if block is None else block < cut
            if on_client:
                change = products(returned[index])[module] - products(sent[index])[module]
            else:
                change = server_side[module] - before[module]
            expected += weight / sum(weights) * change
        assert torch.linalg.norm(found - expected) <= 1e-6 * torch.linalg.norm(expected), module
    head = "base_model.model.classifier.weight"
    mean = (
        sum(w * r[head] for w, r in zip(weights, returned.values(), strict=True)) / 100
        if labels == "client"
        else on_server[head]
    )
    torch.testing.assert_close(decode(new)[head], mean, rtol=1e-5, atol=1e-6)


def test_a_client_that_fails_does_not_weigh(deep_model):
    strategy, bundle = prepared(deep_model, cuts="2")
    start = perturbed(bundle.initial_state, 1)
    try:
        messages = list(strategy.configure_train(1, encode(start), ConfigRecord(), FakeGrid([], None)))
        kept = []
        for index, message in enumerate(messages[:2]):
            owned = {
                name: decode(message.content["arrays"])[name] for name in message.content["config"]["owned"]
            }
            kept.append(reply_with(message, encode(perturbed(owned, index)), num_examples=10))
        lost = Message(Error(code=1, reason="killed"), reply_to=messages[2])
        new, _ = strategy.aggregate_train(1, iter([*kept, lost]))
    finally:
        strategy.close()
    assert strategy._examples == {"0": 10, "1": 10}
    after, before = products(decode(new)), products(start)
    for module, value in after.items():
        same = torch.allclose(value, before[module], atol=1e-6)
        block = strategy._split.block_of(module)
        assert same == (block is None or block >= 2), module


# ------------------------------------------------------- what must go together


def test_a_simulation_that_cannot_run_all_clients_at_once_is_refused(deep_model):
    described = {str(name): {"workers": 3} for name in range(4)}
    strategy, bundle = prepared(deep_model, described, cuts="1")
    arrays = encode(bundle.initial_state)
    with pytest.raises(SplitError, match=r"4 clients train together .* runs 3 at a time.*init-args-num-cpus"):
        strategy.configure_train(1, arrays, ConfigRecord(), FakeGrid([], None))
    assert strategy._server is None


@pytest.mark.parametrize(
    "changes",
    [
        {"hsplitlora__certificate": "server.pem", "hsplitlora__key": "server.key"},
        {"split__root_certificate": "ca.pem"},
    ],
)
def test_a_certificate_that_nobody_checks_is_refused(flat, changes):
    with pytest.raises(ConfigError, match=r"split\.root-certificate go together"):
        run(flat, **changes)


# ------------------------------------------------------------------- the plan


def budget(megabytes, speed=1e9):
    return {"memory-bytes": int(megabytes * 1e6), "num-examples": 10, "flops-per-second": speed}


def test_cuts_follow_memory_and_speed(deep_model):
    described = {"0": budget(5), "1": budget(50, 1e12), "2": budget(50, 1e6), "3": budget(1e-4)}
    strategy, bundle = prepared(deep_model, described, **{"server-flops": 1e9})
    rejected = []
    strategy._events = EventBus(
        [type("S", (), {"emit": lambda _, e: rejected.append(e), "close": lambda _: None})()]
    )
    try:
        arrays = encode(bundle.initial_state)
        messages = list(strategy.configure_train(1, arrays, ConfigRecord(), FakeGrid([], None)))
        cuts = {name: share.cut for name, share in strategy._shares.items()}
        assert cuts["2"] == 1, "a slow node does as little as it can"
        assert cuts["1"] == 3, "a fast one with room does as much as it can"
        assert "3" not in cuts
        (event,) = [e for e in rejected if e["event"] == "node-rejected"]
        assert event["node"] == "3"
        assert "bytes" in event["reason"]
        assert len(messages) == 3
        for message in messages:
            share = strategy._shares[str(message.metadata.dst_node_id - 10)]
            assert message.content["config"]["plan-blocks"] == share.cut
            assert message.content["config"]["client"] == "split"
            for module in pair_names(message.content["arrays"]).modules:
                assert strategy._split.block_of(module) < share.cut
    finally:
        strategy.close()


def test_no_node_that_can_take_part(deep_model):
    strategy, bundle = prepared(deep_model, {str(i): budget(1e-4) for i in range(4)})
    with pytest.raises(PlanError, match=r"0 of 4 nodes can hold a part.*needed are \d+ bytes"):
        strategy.configure_train(1, encode(bundle.initial_state), ConfigRecord(), FakeGrid([], None))


def test_plans_change_only_past_the_threshold(deep_model):
    strategy, _ = prepared(deep_model, {str(i): budget(50) for i in range(4)}, **{"replan-threshold": 0.5})
    dealer = strategy._dealer
    dealer.deal(strategy.nodes)
    names = [weight.name for weight in dealer._spec.weights]
    dealer.learn(1, {"server": (1.0, dict.fromkeys(names, 1.0))})
    dealer.deal(strategy.nodes)
    first = dict(dealer._planned_with)
    dealer.learn(2, {"server": (1.0, {name: 1.0 + 0.1 * (i % 2) for i, name in enumerate(names)})})
    dealer.deal(strategy.nodes)
    assert dealer._planned_with == first
    dealer.learn(3, {"server": (1.0, {name: 1.0 + 50.0 * (i % 2) for i, name in enumerate(names)})})
    dealer.deal(strategy.nodes)
    assert dealer._planned_with != first


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hsplitlora__cuts": "2"}, SplitError, r"hsplitlora\.cuts: expected 1 to 1 of the model's 2 blocks"),
        ({"hsplitlora__cuts": "0"}, ConfigError, r"hsplitlora\.cuts"),
        ({"client": "zeroth-order"}, ConfigError, "clients follow the rule 'split'"),
        ({"server__fraction_evaluate": 0.5}, ConfigError, "hold only a part of the model"),
        ({"lora__aggregation": "zero-pad"}, ConfigError, "exact or stack"),
        ({"hsplitlora__certificate": "a.pem"}, ConfigError, "go together"),
        ({"hsplitlora__address": "0.0.0.0:0"}, SplitError, "without TLS"),
        ({"hsplitlora__address": "here"}, SplitError, "host:port"),
        ({"model__blocks": 1}, ConfigError, r"model\.blocks"),
        ({"hsplitlora__cuts": "", "lora__client_ranks": "2"}, ConfigError, "set both or none"),
    ],
)
def test_bad_settings_are_refused(flat, changes, error, message):
    flat = {
        key: value
        for key, value in flat.items()
        if not (key == "hsplitlora.cuts" and changes.get("hsplitlora__cuts") == "")
    }
    changes = {key: value for key, value in changes.items() if value != ""}
    with pytest.raises(error, match=message):
        run(flat, **changes)
    assert not [t for t in threading.enumerate() if "split" in t.name]


def test_a_server_that_a_node_cannot_reach(flat):
    with pytest.raises(RoundError, match=r"127\.0\.0\.1:9 did not answer within 0\.2 s.*hsplitlora\.address"):
        run(flat, hsplitlora__public_address="127.0.0.1:9", split__connect_timeout=0.2, rounds=1)


def test_the_rule_alone_says_what_it_lacks(flat):
    flat = {key: value for key, value in flat.items() if not key.startswith("hsplitlora")}
    with pytest.raises(RoundError, match='set strategy = "hsplitlora"'):
        run(flat, strategy="fedavg", client="split", rounds=1)


# --------------------------------------------------------------------- resume


def test_resuming_ends_with_the_same_bits(flat):
    flat["model.name"] = "tiny-random:llama"  # no dropout: the threads of this test share one random state
    whole = run(flat, rounds=3, run__name="whole", hsplitlora__cuts="1")
    run(flat, rounds=2, run__name="parts")
    resumed = run(flat, rounds=3, run__name="parts", run__resume=True)
    expected = decode(whole.arrays)
    for name, value in decode(resumed.arrays).items():
        assert torch.equal(value, expected[name]), name
