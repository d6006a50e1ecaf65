"""Federation folders, status and the checks before a deployed run, with Flower's command replaced by a script."""

import json
import stat
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedllm import flower
from fedllm.cli import app
from fedllm.errors import ConfigError
from fedllm.flower import SuperLinkError
from fedllm.node import certs, deployed, status
from fedllm.node.connection import FederationFolder
from fedllm.node.federation import Federation
from tests.tiny_app import write_app

# Keeps the nodes in a file beside it, as a SuperLink would.
FLWR = """
import json, sys
from pathlib import Path
state = Path(__file__).with_suffix(".json")
nodes = json.loads(state.read_text()) if state.exists() else []
arguments = sys.argv[1:]
reply = {"success": True}
if arguments[:2] == ["supernode", "register"]:
    key = Path(arguments[2]).read_text()
    if key in [node["key"] for node in nodes]:
        reply = {"success": False, "error-message": "the key is in use"}
    else:
        nodes.append({"key": key, "node-id": str(100 + len(nodes)), "status": "registered", "online-at": "N/A",
                      "offline-at": "N/A", "deleted-at": "N/A", "online-elapsed": 0.0})
        reply["node-id"] = nodes[-1]["node-id"]
elif arguments[:2] == ["supernode", "unregister"]:
    for node in nodes:
        if node["node-id"] == arguments[2]:
            node["status"], node["deleted-at"] = "unregistered", "2026-01-01 00:00:00Z"
elif arguments[:2] == ["supernode", "list"]:
    reply["nodes"] = nodes
elif arguments[0] == "list":
    reply["runs"] = [
        {"run-id": 7, "status": "running", "created-at": "2026-01-02"},
        {"run-id": 5, "status": "finished:completed", "created-at": "2026-01-01"},
    ]
state.write_text(json.dumps(nodes))
print(json.dumps(reply))
"""


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """Set the status of all nodes: ``flwr("online")``."""
    script = tmp_path / "flwr.py"
    script.write_text(f"#!{sys.executable}\n{FLWR}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(flower, "executable", lambda name: str(script))

    def set_all(to):
        path = script.with_suffix(".json")
        nodes = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                [{**node, "status": to, "online-at": "2026-01-01", "online-elapsed": 60.0} for node in nodes]
            )
        )

    return set_all


@pytest.fixture
def folder(tmp_path, flwr):
    certs.create_authority(tmp_path / "certs")
    for name in ("a", "b"):
        certs.create_node_key(tmp_path / "certs", name)
    return FederationFolder.create(
        tmp_path / "fed", "127.0.0.1:8000", tmp_path / "certs" / "ca.crt", local=True
    )


def test_nodes_are_registered_listed_and_revoked_by_name(folder, tmp_path):
    for name in ("a", "b"):
        folder.register(tmp_path / "certs" / f"{name}.pub", name)
    again = FederationFolder(folder.home)
    assert [(node.name, node.node_id, node.status) for node in again.nodes()] == [
        ("a", "100", "registered"),
        ("b", "101", "registered"),
    ]
    assert again.revoke("a") == "100"
    assert [(node.name, node.status) for node in again.nodes()] == [("", "unregistered"), ("b", "registered")]
    assert again.revoke("101") == "101"


def test_refusals_say_what_to_do(folder, tmp_path):
    key = tmp_path / "certs" / "a.pub"
    folder.register(key, "a")
    with pytest.raises(ConfigError, match="registered already"):
        folder.register(tmp_path / "certs" / "b.pub", "a")
    with pytest.raises(SuperLinkError, match="the key is in use"):
        folder.register(key, "other")
    with pytest.raises(ConfigError, match="certs node"):
        folder.register(tmp_path / "none.pub", "c")
    with pytest.raises(ConfigError, match="names: a"):
        folder.revoke("c")


def test_a_folder_is_made_once_and_must_exist(folder, tmp_path):
    with pytest.raises(ConfigError, match="federation folder already"):
        FederationFolder.create(folder.home, "127.0.0.1:8000", tmp_path / "certs" / "ca.crt", local=True)
    with pytest.raises(ConfigError, match="does not exist"):
        FederationFolder.create(tmp_path / "x", "127.0.0.1:8000", tmp_path / "no.crt", local=True)
    with pytest.raises(ConfigError, match="fedllm connect"):
        FederationFolder(tmp_path / "certs")


def test_flower_reads_the_connection(folder):
    import tomllib

    config = tomllib.loads((folder.home / "config.toml").read_text())["superlink"]
    assert config["default"] == "federation"
    assert config["federation"]["address"] == "127.0.0.1:8000"
    assert config["federation"]["root-certificates"].startswith("/")


def test_status_tells_the_round_and_the_versions(folder, flwr, tmp_path):
    folder.register(tmp_path / "certs" / "a.pub", "a")
    assert not status.collect(folder.home).healthy
    flwr("online")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    events = [
        {"event": "run-started", "run": "one", "strategy": "fedavg", "client": "backprop", "task": "causal-lm",
         "rounds": 9, "first_round": 1, "config": {}, "version": "1", "parameters": 1, "adapter_bytes": 4},
        {"event": "node-joined", "node": "a", "device": "cpu", "cpus": 1, "memory_bytes": 1, "num_examples": 1,
         "version": "1.2"},
        {"event": "round-started", "round": 4, "nodes": ["a"]},
    ]  # fmt: skip
    (run / "events.jsonl").write_text("".join(json.dumps({**event, "time": 1.0}) + "\n" for event in events))
    FederationFolder(folder.home).remember_run("7", run)
    told = status.collect(folder.home)
    assert told.healthy
    (shown,) = told.runs
    assert (shown.run_id, shown.name, shown.round, shown.rounds) == ("7", "one", 4, 9)
    assert shown.versions == {"a": "1.2"}
    console = Console(record=True, width=120)
    status.print_status(told, console)
    text = console.export_text()
    assert "round 4 of 9, fedllm 1.2 on its nodes" in text
    assert "online" in text
    result = CliRunner().invoke(app, ["status", "-f", str(folder.home), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["nodes"][0]["name"] == "a"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write_app(tmp_path / "tiny", 'model.name = "tiny-random:bert"\nsimulation.clients = 9\n')


def test_a_deployed_run_waits_for_the_nodes_that_are_online(folder, flwr, tiny, tmp_path):
    for name in ("a", "b"):
        folder.register(tmp_path / "certs" / f"{name}.pub", name)
    with pytest.raises(ConfigError, match="none of the 2 registered nodes is online"):
        deployed.prepare(tiny, folder.home)
    flwr("online")
    prepared = deployed.prepare(tiny, folder.home, name="one")
    assert prepared.online == 2
    assert prepared.job.config.server.min_nodes == 2
    assert prepared.job.run_dir == tmp_path / "runs" / "one"
    with pytest.raises(ConfigError, match=r"server\.min-nodes is 3, but only 2"):
        deployed.prepare(tiny, folder.home, ["server.min-nodes=3"])
    with pytest.raises(ConfigError, match="never attack"):
        deployed.prepare(tiny, folder.home, ['attack="sign-flip" attack-fraction=0.5'])


def test_on_another_machine_run_root_is_left_as_it_was_written(flwr, tiny, tmp_path):
    certs.create_authority(tmp_path / "certs")
    certs.create_node_key(tmp_path / "certs", "a")
    far = FederationFolder.create(
        tmp_path / "far", "127.0.0.1:8000", tmp_path / "certs" / "ca.crt", local=False
    )
    far.register(tmp_path / "certs" / "a.pub", "a")
    flwr("online")
    config = deployed.prepare(tiny, far.home, ['run.root="results"'], resume="one").job.config
    assert (config.run.root, config.run.name, config.run.resume) == ("results", "one", True)


def test_a_federation_folder_keeps_its_size(tmp_path):
    made = Federation(tmp_path / "f", 2, node_settings=lambda index: {"threads": index + 1})
    assert [node.folder.name for node in made.nodes] == ["node-0", "node-1"]
    assert len(Federation(tmp_path / "f").nodes) == 2
    assert not made.running
    with pytest.raises(ConfigError, match="2 nodes, asked for 3"):
        Federation(tmp_path / "f", 3)
    with pytest.raises(ConfigError, match="thread: Extra inputs"):
        Federation(tmp_path / "g", 1, node_settings={"thread": 1})
    with pytest.raises(ConfigError, match="not empty"):
        Federation(tmp_path, 1)
    with pytest.raises(ConfigError, match="fedllm up"):
        Federation(tmp_path / "none")


@pytest.mark.parametrize("command", ["node", "superlink"])
def test_commands_ask_for_their_settings_and_print_a_sample(command):
    result = CliRunner().invoke(app, [command, "--example"])
    assert result.exit_code == 0
    assert "root-certificates" in result.stdout
    refused = CliRunner().invoke(app, [command])
    assert isinstance(refused.exception, ConfigError)
    assert "--example" in str(refused.exception)
