"""The same app on a Ray cluster of two nodes on this machine: clients run on both, the adapter is the same."""

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedllm import simulate
from fedllm.errors import ConfigError
from fedllm.flower import executable
from fedllm.processes import FLOWER_HOME, clean_up, of_home, start_guard
from fedllm.ray_cluster import ask
from tests.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NICENESS = "RAY_worker_niceness"  # 15 unless told otherwise: a busy machine would starve the clients

CONFIG = """
client = "tracking:Tracking"
rounds = 2
model.name = "tiny-random:bert"
data.train-rows = 96
data.test-rows = 20
data.max-length = 16
train.local-steps = 2
train.batch-size = 4
simulation.clients = 4
server.node-timeout = 300
"""

# A client update of the user's own that tells on which Ray node it ran.
TRACKING = """
from pathlib import Path
import ray
from fedllm.clients.backprop import Backprop

class Tracking(Backprop):
    def run(self, job):
        context = ray.get_runtime_context()
        seen = Path({folder!r}) / context.get_node_id()
        with seen.open("a") as file:
            file.write(job.node + chr(10))
        return super().run(job)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """Address of a head and a second node with one CPU each; nothing of them is left afterwards."""
    # Ray's sockets need a short path.
    home = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    environment = {**os.environ, FLOWER_HOME: str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    environment[NICENESS] = "0"
    environment.pop("RAY_ADDRESS", None)
    address = f"127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    common = [
        "--node-ip-address",
        "127.0.0.1",
        "--num-cpus",
        "1",
        "--object-store-memory",
        "100000000",
        "--block",
    ]
    head = ["--head", "--port", port, "--temp-dir", str(home / "a"), "--include-dashboard", "false"]
    guard = start_guard(home)  # cleans up should the tests be killed
    with (home / "ray.log").open("wb") as log:

        def start(*options):
            command = [executable("ray"), "start", *options, *common]
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

        try:
            start(*head)
            found = wait_for_nodes(address, 1, home)
            start("--address", address)
            found = wait_for_nodes(address, 2, home)
            assert [node.cpus for node in found.nodes] == [1, 1]
            yield address
        finally:
            clean_up(home)
            guard.communicate()
    assert not of_home(home)


def wait_for_nodes(address, count, home):
    deadline = time.monotonic() + 150
    while True:
        try:
            found = ask(address)
        except ConfigError as error:
            found, reason = None, str(error)
        if found is not None and len(found.nodes) == count:
            return found
        assert time.monotonic() < deadline, (found or reason, (home / "ray.log").read_text()[-3000:])
        time.sleep(1)


def adapter_hash(run_dir):
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_clients_run_on_both_nodes_and_the_result_is_that_of_one_machine(
    cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(NICENESS, "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    app, seen = tmp_path / "app", tmp_path / "seen"
    seen.mkdir()
    write_app(app, CONFIG)
    (app / "tracking.py").write_text(TRACKING.format(folder=str(seen)))

    job = simulate.prepare(app, name="cluster", ray_address=cluster)
    assert "2 nodes, 2 CPUs" in job.cluster.summary()
    assert simulate.simulate(job, Console()) == 0, capsys.readouterr()
    by_node = {file.name: file.read_text().split() for file in seen.iterdir()}
    assert len(by_node) == 2, by_node
    assert sorted(name for names in by_node.values() for name in names) == sorted([*"0123"] * 2)
    assert len(ask(cluster).nodes) == 2, "the cluster must outlive the run"

    alone = simulate.prepare(app, name="alone")
    assert simulate.simulate(alone, Console()) == 0, capsys.readouterr()
    assert adapter_hash(alone.run_dir) == adapter_hash(job.run_dir)


def test_a_cluster_without_room_is_refused_before_work_starts(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = tmp_path / "app"
    write_app(app, CONFIG.replace("tracking:Tracking", "backprop"))
    with pytest.raises(ConfigError, match="room for 0 clients with 2 CPUs"):
        simulate.prepare(app, ["simulation.cpus-per-client=2"], ray_address=cluster)
