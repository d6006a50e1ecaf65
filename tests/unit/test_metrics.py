"""The Prometheus endpoints: what a scrape of a run and of a worker shows."""

import socket
import urllib.request
from dataclasses import replace

import pytest

from fedllm import metrics, registry, server
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedLLMError
from fedllm.events import EventBus
from fedllm.node.health import WorkerHealth
from fedllm.node.metrics import serve_worker_metrics
from fedllm.prometheus_sink import METRICS, PrometheusSink
from tests.sample_run import Script

parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra prometheus")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port):
    """Sample values by name and labels without ``run``."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (
            sample.name,
            *(value for label, value in sorted(sample.labels.items()) if label != "run"),
        ): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def sink(tmp_path, port):
    sink = PrometheusSink(tmp_path / "hot-tuna", port=port)
    yield sink
    sink.close()


def feed(sink, script):
    for event in script.events:
        sink.emit(event)


def test_a_run_adds_up_as_its_events_do(sink, port):
    script = Script()
    script.start(rounds=7)
    script.add("waiting-for-nodes", have=1, need=3)
    script.join(["a", "b", "c"])
    script.round(1, ["a", "b", "c"], loss=0.5, metrics={"accuracy": 0.75, "loss": None}, seconds=12.0)
    script.add("round-started", round=2, nodes=["a", "b"])
    script.reply(2, "a", phase="evaluate")
    script.add("node-dropped", round=2, phase="train", node="b", kind="timeout", reason="no reply within 5 s")
    script.add("round-skipped", round=2, reason="too few")
    script.add("round-finished", round=2, seconds=40.0)
    script.add("checkpointed", round=2, path="x", bytes=123, seconds=0.1)
    script.add("checkpoint-failed", round=2, reason="disk full")
    script.add("warning", message="odd")
    feed(sink, script)
    found = scrape(port)
    expected = {
        ("fedllm_planned_rounds",): 7,
        ("fedllm_current_round",): 2,
        ("fedllm_nodes_connected",): 1,
        ("fedllm_nodes_needed",): 3,
        ("fedllm_nodes_joined_total",): 3,
        ("fedllm_nodes_rejected_total",): 0,
        ("fedllm_nodes_asked",): 2,
        ("fedllm_rounds_total", "finished"): 1,
        ("fedllm_rounds_total", "skipped"): 1,
        ("fedllm_round_seconds_sum",): 52,
        ("fedllm_round_seconds_bucket", "30.0"): 1,
        ("fedllm_replies_total", "train"): 3,
        ("fedllm_replies_total", "evaluate"): 1,
        ("fedllm_drops_total", "timeout", "train"): 1,
        ("fedllm_received_bytes_total", "train"): 6_000_000,
        ("fedllm_sent_bytes_total", "train"): 3_000_000,
        ("fedllm_client_seconds_sum", "train"): 4.5,
        ("fedllm_train_loss",): 0.5,
        ("fedllm_evaluation", "accuracy", "server"): 0.75,
        ("fedllm_checkpoint_round",): 2,
        ("fedllm_checkpoint_bytes",): 123,
        ("fedllm_checkpoint_failures_total",): 1,
        ("fedllm_warnings_total",): 1,
        ("fedllm_last_event_timestamp_seconds",): script.now,
    }
    assert {key: found[key] for key in expected} == expected
    undefined = found["fedllm_evaluation", "loss", "server"]
    assert undefined != undefined  # NaN


def test_every_metric_has_the_runs_name(sink, port):
    feed(sink, Script())
    sink.emit({"event": "something-new", "time": 1.0})
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert samples
    assert all('run="hot-tuna"' in line for line in samples)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_close_frees_the_port(tmp_path, port):
    for _ in range(2):
        sink = PrometheusSink(tmp_path, port=port)
        sink.close()
    with pytest.raises(OSError):  # noqa: PT011
        scrape(port)


def test_a_taken_port_is_named(sink, tmp_path, port):
    with pytest.raises(FedLLMError, match=f"127.0.0.1:{port}.*another port"):
        PrometheusSink(tmp_path, port=port)


def test_only_loopback_is_bound_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv(metrics.HOST_VARIABLE, raising=False)
    assert metrics.default_host() == "127.0.0.1"
    monkeypatch.setenv(metrics.HOST_VARIABLE, "0.0.0.0")
    assert metrics.default_host() == "0.0.0.0"


# ---- configuration


def config_of(**flat):
    return registry.config_from_flat({key.replace("__", ".").replace("_", "-"): v for key, v in flat.items()})


def test_port_and_host_are_keys_checked_before_a_run():
    registry.check(config_of(run__sinks="prometheus", prometheus__port=9999, prometheus__host="0.0.0.0"))
    for wrong in ({"prometheus__port": 0}, {"prometheus__prot": 1}, {"prometheus__run_dir": "x"}):
        with pytest.raises(ConfigError, match="prometheus"):
            registry.check(config_of(run__sinks="prometheus", **wrong))


def test_the_run_hands_folder_and_keys_to_the_sink(tmp_path, port):
    config = config_of(run__sinks="prometheus", prometheus__port=port)
    with EventBus(server._sinks(config, tmp_path / "named")) as events:
        events.emit("round-started", round=4, nodes=["a"])
        assert scrape(port)["fedllm_current_round",] == 4


def test_where_metrics_go_does_not_change_what_a_run_is(tmp_path):
    plain = config_of(seed=1)
    served = config_of(seed=1, run__sinks="prometheus", prometheus__port=9999)
    tables = registry.sink_tables(served)
    assert plain.fingerprint(tables) == served.fingerprint(tables)
    assert plain.fingerprint(tables) != config_of(seed=2).fingerprint(tables)


def test_the_operator_gets_metrics_of_every_run(tmp_path, port, monkeypatch):
    monkeypatch.setenv(metrics.PORT_VARIABLE, str(port))
    with EventBus(server._sinks(RunConfig(), tmp_path)) as events:
        events.emit("round-started", round=2, nodes=[])
        assert scrape(port)["fedllm_current_round",] == 2


def test_a_second_run_goes_on_without_the_operators_metrics(tmp_path, port, sink, monkeypatch, caplog):
    monkeypatch.setenv(metrics.PORT_VARIABLE, str(port))
    with EventBus(server._sinks(RunConfig(), tmp_path)):
        assert "goes on without" in caplog.text


@pytest.mark.parametrize("value", ["http", "0", "70000", "-1"])
def test_a_bad_port_of_the_operator_is_refused(monkeypatch, value):
    monkeypatch.setenv(metrics.PORT_VARIABLE, value)
    with pytest.raises(ConfigError, match=metrics.PORT_VARIABLE):
        metrics.wanted_port()


class Foreign:
    """A sink of somebody's own."""

    def __init__(self, folder, *, level: int = 1):
        self.told = (folder.name, level)

    def emit(self, event):
        pass

    def close(self):
        pass


class Inherited(Foreign):
    """The same by inheritance."""


def test_a_sink_of_ones_own_may_name_its_folder_as_it_likes_and_has_keys(tmp_path):
    for cls in (Foreign, Inherited):
        flat = {"run.sinks": f"{__name__}:{cls.__name__}", f"{cls.__name__.lower()}.level": 3}
        config = registry.config_from_flat(flat)
        registry.check(config)
        assert server._sinks(config, tmp_path / "x")[-1].told == ("x", 3)


# ---- worker


def test_worker_is_asked_at_every_scrape(port):
    told = WorkerHealth(
        pid=7, version="1.2", started_at=100.0, jobs_done=3, jobs_failed=1, jobs_waiting=2, job="train of a",
        busy_seconds=2.5, worked_seconds=60.0, resident_bytes=10**9, device_bytes=10**8, kept_bytes=10**7,
        memory_limit=10**10, models=("minilm", "smollm2"), model_loads=5, data_loads=6,
    )  # fmt: skip
    answers = iter([told, replace(told, jobs_done=4)])
    stop = serve_worker_metrics(port, lambda: next(answers))
    try:
        assert scrape(port) == {
            ("fedllm_worker_up",): 1,
            ("fedllm_worker_info", "7", "1.2"): 1,
            ("fedllm_worker_start_time_seconds",): 100,
            ("fedllm_worker_jobs_total", "done"): 3,
            ("fedllm_worker_jobs_total", "failed"): 1,
            ("fedllm_worker_jobs_waiting",): 2,
            ("fedllm_worker_job_seconds",): 2.5,
            ("fedllm_worker_worked_seconds_total",): 60,
            ("fedllm_worker_resident_bytes",): 1e9,
            ("fedllm_worker_device_bytes",): 1e8,
            ("fedllm_worker_kept_bytes",): 1e7,
            ("fedllm_worker_memory_limit_bytes",): 1e10,
            ("fedllm_worker_models",): 2,
            ("fedllm_worker_model_loads_total",): 5,
            ("fedllm_worker_data_loads_total",): 6,
        }
        assert scrape(port)["fedllm_worker_jobs_total", "done"] == 4
    finally:
        stop()


def test_a_worker_that_does_not_answer_is_down(port):
    def health():
        raise FedLLMError("no answer within 1 s")

    stop = serve_worker_metrics(port, health)
    try:
        assert scrape(port) == {("fedllm_worker_up",): 0}
    finally:
        stop()
