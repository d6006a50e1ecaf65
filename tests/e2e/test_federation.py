"""A TLS + authenticated federation of real processes on loopback: same bits as simulated, restarts, refusals, end."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import tomli_w
from safetensors.torch import load_file

from fedllm.flower import SuperLinkError
from fedllm.node import certs
from fedllm.node.federation import Federation
from fedllm.node.member import Member
from tests import waiting
from tests.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

wait_for = partial(waiting.wait_for, seconds=300)

CONFIG = """
strategy = "fedavg"
rounds = 2
seed = 3
model.name = "tiny-random:bert"
lora.dropout = 0.1
data.source = "train.csv"
data.test-fraction = 0.2
data.max-length = 16
data.partitioner = "dirichlet"
train.local-steps = 3
train.batch-size = 8
simulation.clients = 3
simulation.cpus-per-client = 1
server.node-timeout = 900
"""


MINILM = """
strategy = "fedavg"
rounds = 2
seed = 3
model.name = "packaged:minilm"
lora.dropout = 0.1
data.source = "packaged:chatterbot"
data.max-rows-per-label = 40
data.max-length = 32
data.partitioner = "dirichlet"
train.local-steps = 4
train.batch-size = 8
simulation.clients = 3
simulation.cpus-per-client = 1
server.node-timeout = 900
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return write_app(tmp_path_factory.mktemp("apps") / "app", CONFIG, 240)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three nodes with one torch thread each; afterwards no process and no port of it is left."""
    folder = tmp_path_factory.mktemp("fed") / "f"
    made = Federation(folder, 3, node_settings={"threads": 1}, superlink_settings={"threads": 1})
    with made:
        ports = [
            connection.laddr.port
            for member in (made.superlink, *made.nodes)
            for process in member.processes()
            for connection in process.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        sockets = list(folder.glob("node-*/state/worker.sock"))
        yield made
    assert len(ports) >= 5  # two of the SuperLink, one of each SuperNode
    assert len(sockets) == 3
    assert not [member.processes() for member in (made.superlink, *made.nodes) if member.processes()]
    assert not [line for line in command_lines() if str(folder) in line]
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, port
    assert not [path for path in sockets if path.exists()]


def command_lines():
    for process in psutil.process_iter():
        try:
            yield " ".join(process.cmdline())
        except psutil.Error:
            continue


def fedllm(*arguments, cwd, timeout=900, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fedllm", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("config", [CONFIG, MINILM], ids=["tiny", "minilm"])
def test_a_deployed_run_ends_with_the_bits_of_the_simulated_one(config, federation, tmp_path):
    app = write_app(tmp_path / "app", config, 240)
    deployed = fedllm("run", app, "-f", federation.folder, "--name", "deployed", cwd=tmp_path)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert "round 2/2: 3 of 3 clients" in deployed.stdout
    simulated = fedllm("simulate", app, "--name", "simulated", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    one, other = (
        load_file(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors")
        for name in ("deployed", "simulated")
    )
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_node_that_is_killed_comes_back(federation):
    node = federation.nodes[1]
    for part in reversed(node.parts()):
        before = node.pid(part)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda before=before, part=part: node.parts()[part]["pid"] not in (None, before))
        node.wait_until_ready()
        # A SuperNode is let in again only when the SuperLink has noticed that the one before is gone.
        assert node.parts()[part]["restarts"] >= 1
    federation.wait_for_online(3)


def test_nodes_attach_again_after_the_superlink_was_killed(federation, app, tmp_path):
    before = federation.superlink.pid("superlink")
    nodes = {node.node_id for node in federation.connection.nodes()}
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: federation.superlink.parts()["superlink"]["pid"] not in (None, before))
    federation.superlink.wait_until_ready()
    federation.wait_for_online(3)
    assert {node.node_id for node in federation.connection.nodes()} == nodes
    root = f'run.root="{tmp_path}" rounds=1'
    assert federation.start_run(app, [root], name="after").wait().completed


def test_a_key_that_is_not_registered_is_refused_until_it_is_and_again_when_revoked(federation, tmp_path):
    certs.create_node_key(tmp_path, "stranger")
    like = federation.nodes[0].settings_file.read_text()
    stranger = Member(tmp_path / "stranger", "node")
    stranger.folder.mkdir()
    address = next(line for line in like.splitlines() if line.startswith("superlink ="))
    settings = {
        "root-certificates": str(federation.folder / "certs" / "ca.crt"),
        "private-key": str(tmp_path / "stranger.key"),
        "partition-id": 0,
        "num-partitions": 1,
        "worker": False,
    }
    stranger.settings_file.write_text(f"{address}\n{tomli_w.dumps(settings)}")
    stranger.start()
    try:
        wait_for(lambda: "reason: " in stranger.log("supervisor"))
        assert "fedllm nodes register" in stranger.log("supervisor")
        federation.connection.register(tmp_path / "stranger.pub", "stranger")
        stranger.wait_until_ready()
        with pytest.raises(SuperLinkError):
            federation.connection.register(tmp_path / "stranger.pub", "again")
        restarts = stranger.parts()["supernode"]["restarts"]
        federation.connection.revoke("stranger")
        wait_for(lambda: stranger.parts()["supernode"]["restarts"] > restarts)
        wait_for(lambda: stranger.parts()["supernode"]["state"] != "running")
    finally:
        stranger.stop()


def test_up_and_down_by_command(tmp_path):
    folder = tmp_path / "f"
    try:
        up = fedllm("up", "-n", 1, "-f", folder, "--no-worker", cwd=tmp_path)
        assert up.returncode == 0, up.stdout + up.stderr
        status = fedllm("status", "-f", folder, cwd=tmp_path)
        assert status.returncode == 0, status.stdout + status.stderr
        assert "online" in status.stdout
        again = fedllm("up", "-f", folder, cwd=tmp_path)
        assert again.returncode == 1
        assert "fedllm down" in again.stderr
    finally:
        down = fedllm("down", "-f", folder, "--remove", cwd=tmp_path)
    assert down.returncode == 0, down.stdout + down.stderr
    assert not Path(folder).exists()
    assert not [line for line in command_lines() if str(folder) in line]
