"""Server and clients together, in one process: the real client functions behind a grid in memory."""

import csv
import json
from copy import deepcopy

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fedllm import client, registry, server
from fedllm.errors import CheckpointError, ConfigError, PlanError, RoundError
from fedllm.events import read_events
from fedllm.models import ModelBundle, load_bundle
from fedllm.nodes import DESCRIBE
from fedllm.packing import pack, unpack
from fedllm.records import decode, encode
from fedllm.report import load_run
from tests.fakes import FakeGrid

WORDS = {"sport": "ball goal team match", "food": "bread soup salt fish", "sky": "moon star cloud rain"}
NODES = {31: 0, 8: 1, 55: 2}


class ClientGrid(FakeGrid):
    """Every node answers with fedllm's own client code."""

    def __init__(self, flat, node_config=None, nodes=NODES):
        super().__init__(nodes, self.receive)
        self.flat = flat
        self.node_config = node_config or (
            lambda node: {"partition-id": nodes[node], "num-partitions": len(nodes)}
        )

    def context(self, node):
        return Context(
            run_id=1,
            node_id=node,
            node_config=self.node_config(node),
            state=RecordDict(),
            run_config=self.flat,
        )

    def receive(self, message, node):
        """Every node gets a copy of its own, as over a network; arrays are packed on the way and nowhere else."""
        message = deepcopy(message)
        was_packed = unpack(message.content)
        reply = self.answer(message, node)
        return Message(pack(reply.content), reply_to=message) if was_packed and reply.has_content() else reply

    def answer(self, message, node):
        function = {"train": client.train, "evaluate": client.evaluate}[message.metadata.message_type]
        try:
            return function(message, self.context(node))
        except Exception as error:
            # What Flower makes of an exception in a ClientApp.
            return Message(Error(code=1, reason=f"Traceback …\n{error}"), reply_to=message)

    def _describe(self, message, node):
        assert message.metadata.message_type == DESCRIBE
        return client.describe(message, self.context(node))


def write_rows(path, start, count):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(start, start + count):
            label = list(WORDS)[index % 3]
            pool = WORDS[label].split()
            writer.writerow([f"{pool[index % 4]} {pool[(index // 4) % 4]} number {index}", label])
    return path


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)  # tests keep to one thread
    source = write_rows(tmp_path / "train.csv", 0, 120)
    return {
        "model.name": "tiny-random:bert",
        "lora.rank": 4,
        "data.source": str(source),
        "data.test-fraction": 0.2,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.learning-rate": 1e-2,
        "train.batch-size": 8,
        "train.local-steps": 4,
        "rounds": 2,
        "server.min-nodes": 3,
        "server.node-timeout": 5.0,
        "run.root": str(tmp_path / "runs"),
        "run.name": "r",
    }


def run(flat, **changes):
    flat = {**flat, **{key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}}
    return server.run(ClientGrid(flat), flat)


def test_a_run_learns_and_leaves_its_folder(flat, tmp_path):
    result = run(flat, rounds=5, train__local_steps=20, server__fraction_evaluate=1.0)
    first, last = result.evaluate_metrics_serverapp[0], result.evaluate_metrics_serverapp[5]
    assert last["loss"] < first["loss"] - 0.05
    assert "num-examples" not in last
    assert set(result.evaluate_metrics_clientapp[5]) >= {"accuracy", "macro-f1", "loss"}
    folder = tmp_path / "runs" / "r"
    for name in (
        "config.json",
        "events.jsonl",
        "metrics.csv",
        "curves.png",
        "report.html",
        "adapter",
        "best",
    ):
        assert (folder / name).exists(), name
    history = load_run(folder)
    assert history.node_totals()["2"].replied == 5
    joined = [event for event in read_events(folder / "events.jsonl") if event["event"] == "node-joined"]
    assert [event["num_examples"] for event in joined] == [32, 32, 32]
    assert "label_counts" not in joined[0]


def test_label_counts_are_told_only_if_allowed(flat, tmp_path):
    run(flat, rounds=1, data__share_label_counts=True)
    joined = [e for e in read_events(tmp_path / "runs/r/events.jsonl") if e["event"] == "node-joined"]
    assert sum(joined[0]["label_counts"]) == 32


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_lossy_uploads_end_near_the_lossless_run(flat, codec):
    exact = decode(run(flat, run__name="exact").arrays)
    lossy = decode(run(flat, run__name=codec, wire__upload_codec=codec, wire__download_codec="bf16").arrays)
    start = decode(encode(load_bundle(registry.config_from_flat(flat), tuple(sorted(WORDS))).initial_state))
    moved = torch.sqrt(sum((exact[k] - start[k]).square().sum() for k in exact))
    error = torch.sqrt(sum((exact[k] - lossy[k]).square().sum() for k in exact))
    assert 0 < error < 0.2 * moved


def test_uploads_shrink_with_the_codec(flat, tmp_path):
    def bytes_up(name):
        replies = [
            e for e in read_events(tmp_path / "runs" / name / "events.jsonl") if e["event"] == "node-replied"
        ]
        return replies[0]["bytes_up"]

    run(flat, run__name="exact", rounds=1)
    run(flat, run__name="small", rounds=1, wire__upload_codec="int8")
    # Tiny arrays of rank 4: scales and headers weigh more here than in a real adapter.
    assert bytes_up("small") < 0.4 * bytes_up("exact")


def test_an_existing_run_is_not_overwritten(flat):
    run(flat, rounds=1)
    with pytest.raises(
        ConfigError, match=r"already holds a run; choose another name, or set run.resume=true"
    ):
        run(flat, rounds=1)


def test_resume_goes_on_with_the_same_bits(flat):
    whole = run(flat, rounds=4, run__name="whole", strategy="fedyogi")
    run(flat, rounds=2, run__name="cut", strategy="fedyogi")
    resumed = run(flat, rounds=4, run__name="cut", strategy="fedyogi", run__resume=True)
    left, right = decode(whole.arrays), decode(resumed.arrays)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_failed_run_says_so_in_its_events(flat, tmp_path):
    with pytest.raises(PlanError, match="3 usable nodes"):
        run(flat, server__min_nodes=4, server__node_timeout=0.3)
    last = read_events(tmp_path / "runs/r/events.jsonl")[-1]
    assert last["event"] == "run-failed"
    assert "expected at least 4" in last["reason"]


def test_nodes_with_files_of_their_own(flat, tmp_path):
    files = {node: str(write_rows(tmp_path / f"node{i}.csv", 50 * i, 20 + i)) for i, node in enumerate(NODES)}
    flat |= {"data.labels": "food,sky,sport", "rounds": 1}
    grid = ClientGrid(flat, lambda node: {"data-file": files[node], "name": f"hospital-{NODES[node]}"})
    server.run(grid, flat)
    joined = {
        event["node"]: event["num_examples"]
        for event in read_events(tmp_path / "runs/r/events.jsonl")
        if event["event"] == "node-joined"
    }
    assert joined == {"hospital-0": 20, "hospital-1": 21, "hospital-2": 22}


def test_a_node_with_an_unreadable_file_is_named_before_training(flat, tmp_path):
    good = str(write_rows(tmp_path / "good.csv", 0, 30))
    (tmp_path / "bad.csv").write_text("txt,label\nhello,food\n")
    flat |= {"data.labels": "food,sky,sport", "rounds": 1, "server.min-nodes": 2}
    grid = ClientGrid(
        flat, lambda node: {"data-file": str(tmp_path / "bad.csv") if node == 8 else good, "name": f"n{node}"}
    )
    server.run(grid, flat)
    (rejected,) = [e for e in read_events(tmp_path / "runs/r/events.jsonl") if e["event"] == "node-rejected"]
    assert rejected["node"] == "n8"
    assert "bad.csv" in rejected["reason"]
    assert "'text'" in rejected["reason"]


def test_a_node_without_partition_or_file_is_told_what_it_lacks(flat):
    grid = ClientGrid(flat, lambda node: {})
    with pytest.raises(PlanError, match=r"no 'partition-id' in its --node-config"):
        server.run(grid, {**flat, "server.node-timeout": 0.3})


def test_the_client_takes_an_adapter_of_another_rank_but_none_that_contradicts_itself(flat):
    """A server may plan another rank than the configuration's; the reply has the rank that was sent."""
    grid = ClientGrid(flat)
    config = registry.config_from_flat({**flat, "lora.rank": 2})
    state = load_bundle(config, tuple(sorted(WORDS))).initial_state
    request = ConfigRecord(
        {
            "server-round": 1,
            "seed": 0,
            "client": "backprop",
            "client-parameters": "{}",
            "upload-codec": "fp32",
        }
    )

    def answer(arrays):
        message = Message(RecordDict(), dst_node_id=31, message_type="train")
        message.content = RecordDict({"arrays": encode(arrays), "config": request})
        return grid.answer(message, 31)

    reply = decode(answer(state).content["arrays"])
    assert {name: t.shape for name, t in reply.items()} == {name: t.shape for name, t in state.items()}
    first = next(iter(state))
    broken = answer({**state, first: state[first][:1]})
    assert broken.has_error()
    assert "rank 1, expected rank 2" in broken.error.reason


def test_the_saved_configuration_reads_back(flat, tmp_path):
    run(flat, rounds=1)
    saved = json.loads((tmp_path / "runs/r/config.json").read_text())
    assert registry.config_from_flat(saved).train.local_steps == 4


def test_a_resume_that_is_refused_leaves_the_configuration_alone(flat, tmp_path):
    run(flat, rounds=1)
    before = (tmp_path / "runs/r/config.json").read_bytes()
    with pytest.raises(CheckpointError, match="another configuration"):
        run(flat, rounds=2, lora__rank=2, run__resume=True)
    assert (tmp_path / "runs/r/config.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"run.name is empty"):
        run(flat, run__name="", run__resume=True)


def test_best_is_chosen_by_one_metric_of_one_place(flat, tmp_path, monkeypatch):
    accuracies = iter([0.1, 0.9, 0.5, 0.7])

    def evaluate(self, server_round, arrays):
        return MetricRecord({"accuracy": next(accuracies), "loss": 1.0})

    monkeypatch.setattr(server._Run, "_evaluate", evaluate)
    saved = []
    original = ModelBundle.save_adapter

    def save(self, folder, state=None):
        saved.append(folder.name)
        original(self, folder, state)

    monkeypatch.setattr(ModelBundle, "save_adapter", save)
    run(flat, rounds=3, server__fraction_evaluate=1.0)
    assert saved == ["adapter", "best", "adapter", "adapter", "adapter"]


def test_best_can_be_chosen_by_macro_f1(flat, tmp_path, monkeypatch):
    measured = iter([(0.1, 0.1), (0.5, 0.6), (0.9, 0.3)])

    def evaluate(self, server_round, arrays):
        accuracy, f1 = next(measured)
        return MetricRecord({"accuracy": accuracy, "macro-f1": f1})

    monkeypatch.setattr(server._Run, "_evaluate", evaluate)
    saved = []
    monkeypatch.setattr(
        ModelBundle, "save_adapter", lambda self, folder, state=None: saved.append(folder.name)
    )
    run(flat, rounds=2, evaluation__best="macro-f1")
    assert saved == ["adapter", "best", "adapter", "adapter"]


def test_a_run_that_fails_late_leaves_adapter_and_report(flat, tmp_path):
    grid = ClientGrid(flat)
    answer = grid.client

    def failing(message, node):
        if message.content["config"]["server-round"] == 2:
            return Message(Error(code=1, reason="CUDA out of memory"), reply_to=message)
        return answer(message, node)

    grid.client = failing
    with pytest.raises(RoundError, match="every client failed"):
        server.run(grid, {**flat, "rounds": 4})
    folder = tmp_path / "runs/r"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert "every client failed" in (folder / "report.html").read_text()
