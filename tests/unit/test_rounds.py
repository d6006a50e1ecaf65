"""The round loop against Flower's own, and everything that can go wrong in a round."""

import json
import logging
import random
import time
import tracemalloc
from copy import deepcopy
from dataclasses import replace

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from fedllm.strategies.fedavg import FedAvg
from fedllm.strategies.fedopt import FedAdam, FedAvgM, FedYogi
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedllm import __version__
from fedllm.checkpoint import CheckpointStore, ServerState
from fedllm.errors import CheckpointError, PlanError, RoundError
from fedllm.events import EventBus
from fedllm.exchange import LoopOptions
from fedllm.packing import PACKED, pack, unpack
from fedllm.records import decode, encode
from fedllm.rounds import run_rounds
from tests.fakes import FakeGrid, Recorder, drift, drifting_client, initial_arrays, reply_with

NAMES = {11: "2", 7: "0", 23: "10", 5: "1", 42: "3"}
FAST = LoopOptions(min_nodes=1, node_timeout=5, poll_interval=0.001)


def run(strategy=None, client=drifting_client, rounds=2, options=FAST, grid=None, **kwargs):
    recorder = Recorder()
    grid = grid or FakeGrid(NAMES, client, names=NAMES)
    result = run_rounds(
        strategy or FedAvg(fraction_evaluate=0.0),
        grid,
        kwargs.pop("initial", None) or initial_arrays(),
        rounds,
        options=options,
        events=EventBus([recorder]),
        **kwargs,
    )
    return result, recorder


def numbers(record):
    return {name: array.numpy() for name, array in record.items()}


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert np.array_equal(left[name].numpy(), right[name].numpy()), name


PAIRS = [
    (FedAvg, flower.FedAvg, {}),
    (FedAvgM, flower.FedAvgM, {"server_learning_rate": 0.7, "server_momentum": 0.8}),
    (FedAdam, flower.FedAdam, {"eta": 0.02, "tau": 1e-2}),
    (FedYogi, flower.FedYogi, {"eta": 0.02, "tau": 1e-2}),
]


@pytest.mark.parametrize(("ours", "theirs", "settings"), PAIRS, ids=[pair[0].__name__ for pair in PAIRS])
def test_agrees_with_flowers_own_loop(ours, theirs, settings):
    mine, _ = run(ours(fraction_evaluate=0.0, **settings), rounds=4)
    stock = theirs(fraction_evaluate=0.0, **settings).start(
        FakeGrid(NAMES, drifting_client), initial_arrays(), 4
    )
    for name, value in numbers(stock.arrays).items():
        np.testing.assert_allclose(mine.arrays[name].numpy(), value, rtol=2e-5, atol=1e-6)
        assert mine.arrays[name].dtype == "float32"


def test_weighted_mean_is_the_dense_formula():
    result, _ = run(rounds=1)
    weights = np.array([10 + node for node in NAMES], dtype=np.float64)
    for name, start in numbers(initial_arrays()).items():
        replies = []
        for node in NAMES:
            generator = torch.Generator().manual_seed(1000 + node)
            state = {
                k: 0.1 * torch.randn(v.shape, generator=generator)
                for k, v in numbers(initial_arrays()).items()
            }
            replies.append(start + state[name].numpy())
        expected = np.einsum("c,c...->...", weights / weights.sum(), np.stack(replies))
        np.testing.assert_allclose(result.arrays[name].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_half_precision_updates_are_averaged_in_full_precision():
    def client(message, node):
        return reply_with(
            message, ArrayRecord({"w": Array(np.full(3, 0.1, dtype=np.float16))}), num_examples=1
        )

    initial = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float16))})
    nodes = range(1, 2001)
    result, _ = run(grid=FakeGrid(nodes, client), rounds=1, initial=initial)
    assert result.arrays["w"].numpy() == pytest.approx(float(np.float16(0.1)), rel=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_arrival_does_not_matter(reverse):
    def delay(message, node):
        rank = sorted(NAMES).index(node)
        return 0.02 * (len(NAMES) - rank if reverse else rank)

    straight, _ = run(FedAdam(fraction_evaluate=0.0))
    grid = FakeGrid(NAMES, drifting_client, delay, NAMES)
    delayed, _ = run(FedAdam(fraction_evaluate=0.0), grid=grid, options=LoopOptions(
        min_nodes=1, poll_interval=0.001, spool_bytes=0))  # fmt: skip
    assert_same(straight.arrays, delayed.arrays)


def test_node_ids_do_not_matter_only_names_do():
    """Flower draws node ids anew in every simulation."""

    def client(message, node):
        named = {**NAMES, 1001: "1", 3: "0", 77: "2", 6: "10", 9: "3"}[node]
        return drifting_client(message, int(named))

    one, _ = run(FedAvg(fraction_train=0.6, fraction_evaluate=0.0), client, rounds=3)
    other_names = {1001: "1", 3: "0", 77: "2", 6: "10", 9: "3"}
    grid = FakeGrid(other_names, client, names=other_names)
    two, _ = run(FedAvg(fraction_train=0.6, fraction_evaluate=0.0), grid=grid, rounds=3)
    assert_same(one.arrays, two.arrays)


def test_sampling_follows_the_seed():
    def asked(seed):
        grid = FakeGrid(NAMES, drifting_client, names=NAMES)
        run(FedAvg(fraction_train=0.4, fraction_evaluate=0.0, seed=seed), grid=grid, rounds=6)
        return [node for kind, node in grid.asked if kind == "train"]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


# ------------------------------------------------------------------ bad replies


def bad_reply(kind):
    def client(message, node):
        good = drifting_client(message, node)
        if NAMES[node] != "1" or message.metadata.message_type != "train":
            return good
        arrays = decode(good.content["arrays"])
        if kind == "error":
            return Message(Error(code=1, reason="Traceback …\nValueError: no such file"), reply_to=message)
        if kind == "nan":
            arrays["bias"][0] = float("nan")
        if kind == "shape":
            arrays["bias"] = torch.zeros(1, 5)
        if kind == "missing":
            del arrays["bias"]
        if kind == "extra":
            arrays["more"] = torch.zeros(1)
        if kind == "rank":
            arrays["lora_A.weight"] = torch.ones(1, 3)
        record = encode(arrays)
        if kind == "dtype":
            record["bias"] = Array(np.zeros(5))
        examples = {"zero": 0, "negative": -900, "huge": 10**15, "fraction": 0.5}.get(kind, 10)
        return reply_with(message, record, num_examples=examples)

    return client


KINDS = ["error", "nan", "shape", "missing", "extra", "rank", "dtype", "zero", "negative", "huge", "fraction"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reply_is_named_and_has_no_effect(kind):
    result, recorder = run(client=bad_reply(kind), rounds=1)
    (dropped,) = recorder.of("node-dropped")
    assert dropped["node"] == "1"
    assert dropped["reason"]
    without = {node: name for node, name in NAMES.items() if name != "1"}
    expected, _ = run(grid=FakeGrid(without, drifting_client, names=without), rounds=1)
    assert_same(result.arrays, expected.arrays)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_strategies_are_protected_too(kind):
    result, recorder = run(flower.FedAvg(fraction_evaluate=0.0), client=bad_reply(kind), rounds=1)
    assert len(recorder.of("node-dropped")) == 1
    assert all(
        np.isfinite(value).all() and np.abs(value).max() < 3 for value in numbers(result.arrays).values()
    )


def test_all_clients_failing_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    def client(message, node):
        if int(message.content["config"]["server-round"]) >= 3:
            return Message(Error(code=1, reason="CUDA out of memory"), reply_to=message)
        return drifting_client(message, node)

    store = CheckpointStore(tmp_path, "f")
    with pytest.raises(
        RoundError, match=r"round 3: every client failed.*CUDA out of memory.*checkpoint is kept"
    ):
        run(client=client, rounds=6, checkpoints=store)
    state, _ = store.latest()
    expected, _ = run(rounds=2)
    assert state.round == 2
    assert_same(state.arrays, expected.arrays)


def test_below_quorum_the_model_and_the_optimizer_stay_untouched():
    def client(message, node):
        server_round = int(message.content["config"]["server-round"])
        if server_round == 2 and NAMES[node] != "0":
            return Message(Error(code=1, reason="offline"), reply_to=message)
        return drift(message, node, 2 if server_round == 3 else server_round)

    strategy = FedAvgM(fraction_evaluate=0.0)
    result, recorder = run(strategy, client, rounds=3)
    assert [event["round"] for event in recorder.of("round-skipped")] == [2]
    expected, _ = run(FedAvgM(fraction_evaluate=0.0), rounds=2)
    assert_same(result.arrays, expected.arrays)


def test_too_many_rounds_without_quorum_stop_the_run():
    def client(message, node):
        return drifting_client(message, node) if NAMES[node] == "0" else Message(
            Error(code=1, reason="offline"), reply_to=message)  # fmt: skip

    with pytest.raises(RoundError, match="3 rounds in a row had no quorum"):
        run(client=client, rounds=9)


def test_deadline_closes_a_round_that_has_its_quorum():
    grid = FakeGrid(NAMES, drifting_client, lambda m, node: None if NAMES[node] == "10" else 0.0, NAMES)
    options = LoopOptions(min_nodes=1, deadline=0.2, round_timeout=30, poll_interval=0.001)
    started = time.monotonic()
    result, recorder = run(grid=grid, rounds=1, options=options)
    assert time.monotonic() - started < 5
    (dropped,) = recorder.of("node-dropped")
    assert dropped["node"] == "10"
    assert "no reply within" in dropped["reason"]
    assert recorder.of("aggregated")[0]["replies"] == 4
    assert result.arrays


def test_a_round_waits_past_its_deadline_for_the_quorum():
    grid = FakeGrid(NAMES, drifting_client, lambda m, node: 0.3 if NAMES[node] in "012" else None, NAMES)
    options = LoopOptions(min_nodes=1, deadline=0.05, round_timeout=30, poll_interval=0.001)
    _, recorder = run(grid=grid, rounds=1, options=options)
    assert recorder.of("aggregated")[0]["replies"] == 3


def test_late_replies_do_not_leak_into_the_next_round():
    slow = {"first": True}

    def delay(message, node):
        if NAMES[node] == "10" and slow.pop("first", False):
            return 0.25
        return 0.0

    grid = FakeGrid(NAMES, drifting_client, delay, NAMES)
    options = LoopOptions(min_nodes=1, deadline=0.1, round_timeout=30, poll_interval=0.001)

    def wait(server_round, arrays, result):
        time.sleep(0.3)

    _, recorder = run(grid=grid, rounds=2, options=options, after_round=wait)
    assert [event["replies"] for event in recorder.of("aggregated")] == [4, 5]
    assert not grid._due


# ------------------------------------------------------------------ nodes


def test_too_few_nodes_is_an_error_that_says_how_many():
    options = LoopOptions(min_nodes=9, node_timeout=0.3)
    with pytest.raises(
        PlanError, match=r"5 usable nodes after 0.3 s, expected at least 9 \(server.min-nodes\)"
    ):
        run(options=options)


def test_nodes_that_come_late_are_waited_for_and_described_once():
    grid = FakeGrid([7], drifting_client, names=NAMES)
    original, calls = grid.get_node_ids, []

    def growing():
        calls.append(1)
        if len(calls) == 3:
            grid.nodes = list(NAMES)
        return original()

    grid.get_node_ids = growing
    _, recorder = run(grid=grid, options=LoopOptions(min_nodes=5, node_timeout=10, poll_interval=0.001))
    assert sorted(event["node"] for event in recorder.of("node-joined")) == sorted(NAMES.values())
    assert recorder.of("waiting-for-nodes")[0] | {"time": 0} == {
        "event": "waiting-for-nodes", "time": 0, "have": 1, "need": 5}  # fmt: skip


def test_two_nodes_of_one_name():
    grid = FakeGrid([1, 2, 3], drifting_client, names={1: "a", 2: "a", 3: "b"})
    _, recorder = run(grid=grid, rounds=1)
    (rejected,) = recorder.of("node-rejected")
    assert "named 'a'" in rejected["reason"]
    assert recorder.of("aggregated")[0]["asked"] == 2


def test_a_node_that_reports_an_error_is_named(monkeypatch):
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    describe = grid._describe

    def broken(message, node):
        reply = describe(message, node)
        if NAMES[node] == "3":
            reply.content["config"]["error"] = "data.csv has no column 'text'"
        return reply

    grid._describe = broken
    with pytest.raises(PlanError, match=r"1 rejected: node 3: data.csv has no column 'text'"):
        run(grid=grid, options=LoopOptions(min_nodes=5, node_timeout=0.2))


def test_a_node_of_another_version_is_refused_with_both_versions_named():
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    describe = grid._describe

    def newer(message, node):
        reply = describe(message, node)
        if NAMES[node] == "3":
            reply.content["config"]["version"] = "9.9.9"
        elif NAMES[node] == "2":
            reply.content["config"]["version"] = __version__
        return reply

    grid._describe = newer
    _, recorder = run(grid=grid, rounds=1)
    (rejected,) = recorder.of("node-rejected")
    assert rejected["node"] == "3"
    assert "the node has fedllm 9.9.9, the server " + __version__ in rejected["reason"]
    assert recorder.of("aggregated")[0]["asked"] == 4


def test_a_node_with_other_weights_of_the_base_model_is_refused_with_both_versions_named():
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    describe = grid._describe
    told = {"1": "weights 0123", "2": "weights abcd"}  # the other nodes tell nothing

    def with_model(message, node):
        reply = describe(message, node)
        if NAMES[node] in told:
            reply.content["config"]["model-version"] = told[NAMES[node]]
        return reply

    grid._describe = with_model
    _, recorder = run(grid=grid, rounds=1, options=replace(FAST, model_version="weights 0123"))
    (rejected,) = recorder.of("node-rejected")
    assert rejected["node"] == "2"
    assert "weights abcd" in rejected["reason"]
    assert "weights 0123" in rejected["reason"]
    assert recorder.of("aggregated")[0]["asked"] == 4


def test_nodes_that_can_unpack_get_one_array_and_the_result_is_the_same():
    arrays_seen = {}

    def unpacking(message, node):
        arrays_seen.setdefault(NAMES[node], set()).add(len(message.content["arrays"]))
        if NAMES[node] == "2":
            return drifting_client(message, node)
        message = deepcopy(
            message
        )  # messages share their content, as only they do that are not sent anywhere
        unpack(message.content)
        reply = drifting_client(message, node)
        return Message(pack(reply.content), reply_to=message)

    grid = FakeGrid(NAMES, unpacking, names=NAMES)
    describe = grid._describe

    def describe_packing(message, node):
        reply = describe(message, node)
        if NAMES[node] != "2":  # a node that does not say that it can
            reply.content["config"][PACKED] = True
        return reply

    grid._describe = describe_packing
    result, recorder = run(FedAdam(fraction_evaluate=0.0), grid=grid)
    expected, plain = run(FedAdam(fraction_evaluate=0.0))
    assert_same(result.arrays, expected.arrays)
    several = {len(initial_arrays())}
    assert arrays_seen == {name: several if name == "2" else {1} for name in NAMES.values()}
    bytes_of = [(e["node"], e["bytes_up"], e["bytes_down"]) for e in recorder.of("node-replied")]
    assert bytes_of == [(e["node"], e["bytes_up"], e["bytes_down"]) for e in plain.of("node-replied")]


def test_a_packed_reply_that_cannot_be_read_is_dropped():
    def broken(message, node):
        reply = drifting_client(message, node)
        if NAMES[node] == "2":
            array = Array("uint8", (3,), "fedllm.packed", b"bad")
            reply.content["arrays"] = ArrayRecord({"packed": array})
        return reply

    _, recorder = run(client=broken, rounds=1)
    (dropped,) = recorder.of("node-dropped")
    assert (dropped["node"], dropped["kind"]) == ("2", "invalid")
    assert "cannot be unpacked" in dropped["reason"]


def test_works_with_clients_that_cannot_describe_themselves():
    result, _ = run(grid=FakeGrid(NAMES, drifting_client))
    expected, _ = run()
    for name, value in numbers(expected.arrays).items():
        np.testing.assert_allclose(result.arrays[name].numpy(), value, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ memory


def test_memory_does_not_grow_with_the_cohort():
    """Two hundred replies of 1 MB need no more memory than forty."""

    def peak(clients):
        def client(message, node):
            values = np.full((256, 1024), node, dtype=np.float32)
            return reply_with(message, ArrayRecord({"w": Array(values)}))

        class Lazy(FakeGrid):
            """Makes a reply when it is pulled: what the server holds is the loop's doing."""

            def push_messages(self, messages):
                ids = super().push_messages([])
                for message in messages:
                    self._count += 1
                    message.metadata.__dict__["_message_id"] = f"m{self._count}"
                    ids.append(f"m{self._count}")
                    self._due[f"m{self._count}"] = message
                return ids

            def pull_messages(self, message_ids):
                wanted = [i for i in message_ids if i in self._due]
                found = [self._due.pop(i) for i in wanted]
                return [
                    self._describe(m, 0) if m.metadata.message_type == "query.describe"
                    else self.client(m, m.metadata.dst_node_id) for m in found
                ]  # fmt: skip

        grid = Lazy(range(1, clients + 1), client)
        options = LoopOptions(min_nodes=1, spool_bytes=4 * 2**20, poll_interval=0.0001)
        initial = ArrayRecord({"w": Array(np.zeros((256, 1024), dtype=np.float32))})
        tracemalloc.start()
        try:
            result, _ = run(grid=grid, rounds=1, options=options, initial=initial)
            assert result.arrays["w"].numpy()[0, 0] == pytest.approx((clients + 1) / 2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(40), peak(200)
    assert large < 30 * 2**20
    assert large - small < 2 * 2**20


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("strategy", [FedAvg, FedAvgM, FedAdam, FedYogi])
def test_resume_is_bit_identical(tmp_path, strategy):
    whole, _ = run(strategy(fraction_train=0.6, fraction_evaluate=0.4), rounds=6)
    store = CheckpointStore(tmp_path, "f")
    run(strategy(fraction_train=0.6, fraction_evaluate=0.4), rounds=3, checkpoints=store)
    resumed, recorder = run(
        strategy(fraction_train=0.6, fraction_evaluate=0.4), rounds=6, checkpoints=store, resume=True
    )
    assert recorder.of("run-resumed")[0]["round"] == 3
    assert_same(whole.arrays, resumed.arrays)
    assert whole.train_metrics_clientapp == resumed.train_metrics_clientapp
    assert whole.evaluate_metrics_clientapp == resumed.evaluate_metrics_clientapp


def test_resume_without_any_checkpoint_starts_over_and_says_so(tmp_path):
    result, recorder = run(checkpoints=CheckpointStore(tmp_path, "f"), resume=True)
    assert "starts from round 1" in recorder.of("warning")[0]["message"]
    assert_same(result.arrays, run()[0].arrays)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    store = CheckpointStore(tmp_path, "f")
    run(rounds=3, checkpoints=store)
    broken = tmp_path / "round-000003" / "arrays.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        result, recorder = run(rounds=4, checkpoints=store, resume=True)
    assert "round-000003 is damaged" in caplog.text
    assert recorder.of("run-resumed")[0]["round"] == 2
    assert_same(result.arrays, run(rounds=4)[0].arrays)


def test_no_usable_checkpoint_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path, "f")
    run(rounds=2, checkpoints=store)
    for state in tmp_path.glob("*/state.json"):
        state.write_text("{")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        run(rounds=3, checkpoints=store, resume=True)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    run(rounds=2, checkpoints=CheckpointStore(tmp_path, "one"))
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run(rounds=3, checkpoints=CheckpointStore(tmp_path, "two"), resume=True)


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, "f")
    original = CheckpointStore._write

    def write(self, folder, state):
        if state.round == 2:
            (folder / "arrays.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, folder, state)

    monkeypatch.setattr(CheckpointStore, "_write", write)
    result, recorder = run(rounds=2, checkpoints=store)
    assert "No space left" in recorder.of("checkpoint-failed")[0]["reason"]
    assert store.latest()[0].round == 1
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
    assert_same(result.arrays, run(rounds=2)[0].arrays)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(rounds=5, checkpoints=CheckpointStore(tmp_path, "f", keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000004", "round-000005"]


def test_events_are_json_and_complete(tmp_path):
    _, recorder = run(FedAvg(fraction_evaluate=1.0), rounds=2, checkpoints=CheckpointStore(tmp_path, "f"))
    json.dumps(recorder.events)
    kinds = [event["event"] for event in recorder.events if event.get("round") == 2]
    assert kinds[0] == "round-started"
    assert kinds.count("node-replied") == 10
    assert kinds[-3:] == ["evaluated", "checkpointed", "round-finished"]
    replied = recorder.of("node-replied")[0]
    assert replied["bytes_up"] > 0
    assert replied["bytes_down"] > 0
    assert replied["num_examples"] >= 15


def test_a_node_that_never_describes_itself_delays_the_start_only():
    class Mute(FakeGrid):
        def push_messages(self, messages):
            messages = list(messages)
            ids = super().push_messages(messages)
            for message in messages:
                if message.metadata.message_type == "query.describe" and message.metadata.dst_node_id == 23:
                    del self._due[message.metadata.message_id]
            return ids

    grid = Mute(NAMES, drifting_client, names=NAMES)
    started = time.monotonic()
    options = LoopOptions(min_nodes=2, node_timeout=0.5, poll_interval=0.001)
    _, recorder = run(grid=grid, rounds=3, options=options)
    assert time.monotonic() - started < 2
    assert "1 nodes did not describe themselves" in recorder.of("warning")[0]["message"]
    assert [event["asked"] for event in recorder.of("aggregated")] == [4, 4, 4]


def test_a_node_that_joins_during_the_run_takes_part():
    grid = FakeGrid([11, 7], drifting_client, names=NAMES)

    def join(server_round, arrays, result):
        grid.nodes = [11, 7, 5]

    _, recorder = run(grid=grid, rounds=4, after_round=join)
    assert [event["asked"] for event in recorder.of("aggregated")] == [2, 3, 3, 3]


def test_a_node_that_leaves_is_not_asked_any_more():
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)

    def leave(server_round, arrays, result):
        grid.nodes = [11, 7, 5]

    _, recorder = run(grid=grid, rounds=2, after_round=leave)
    assert [event["asked"] for event in recorder.of("aggregated")] == [5, 3]


def test_a_model_keeps_its_dtypes_from_round_to_round():
    """A stock app's float64 weights and the counters of its normalisation layers."""

    def client(message, node):
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        return reply_with(
            message, ArrayRecord({name: Array(np.asarray(value + 1)) for name, value in arrays.items()})
        )

    initial = ArrayRecord({"w": Array(np.full(3, 0.1)), "seen": Array(np.array(5))})
    result, recorder = run(client=client, rounds=3, initial=initial)
    assert not recorder.of("node-dropped")
    assert result.arrays["w"].numpy() == pytest.approx(3.1, abs=1e-12)
    assert result.arrays["seen"].numpy() == 8
    assert (result.arrays["w"].dtype, result.arrays["seen"].dtype) == ("float64", "int64")


def test_evaluation_is_weighed_by_the_strategys_own_key():
    def client(message, node):
        metrics = MetricRecord({"tokens": 1 + node, "loss": float(node)})
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({"m": metrics}), reply_to=message)
        return Message(RecordDict({"arrays": message.content["arrays"], "m": metrics}), reply_to=message)

    result, recorder = run(FedAvg(weighted_by_key="tokens"), client, rounds=1)
    assert not recorder.of("node-dropped")
    expected = sum((1 + node) * node for node in NAMES) / sum(1 + node for node in NAMES)
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(expected)


def odd_form(kind):
    def client(message, node):
        good = drifting_client(message, node)
        if NAMES[node] == "1":
            if kind == "metric":
                good.content["metrics"]["more"] = 1.0
            elif kind == "list":
                good.content["metrics"]["loss"] = [1.0, 2.0]
            elif kind == "record":
                good.content["more"] = initial_arrays()
            elif kind == "codec":
                return reply_with(message, encode(decode(good.content["arrays"]), "bf16"))
        return good

    return client


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("kind", ["metric", "list", "record", "codec"])
def test_replies_on_which_flowers_strategies_would_raise(kind, order):
    random.seed(order)  # Flower samples with the global generator; node 1 comes first, last and between
    _, recorder = run(flower.FedAvg(fraction_evaluate=0.0), client=odd_form(kind), rounds=1)
    assert [event["node"] for event in recorder.of("node-dropped")] == ["1"]
    assert recorder.of("aggregated")


def test_a_stock_strategy_does_not_wait_for_ever_either():
    options = LoopOptions(min_nodes=1, node_timeout=0.3, poll_interval=0.001)
    with pytest.raises(PlanError, match="expected at least 9"):
        run(flower.FedAvg(min_train_nodes=9), options=options)


@pytest.mark.parametrize(
    "description",
    [
        {"name": "1" * 5000},
        {"num-examples": float("nan")},
        {"num-examples": -1},
        {"label-names": ["x" * 30_000]},
    ],
)
def test_a_description_cannot_harm_the_server(description):
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    describe = grid._describe

    def odd(message, node):
        reply = describe(message, node)
        if NAMES[node] == "3":
            for key, value in description.items():
                reply.content["config"][key] = value
        return reply

    grid._describe = odd
    _, recorder = run(grid=grid, rounds=1)
    assert len(recorder.of("node-rejected")) == 1
    assert recorder.of("aggregated")[0]["asked"] == 4


def test_a_rejected_node_is_asked_again_later():
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    describe, broken = grid._describe, {"now": True}

    def once(message, node):
        reply = describe(message, node)
        if NAMES[node] == "3" and broken.pop("now", False):
            reply.content["config"]["error"] = "disk not mounted"
        return reply

    grid._describe = once
    options = LoopOptions(min_nodes=1, node_timeout=0.05, poll_interval=0.001)

    def wait(server_round, arrays, result):
        time.sleep(0.06)

    _, recorder = run(grid=grid, rounds=4, options=options, after_round=wait)
    assert [event["asked"] for event in recorder.of("aggregated")][-1] == 5


def test_a_node_that_goes_away_does_not_end_a_run_that_needed_it_to_start():
    grid = FakeGrid(NAMES, drifting_client, names=NAMES)
    options = LoopOptions(min_nodes=5, node_timeout=0.3, poll_interval=0.001)

    def leave(server_round, arrays, result):
        grid.nodes = [11, 7, 5]

    _, recorder = run(grid=grid, rounds=3, options=options, after_round=leave)
    assert [event["asked"] for event in recorder.of("aggregated")] == [5, 3, 3]


def test_one_failing_client_alone_in_a_round_is_not_the_end():
    failed = {"first": True}

    def client(message, node):
        if failed.pop("first", False):
            return Message(Error(code=1, reason="CUDA out of memory"), reply_to=message)
        return drifting_client(message, node)

    _, recorder = run(FedAvg(fraction_train=0.2, fraction_evaluate=0.0), client, rounds=3)
    assert len(recorder.of("round-skipped")) == 1
    assert len(recorder.of("aggregated")) == 2


def test_messages_do_not_outlive_their_round():
    seen = []
    grid = FakeGrid(NAMES, lambda m, n: seen.append(m.metadata.ttl) or drifting_client(m, n), names=NAMES)
    run(grid=grid, rounds=1, options=LoopOptions(min_nodes=1, round_timeout=50, deadline=40))
    assert set(seen) == {50}


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    (tmp_path / ".round-000007.99999").mkdir()
    run(rounds=1, checkpoints=CheckpointStore(tmp_path, "f"))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]


def test_strategy_state_of_every_kind_is_kept_or_named(tmp_path):
    state = {
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "number": np.float32(2),
        "list": [torch.zeros(1), "a", None],
    }
    store = CheckpointStore(tmp_path, "f")
    store.save(ServerState(1, initial_arrays(), state, {}))
    back = store.latest()[0].strategy
    assert torch.equal(back["bf16"], state["bf16"])
    assert back["number"] == 2
    assert back["list"][1:] == ["a", None]
    with pytest.raises(CheckpointError, match=r"a set at '/odd'"):
        store.save(ServerState(2, initial_arrays(), {"odd": {1}}, {}))


def test_a_long_reason_reaches_the_log_whole():
    reason = "the worker at " + "x" * 300 + " ran out of memory"

    def client(message, node):
        if node == 7:
            return Message(Error(code=1, reason=reason), reply_to=message)
        return drifting_client(message, node)

    _, recorder = run(
        client=client, rounds=1, options=LoopOptions(min_nodes=1, quorum=0.5, poll_interval=0.001)
    )
    (dropped,) = recorder.of("node-dropped")
    assert dropped["reason"] == reason
