"""A SuperLink, one SuperNode and its resident worker: nothing is loaded twice, and kill -9 costs one message."""

import os
import signal
import time

import pytest

from fedllm.node.federation import Federation
from fedllm.node.health import ask
from tests.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG = """
strategy = "fedavg"
rounds = 3
model.name = "tiny-random:bert"
data.source = "train.csv"
data.test-fraction = 0.2
data.max-length = 16
train.local-steps = 3
train.batch-size = 8
server.min-nodes = 1
server.node-timeout = 300
simulation.clients = 1
run.root = "runs"
"""


@pytest.fixture
def app(tmp_path):
    paths = {"train.csv": tmp_path / "app" / "train.csv", "runs": tmp_path / "runs"}
    config = CONFIG
    for name, path in paths.items():
        config = config.replace(name, str(path))
    return write_app(tmp_path / "app", config, 120)


def drops(run):
    return [event for event in run.events() if event["event"] == "node-dropped"]


def test_the_worker_loads_once_and_its_death_costs_one_message(app, tmp_path):
    with Federation(tmp_path / "f", 1, node_settings={"threads": 1}) as federation:
        node = federation.nodes[0]
        socket = node.folder / "state" / "worker.sock"

        run = federation.start_run(app, name="whole")
        assert run.wait().completed
        assert not drops(run)
        health = ask(socket)
        assert (health.model_loads, health.data_loads, health.jobs_failed) == (1, 1, 0)
        assert health.jobs_done >= 4  # a description and three rounds

        # The first message of this run is lost with the worker; the one after it goes to the next worker.
        slow = federation.start_run(app, ["train.local-steps=1500", "rounds=2"], name="slow")
        while not (health := ask(socket, 60.0)).job.startswith("train"):
            time.sleep(0.1)
        os.kill(health.pid, signal.SIGKILL)
        assert slow.wait().completed
        (drop,) = drops(slow)
        assert (drop["round"], drop["phase"]) == (1, "train")
        assert f"process {health.pid}) ended" in drop["reason"]
        assert "it was killed, crashed or ran out of memory" in drop["reason"]
        slow.wait_for_event("round-finished", round=2)
        restarted = ask(socket)
        assert restarted.pid != health.pid
        assert (restarted.model_loads, restarted.jobs_done) == (1, 1)
