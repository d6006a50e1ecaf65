"""The example of split learning at a size that runs in seconds, in real Flower processes on fewer CPUs than clients."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.events import read_events

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "split_learning"


def restaurants(path):
    """Meaning representations and sentences in the style of E2E NLG."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for index in range(60):
            kind, area = ("pub", "cafe", "bar")[index % 3], ("riverside", "centre")[index % 2]
            writer.writerow(
                [f"name[Inn {index}], eatType[{kind}], area[{area}]", f"Inn {index} is a {kind}."]
            )
    return path


@pytest.fixture
def rows(tmp_path):
    return restaurants(tmp_path / "restaurants.csv")


def simulate(folder, rows, name, *settings):
    flat = {
        "model.name": "tiny-random:llama",
        "data.source": str(rows),
        "data.test-file": "",
        "data.test-fraction": 0.2,
        "data.max-length": 48,
        "data.cache-dir": str(folder / "cache"),
        "lora.rank": 4,
        "train.local-steps": 2,
        "rounds": 2,
        "server.node-timeout": 400,
        "run.root": str(folder / "runs"),
        "simulation.memory-megabytes": "1.3,1.6,2.1,3.2,5.2",
    }
    tiny = " ".join(f"{key}={json.dumps(value)}" for key, value in flat.items())
    command = [sys.executable, "-m", "fedllm", "simulate", str(EXAMPLE), "--name", name, "-c", tiny]
    for setting in settings:
        command += ["-c", setting]
    done = subprocess.run(
        command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=800
    )
    return done, folder / "runs" / name


def test_five_clients_train_with_the_server_whatever_the_number_of_cpus(rows, tmp_path):
    done, folder = simulate(tmp_path, rows, "split")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 clients at a time" in done.stdout
    events = read_events(folder / "events.jsonl")
    dropped = [event for event in events if event["event"] in ("node-dropped", "node-rejected", "warning")]
    assert not dropped
    assert [event["replies"] for event in events if event["event"] == "aggregated"] == [5, 5]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_labels_stay_on_the_clients_and_codecs_are_lossy(rows, tmp_path):
    done, folder = simulate(
        tmp_path,
        rows,
        "u-shape",
        'hsplitlora.labels="client" hsplitlora.codec="int8" split.codec="int8" hsplitlora.mode="sequential" rounds=1',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(folder / "events.jsonl")
    assert [event["replies"] for event in events if event["event"] == "aggregated"] == [5]
