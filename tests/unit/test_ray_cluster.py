"""What is asked of a Ray cluster before a simulation joins it, without Ray."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from fedllm import __version__, ray_cluster, simulate
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.ray_cluster import RayCluster, RayNode, ask
from fedllm.superlink import PrivateSuperLink


def node(cpus=4.0, gpus=0.0, version=__version__):
    return RayNode("10.0.0.1:1", cpus, gpus, version)


@pytest.mark.parametrize(
    ("has", "client", "places"),
    [
        ((4, 0), (1, 0), 4),
        ((4, 0), (3, 0), 1),
        ((4, 0), (8, 0), 0),
        ((8, 2), (1, 0.25), 8),
        ((16, 2), (1, 0.4), 4),  # 0.4 + 0.4 on each GPU; the rests do not add up to a client
        ((16, 3), (1, 2), 1),
        ((4, 0), (1, 1), 0),
        ((0, 0), (1, 0), 0),
    ],
)
def test_clients_that_fit_on_a_node(has, client, places):
    assert node(*has).places(*client) == places


def test_a_client_never_spans_two_machines():
    cluster = RayCluster("10.0.0.1:6379", (node(cpus=3), node(cpus=3)))
    assert cluster.places(2, 0) == 2
    cluster.check(2, 0, at_once=2)
    with pytest.raises(
        ConfigError, match=r"room for 2 clients with 2 CPUs.*expected at least 3.*3 CPUs, 0 GPUs"
    ):
        cluster.check(2, 0, at_once=3)


@pytest.mark.parametrize(("version", "said"), [("", "no fedllm"), ("0.0.1", "fedllm 0.0.1")])
def test_another_fedllm_is_refused(version, said):
    with pytest.raises(ConfigError, match=f"10.0.0.1:1 .*has {said}, this machine has {__version__}"):
        RayCluster("10.0.0.1:6379", (node(), node(version=version))).check(1, 0, 0)


@pytest.mark.parametrize("address", ["head", "head:port", ":6379", "auto"])
def test_an_address_has_host_and_port(address):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        ask(address)


def test_silence_is_told_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="nobody answers"):
            ask(f"127.0.0.1:{probe.getsockname()[1]}")


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_nodes_are_read_from_what_ray_prints_last(listening, monkeypatch):
    told = [vars(node(2)), vars(node(8, 1))]

    def run(command, **options):
        assert command[-2:] == ["fedllm.ray_cluster", listening]
        return subprocess.CompletedProcess(command, 0, f"a remark\n{json.dumps(told)}\n", "")

    monkeypatch.setattr(ray_cluster.subprocess, "run", run)
    cluster = ask(listening)
    assert cluster.nodes == (node(2), node(8, 1))
    assert cluster.summary() == f"Ray cluster {listening}: 2 nodes, 10 CPUs, 1 GPUs"


def test_rays_reason_is_passed_on(listening, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: Version mismatch\n")
    monkeypatch.setattr(ray_cluster.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match="Version mismatch"):
        ask(listening)


def test_flower_joins_the_named_cluster_and_no_other(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:6379")
    monkeypatch.setattr("fedllm.flower.executable", lambda name: f"/bin/{name}")
    alone = PrivateSuperLink()
    alone._home = Path("/tmp/x")
    assert "RAY_ADDRESS" not in alone.environment()
    assert alone.environment()["RAY_TMPDIR"] == "/tmp/x"
    joined = PrivateSuperLink(ray_address="10.0.0.1:6379").environment()
    assert joined["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert joined.get("RAY_TMPDIR") is None


def test_ray_is_not_told_how_many_cpus_a_running_cluster_has(monkeypatch):
    config = RunConfig.from_flat({"simulation.clients": 9})
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(simulate, "clients_at_once", lambda config: 9)
    assert simulate.federation_config(config)["init-args-num-cpus"] == 9
    cluster = RayCluster("10.0.0.1:6379", (node(16),))
    assert "init-args-num-cpus" not in simulate.federation_config(config, cluster)
