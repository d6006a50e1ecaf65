import builtins
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedllm.events
from fedllm.errors import FedLLMError
from fedllm.events import EventBus, JsonlSink, LogSink, read_events, to_jsonable
from fedllm.history import RunHistory
from fedllm.narration import format_bytes, format_seconds, format_value, natural_key, printable, summary_line
from fedllm.sinks import TensorBoardSink
from tests.sample_run import Script, finished_run


class Recorder:
    def __init__(self):
        self.events, self.closed = [], False

    def emit(self, event):
        self.events.append(event)

    def close(self):
        self.closed = True


class Broken(Recorder):
    def emit(self, event):
        super().emit(event)
        raise OSError("disk full")


# ---- the bus


def test_event_has_name_time_and_fields(monkeypatch):
    monkeypatch.setattr(fedllm.events.time, "time", lambda: 12.5)
    sink = Recorder()
    with EventBus([sink]) as bus:
        event = bus.emit("round-finished", round=3, seconds=1.5)
    assert event == {"event": "round-finished", "time": 12.5, "round": 3, "seconds": 1.5}
    assert sink.events == [event]
    assert sink.closed


def test_values_become_json():
    fields = {
        "tensor": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16, requires_grad=True),
        "scalar": torch.tensor(3),
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "infinite": float("inf"),
        "nested": {"a": (np.int64(1), -float("inf")), 2: {"x", "w"}},
        "path": Path("a/b"),
        "none": None,
        "flag": True,
        "bytes": b"x",
        "keys": {"k": 1}.keys(),
    }
    value = to_jsonable(fields)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value == {
        "tensor": [1.0, None],
        "scalar": 3,
        "numpy": 0.5,
        "array": [0, 1],
        "infinite": None,
        "nested": {"a": [1, None], "2": ["w", "x"]},
        "path": "a/b",
        "none": None,
        "flag": True,
        "bytes": "b'x'",
        "keys": ["k"],
    }
    assert value["flag"] is True


def test_broken_sink_is_reported_once_and_the_others_go_on(caplog):
    broken, good = Broken(), Recorder()
    bus = EventBus([broken, good])
    for number in range(3):
        bus.emit("round-finished", round=number, seconds=1.0)
    bus.close()
    assert len(broken.events) == 1
    assert broken.closed
    assert len(good.events) == 3
    reports = [record for record in caplog.records if "Broken" in record.getMessage()]
    assert len(reports) == 1
    assert "disk full" in caplog.text


def test_sink_that_fails_to_close_does_not_keep_others_open(caplog):
    class Stuck(Recorder):
        def close(self):
            raise OSError("stuck")

    good = Recorder()
    EventBus([good, Stuck()]).close()
    assert good.closed
    assert "Stuck failed to close" in caplog.text


# ---- the file


def test_file_is_readable_after_every_event_and_appended_to(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    sink = JsonlSink(path)
    for number in range(2):
        sink.emit({"event": "x", "time": 1.0, "node": "knøten\u2028\ud800", "round": number})
        assert [event["round"] for event in read_events(path)] == list(range(number + 1))
    sink.close()
    again = JsonlSink(path)
    again.emit({"event": "y", "time": 2.0})
    again.close()
    assert [event["event"] for event in read_events(path)] == ["x", "x", "y"]
    assert read_events(path)[0]["node"] == "knøten\u2028\ud800"


def test_torn_last_line_is_not_read_and_cut_off_on_resume(tmp_path, caplog):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a", "time": 1.0}\n{"event": "b", "ti')
    assert [event["event"] for event in read_events(path)] == ["a"]
    sink = JsonlSink(path)
    sink.emit({"event": "c", "time": 2.0})
    sink.close()
    assert [event["event"] for event in read_events(path)] == ["a", "c"]
    assert "unfinished line" in caplog.text


@pytest.mark.parametrize("line", ["{broken", "3", "[]", '{"event": "a"}', ""])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"event": "a", "time": 1.0}}\n{line}\n{{"event": "b", "time": 2.0}}\n')
    with pytest.raises(FedLLMError, match=r"events\.jsonl, line 2: expected a JSON object"):
        read_events(path)


def test_missing_file_and_unusable_folder_are_named(tmp_path):
    with pytest.raises(FedLLMError, match=r"cannot read events from .*none\.jsonl"):
        read_events(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(FedLLMError, match=r"cannot write events to .*file/events\.jsonl"):
        JsonlSink(tmp_path / "file" / "events.jsonl")


# ---- lines for people


def test_round_line():
    script = Script()
    script.start(rounds=10)
    script.round(
        3, [f"node-{i}" for i in range(5)], loss=0.412, metrics={"accuracy": 0.8612, "loss": 0.4}, seconds=6.3
    )
    lines = [summary_line(RunHistory.of(script.events), event) for event in script.events]
    assert (
        lines[0] == "run sample: fedavg with backprop clients, 10 rounds, 1,000 trained parameters (4.0 kB)"
    )
    assert lines[1:-1] == [None] * (len(lines) - 2)
    assert lines[-1] == "round 3/10: 5 of 5 clients, loss 0.412, accuracy 0.861, 10 MB up, 6.3 s"


def test_log_sink_writes_one_line_a_round_and_warns_of_drops(caplog):
    sink = LogSink(logging.getLogger("fedllm.test"))
    with caplog.at_level(logging.INFO, "fedllm.test"):
        for event in finished_run().events:
            sink.emit(event)
    sink.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if re.match(r"round \d/3: ", message)]) == 3
    assert "round 2/3: 2 of 3 clients, loss 0.500, accuracy 0.800, 4.0 MB up, 10.0 s" in messages
    drop = next(record for record in caplog.records if "dropped" in record.getMessage())
    assert drop.levelno == logging.WARNING
    assert drop.getMessage() == "round 2: client node-2 dropped (train): loss is NaN"
    assert messages[-1] == "finished 3 rounds in 30.0 s, accuracy 0.700"


def test_lines_cannot_forge_log_lines_or_colours():
    event = {"event": "node-rejected", "time": 1.0, "node": "a\nERROR all lost\x1b[31m", "reason": "{0} twin"}
    line = summary_line(RunHistory(), event)
    assert line == "client a�ERROR all lost�[31m rejected: {0} twin"
    assert len(printable("x" * 10_000)) == 200


def test_skipped_round_has_one_line():
    script = Script()
    script.start()
    script.add("round-started", round=1, nodes=["a"])
    skipped = script.add("round-skipped", round=1, reason="0 of 1 replies")
    finished = script.add("round-finished", round=1, seconds=1.0)
    history = RunHistory.of(script.events)
    assert summary_line(history, skipped) == "round 1 skipped: 0 of 1 replies"
    assert summary_line(history, finished) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_100_000, "2.1 MB"),
        (14.4e9, "14 GB"),
        (3e12, "3.0 TB"),
    ],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.24, "0.24 s"),
        (6.3, "6.3 s"),
        (59.99, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (0.41249, "0.412"),
        (1e-5, "1.0e-05"),
        (1234.56, "1,234.6"),
        (-3.5, "-3.500"),
    ],
)
def test_value(value, text):
    assert format_value(value) == text


def test_natural_order():
    names = ["node-10", "node-2", "10", "9", "alpha", "", "node-²"]
    assert sorted(names, key=natural_key) == ["", "9", "10", "alpha", "node-2", "node-10", "node-²"]


# ---- the history


def test_resumed_run_keeps_the_last_version_of_a_round():
    script, nodes = Script(), ["a", "b"]
    script.start()
    script.join(nodes)
    script.round(1, nodes, loss=3.0)
    script.round(2, nodes, loss=2.0)
    script.add("round-started", round=3, nodes=nodes)
    script.reply(3, "a", loss=99.0)
    script.start(first_round=3)
    script.add("run-resumed", round=2, path="checkpoints/2")
    resumed = RunHistory.of(script.events)
    assert sorted(resumed.rounds) == [1, 2]
    script.round(3, nodes, loss=1.0)
    script.finish()
    history = RunHistory.of(script.events)
    assert [record.train_loss for record in history.closed_rounds] == [3.0, 2.0, 1.0]
    assert history.node_totals()["a"].asked == 3
    assert history.node_totals()["a"].bytes_up == 3 * 2_000_000
    assert history.status == "finished"


def test_resume_from_an_older_checkpoint_forgets_rounds_that_were_complete():
    script = Script()
    script.start()
    for number in (1, 2, 3):
        script.round(number, ["a"], loss=float(number), metrics={"accuracy": 0.1 * number})
    script.start(first_round=2)
    script.add("run-resumed", round=1, path="checkpoints/1")
    script.round(2, ["a"], loss=20.0)
    history = RunHistory.of(script.events)
    assert [(record.number, record.train_loss) for record in history.ordered_rounds] == [(1, 1.0), (2, 20.0)]
    assert history.metric("accuracy", "server") == [(1, 0.1)]


def test_run_that_starts_over_without_a_checkpoint_replaces_all_rounds():
    script = Script()
    script.start()
    script.round(1, ["a"], loss=5.0)
    script.round(2, ["a"], loss=4.0)
    script.start()
    script.add("round-started", round=1, nodes=["a"])
    history = RunHistory.of(script.events)
    assert list(history.rounds) == [1]
    assert history.rounds[1].outcome == "open"


def test_totals_of_nodes():
    totals = RunHistory.of(finished_run().events).node_totals()
    assert set(totals) == {"node-0", "node-1", "node-2"}
    dropped = totals["node-2"]
    assert (dropped.asked, dropped.replied, dropped.seconds) == (3, 2, 3.0)
    assert (dropped.bytes_up, dropped.bytes_down) == (4_000_000, 2_000_000)
    assert [(drop.round, drop.reason) for drop in dropped.drops] == [(2, "loss is NaN")]
    assert dropped.last_loss == pytest.approx(1 / 3)
    assert dropped.num_examples == 100


def test_headline_metric_best_and_undefined_values():
    script = Script()
    script.start()
    for number, perplexity in enumerate((30.0, None, 10.0, 10.0, 12.0), start=1):
        script.round(number, ["a"], metrics={"loss": 1.0, "perplexity": perplexity, "per-class": [1, 2]})
    history = RunHistory.of(script.events)
    assert history.headline_metric() == ("perplexity", "server")
    assert history.best("perplexity", "server") == (3, 10.0)
    assert history.metric("perplexity", "server") == [(1, 30.0), (3, 10.0), (4, 10.0), (5, 12.0)]
    assert history.metric_names("server") == ["perplexity", "loss"]
    assert history.best("accuracy", "server") is None


# ---- TensorBoard


def test_tensorboard_has_the_scalars_and_hides_repeated_rounds(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script = Script()
    script.start()
    script.round(1, ["a"], loss=2.0, metrics={"accuracy": 0.5, "f": None})
    script.round(2, ["a"], loss=9.0)
    sink = TensorBoardSink(tmp_path)
    for event in script.events:
        sink.emit(event)
    sink.close()
    resumed = Script()
    resumed.start(first_round=2)
    resumed.add("run-resumed", round=1, path="x")
    resumed.round(2, ["a"], loss=1.0)
    sink = TensorBoardSink(tmp_path)
    for event in resumed.events:
        sink.emit(event)
    sink.close()
    read = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {(s.step, s.value) for s in read.Scalars("train/loss")} == {(1, 2.0), (2, 1.0)}
    assert [(s.step, s.value) for s in read.Scalars("evaluate-server/accuracy")] == [(1, 0.5)]
    assert {s.value for s in read.Scalars("round/bytes-up")} == {2_000_000.0}
    assert "evaluate-server/f" not in read.Tags()["scalars"]


def test_tensorboard_that_is_missing_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FedLLMError, match=r"fedllm\[tensorboard\]"):
        TensorBoardSink(tmp_path)


def test_a_full_disk_costs_one_event_only(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path / "events.jsonl")
    with EventBus([sink]) as bus:
        bus.emit("round-started", round=1, nodes=[])
        file, full = sink._file, True

        class Full:
            name = file.name

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, line):
                if full:
                    file.write(line[:5])
                    raise OSError(28, "No space left on device")
                return file.write(line)

        sink._file = Full()
        bus.emit("round-started", round=2, nodes=[])
        full = False
        bus.emit("round-started", round=3, nodes=[])
    assert [event["round"] for event in read_events(tmp_path / "events.jsonl")] == [1, 3]
