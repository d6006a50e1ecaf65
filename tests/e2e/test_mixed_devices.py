"""The example with six unequal devices, at a size that runs in seconds, in real Flower processes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedllm.events import read_events
from fedllm.report import load_run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("chatterbot_corpus") is None, reason="fedllm[demo] is missing"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="fedllm[quantization] is missing"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixed_devices"
SMALL = (
    'model.name="tiny-random:llama" lora.rank=8 data.max-length=16 data.test-rows=40 rounds=3 train.local-steps=2 '
    'train.batch-size=8 fedpipe.batch-sizes="4,8" fedpipe.warmup-steps=3 '
    'simulation.memory-megabytes="0.05,0.29,0.35,0.5,0.8,3"'
)


def test_six_devices_train_what_they_can_hold(tmp_path):
    command = [sys.executable, "-m", "fedllm", "simulate", str(EXAMPLE), "--name", "six"]
    command += ["-c", f"{SMALL} run.root={json.dumps(str(tmp_path / 'runs'))}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "six"
    events = read_events(folder / "events.jsonl")
    (rejected,) = (event for event in events if event["event"] == "node-rejected")
    assert rejected["node"] == "0"
    assert "available are 50000" in rejected["reason"]
    plan = json.loads((folder / "plan.json").read_text())
    assert set(plan["nodes"]) == {"1", "2", "3", "4", "5"}
    assert len({told["bits"] for told in plan["nodes"].values()}) > 1
    sizes = [sum(told["ranks"].values()) for told in plan["nodes"].values()]
    assert min(sizes) < max(sizes)
    assert [e["replies"] for e in events if e["event"] == "aggregated"] == [5, 5, 5]
    assert not [event for event in events if event["event"] == "node-dropped"]
    assert [record.phase for record in load_run(folder).plans] == ["warm-up", "plan"]
    assert "<h2>Plan</h2>" in (folder / "report.html").read_text()
