"""Split learning on deployed nodes: SuperLink, SuperNodes and the split server's stream over TLS on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.events import read_events
from fedllm.node.certs import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY
from fedllm.node.federation import Federation
from tests.e2e.test_split import EXAMPLE, restaurants

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_three_nodes_hold_the_first_blocks_and_everything_travels_over_tls(tmp_path):
    rows = restaurants(tmp_path / "restaurants.csv")
    own = {"threads": 1, "memory-megabytes": 500}
    with Federation(tmp_path / "federation", nodes=3, node_settings=own) as federation:
        certificates = federation.folder / "certs"
        flat = {
            "model.name": "tiny-random:llama",
            "data.source": str(rows),
            "data.test-file": "",
            "data.test-fraction": 0.2,
            "data.max-length": 48,
            "data.cache-dir": str(tmp_path / "cache"),
            "lora.rank": 4,
            "train.local-steps": 2,
            "rounds": 2,
            "server.min-nodes": 3,
            "server.node-timeout": 200,
            "run.root": str(tmp_path / "runs"),
            "hsplitlora.certificate": str(certificates / SERVER_CERTIFICATE),
            "hsplitlora.key": str(certificates / SERVER_KEY),
            "split.root-certificate": str(certificates / CA_CERTIFICATE),
        }
        command = [sys.executable, "-m", "fedllm", "run", str(EXAMPLE), "-f", str(federation.folder)]
        command += ["--name", "split", "-c", " ".join(f"{key}={json.dumps(flat[key])}" for key in flat)]
        done = subprocess.run(
            command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=700
        )
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_events(Path(tmp_path) / "runs" / "split" / "events.jsonl")
    lost = [event for event in events if event["event"] in ("node-dropped", "node-rejected", "warning")]
    assert not lost
    assert [event["replies"] for event in events if event["event"] == "aggregated"] == [3, 3]
    replies = [event for event in events if event["event"] == "node-replied" and event["phase"] == "train"]
    assert {event["node"] for event in replies} == {"0", "1", "2"}
    assert all(event["metrics"]["split-bytes-up"] > 0 for event in replies)
    assert (tmp_path / "runs" / "split" / "adapter" / "adapter_model.safetensors").is_file()
