"""Whole runs through `fedllm simulate`: the same bits for the same seed, also after kill -9 and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from peft import PeftModel

from fedllm import registry
from fedllm.base_models import load_base, resolve_device
from fedllm.events import read_events
from tests.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONFIG = """
strategy = "fedadam"
rounds = 6
seed = 3
model.name = "tiny-random:bert"
lora.dropout = 0.1
data.source = "train.csv"
data.test-fraction = 0.2
data.max-length = 16
data.partitioner = "dirichlet"
train.local-steps = 3
train.batch-size = 8
server.fraction-train = 0.6
server.fraction-evaluate = 0.4
simulation.clients = 5
"""


@pytest.fixture
def app(tmp_path):
    return write_app(tmp_path / "app", CONFIG, 240)


def simulate(app, name, *options, wait=True, **environment):
    command = [sys.executable, "-m", "fedllm", "simulate", str(app), *options, "-c", 'run.root="runs"']
    if "--resume" not in options:
        command += ["--name", name]
    process = subprocess.Popen(
        command,
        cwd=app.parent,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def adapter(app, name):
    return (app.parent / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes()


def events(app, name):
    path = app.parent / "runs" / name / "events.jsonl"
    return read_events(path) if path.exists() else []


def test_same_seed_same_bits_whoever_finishes_first_and_after_kill_9(app):
    output = simulate(app, "whole")
    assert "accuracy" in output

    # Two workers race in every run; here each reply that must wait for its turn also goes through a file.
    simulate(app, "spooled", "-c", "server.spool-megabytes=0")
    assert adapter(app, "spooled") == adapter(app, "whole")

    process = simulate(app, "killed", wait=False)
    deadline = time.monotonic() + 240
    while not any(e["event"] == "round-started" and e["round"] == 3 for e in events(app, "killed")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    servers = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if "flwr-simulation" in " ".join(child.cmdline())
    ]  # fmt: skip
    assert servers
    for server in servers:
        server.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "--resume killed" in output

    simulate(app, "killed", "--resume", "killed")
    kinds = [e["event"] for e in events(app, "killed")]
    assert "run-resumed" in kinds
    assert kinds[-1] == "run-finished"
    assert adapter(app, "killed") == adapter(app, "whole")


def test_a_run_leaves_everything_that_it_promises(app):
    simulate(app, "r", "--rounds", "2")
    folder = app.parent / "runs" / "r"
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
    flat = json.loads((folder / "config.json").read_text())
    assert flat["rounds"] == 2
    config = registry.config_from_flat(flat)
    labels = ("food", "sky", "sport")
    for adapter_folder in ("adapter", "best"):
        base = load_base(
            config.model, config.task, labels, resolve_device(config.model.device), seed=99
        ).model
        model = PeftModel.from_pretrained(base, folder / adapter_folder)
        assert model.config.id2label[1] == "sky"
    html = (folder / "report.html").read_text()
    assert 'name="viewport"' in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_bad_input_is_refused_before_anything_starts(app):
    for override, message in (
        ("lora.rnk=3", "did you mean 'lora.rank'"),
        ('model.name="packaged:nothing"', "packaged:minilm"),
        ('data.text-column="txt"', "text"),
        ('data.source="nowhere.csv"', "nowhere.csv"),
        ('strategy="fedavgg"', "did you mean 'fedavg'"),
        ("fedadam.eta=-1", "fedadam.eta"),
    ):
        process = simulate(app, "bad", "-c", override, wait=False)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (1, 2), output
        assert message in " ".join(output.split()), output
        assert not (app.parent / "runs" / "bad" / "events.jsonl").exists()


def test_a_client_that_fails_is_named_and_the_run_exits_non_zero(app):
    process = simulate(app, "lost", "-c", "train.learning-rate=1e3 train.local-steps=60", wait=False)
    output, _ = process.communicate(timeout=200)
    if process.returncode == 0:
        pytest.fail(f"a run that diverges in every client finished: {output[-2000:]}")
    assert "is nan" in output or "is inf" in output or "NaN" in output, output


def test_custom_strategy_example_runs(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    for file in (ROOT / "examples" / "custom_strategy").iterdir():
        if file.is_file():
            (app / file.name).write_bytes(file.read_bytes())
    output = simulate(app, "custom", "-c", 'model.name="tiny-random:bert" rounds=1 train.local-steps=1')
    assert "trimmed_mean:TrimmedMean" in output
    assert adapter(app, "custom")
