"""Log lines as JSON: one object a line, with the place where known."""

import io
import json
import logging
import threading

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedllm import client, logs
from fedllm.errors import ConfigError
from fedllm.events import LogSink
from tests.sample_run import Script


@pytest.fixture
def stream(monkeypatch):
    """What fedllm's logger writes in JSON."""
    monkeypatch.setenv(logs.VARIABLE, "json")
    written = io.StringIO()
    log = logging.getLogger("fedllm")
    log.handlers[:] = [logging.StreamHandler(written)]
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])
    logs.set_up()
    return written


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_whatever_it_says(stream):
    log = logging.getLogger("fedllm.some")
    log.info("two\nlines and a %s", "naïve \u2028 word")
    try:
        raise ValueError("inner")
    except ValueError:
        log.exception("outer")
    first, second = lines(stream)
    assert first | {"time": ""} == {
        "time": "", "level": "INFO", "logger": "fedllm.some", "message": "two\nlines and a naïve \u2028 word"
    }  # fmt: skip
    assert first["time"].endswith("+00:00")
    assert second["message"] == "outer"
    assert "ValueError: inner" in second["error"]


def test_fields_hold_inside_their_block_and_for_their_thread(stream):
    log = logging.getLogger("fedllm.some")
    with logs.bound(run="hot-tuna"):
        with logs.bound(round=3, node="a"):
            log.warning("in")
            other = threading.Thread(target=log.warning, args=("elsewhere",))
            other.start()
            other.join()
        log.warning("between")
    log.warning("out")
    fields = [{name: line[name] for name in logs.FIELDS if name in line} for line in lines(stream)]
    assert fields == [{"run": "hot-tuna", "round": 3, "node": "a"}, {}, {"run": "hot-tuna"}, {}]


def test_a_dropped_client_is_told_with_round_node_and_event(stream):
    script = Script()
    script.start()
    script.add("round-started", round=2, nodes=["a"])
    script.drop(2, "a", "loss is NaN")
    sink = LogSink()
    for event in script.events:
        sink.emit(event)
    last = lines(stream)[-1]
    assert (last["round"], last["node"], last["phase"], last["event"]) == (2, "a", "train", "node-dropped")
    assert last["level"] == "WARNING"


def test_a_clients_lines_say_for_whom_they_are(stream):
    @client._logged
    def train(message, context):
        logging.getLogger("fedllm.x").warning("here")
        return message

    context = Context(run_id=12, node_id=5, node_config={"name": "ward-3"}, state=RecordDict(), run_config={})
    content = RecordDict({"config": ConfigRecord({"server-round": 4})})
    train(Message(content, dst_node_id=5, message_type="train"), context)
    line = lines(stream)[-1]
    assert (line["run_id"], line["node"], line["round"], line["phase"]) == ("12", "ward-3", 4, "train")


def test_flowers_own_lines_become_json_too(monkeypatch):
    from flwr.common import log as flower_log
    from flwr.common.logger import console_handler

    monkeypatch.setenv(logs.VARIABLE, "json")
    written = io.StringIO()
    monkeypatch.setattr(console_handler, "stream", written)
    monkeypatch.setattr(console_handler, "format", console_handler.format)
    logs.write_json(logging.getLogger("flwr"))
    flower_log(logging.INFO, "\tconfigure_train: %s", "sampled")
    assert lines(written)[0]["message"] == "\tconfigure_train: sampled"
    assert lines(written)[0]["logger"] == "flwr"


def test_text_is_the_default_and_other_formats_are_refused(monkeypatch):
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    assert logs.wanted_format() == "text"
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(ConfigError, match="FEDLLM_LOG: expected text or json, found 'yaml'"):
        logs.wanted_format()


def test_what_a_supervised_process_prints_is_json_too(monkeypatch, capsys):
    monkeypatch.setenv(logs.VARIABLE, "json")
    logs.echo('superlink: {"message": "round 1", "round": 1}')
    logs.echo("supernode: WARNING :   no connection: retrying")
    logs.echo("worker: 12")
    own, flower, bare = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert own == {"message": "round 1", "round": 1, "part": "superlink"}
    assert (flower["part"], flower["level"], flower["message"]) == (
        "supernode",
        "WARNING",
        "no connection: retrying",
    )
    assert (bare["part"], bare["level"], bare["message"]) == ("worker", "INFO", "12")
    monkeypatch.setenv(logs.VARIABLE, "text")
    logs.echo("worker: 12")
    assert capsys.readouterr().out == "worker: 12\n"
