"""Real simulations of a trivial app: honest exit codes, and nothing left behind."""

import os
import signal
import subprocess
import sys
import uuid

import psutil
import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.e2e

MARK = "FEDLLM_TEST_MARK"

PYPROJECT = """
[project]
name = "trivial"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "trivial.server:app"
clientapp = "trivial.client:app"
[tool.flwr.app.config.simulation]
clients = 2
"""

# What the server does is chosen by the seed, a key that every fedllm app has.
SERVER = """
import os, signal, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from fedllm.events import EventBus, JsonlSink

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    folder = Path(config["run.root"]) / config["run.name"]
    while len(list(grid.get_node_ids())) < config["server.min-nodes"]:
        time.sleep(0.1)
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    messages = [Message(content=content, message_type="query", dst_node_id=node) for node in grid.get_node_ids()]
    replies = [reply for reply in grid.send_and_receive(messages) if not reply.has_error()]
    assert len(replies) == config["simulation.clients"] == 2
    with EventBus([JsonlSink(folder / "events.jsonl")]) as events:
        events.emit("run-started", run="trivial", strategy="none", client="none", task="none", rounds=1,
                    first_round=1, config={}, version="0", parameters=1, adapter_bytes=4)
        if config["seed"] == 1:
            raise ValueError("this app fails on purpose")
        if config["seed"] == 2:
            return
        if config["seed"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if config["seed"] == 4:
            time.sleep(600)
        events.emit("run-finished", rounds=1, seconds=1.0, metrics={"accuracy": 0.5})
"""

CLIENT = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    return Message(content=RecordDict(), reply_to=message)
"""

DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from fedllm import simulate
job = simulate.prepare(Path("trivial"), [f"seed={sys.argv[1]}"], name="run")
sys.exit(simulate.simulate(job, Console()))
"""


@pytest.fixture
def start(tmp_path):
    """Start a simulation in a process of its own; afterwards nothing of it may be left."""
    folder = tmp_path / "trivial" / "trivial"
    folder.mkdir(parents=True)
    (folder.parent / "pyproject.toml").write_text(PYPROJECT)
    (folder / "__init__.py").touch()
    (folder / "server.py").write_text(SERVER)
    (folder / "client.py").write_text(CLIENT)
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "TMPDIR": "/tmp", "PATH": "/usr/bin:/bin"}

    def start(seed):
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(seed)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield start
    left = marked(mark)
    assert not left, left


def marked(mark):
    """Processes that inherited a mark, and their descendants' command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def flower_home(process):
    """``FLWR_HOME`` of the SuperLink that a simulation has started."""
    for child in psutil.Process(process.pid).children():
        if (home := child.environ().get("FLWR_HOME")) is not None and "superlink" in " ".join(
            child.cmdline()
        ):
            return home
    return None


def test_a_run_that_finishes_exits_with_0(start, tmp_path):
    process = start(0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "accuracy 0.500" in out
    assert (tmp_path / "runs" / "run" / "flower.log").is_file()


@pytest.mark.parametrize(
    ("seed", "reason"),
    [
        (1, "ValueError: this app fails on purpose"),
        (2, "finished:completed"),
        (3, "killed"),
    ],
)
def test_a_run_that_does_not_finish_exits_with_1_and_says_why(start, tmp_path, seed, reason):
    process = start(seed)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert reason in err
    assert str(tmp_path / "runs" / "run" / "flower.log") in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_stopped_and_cleaned_up(start, tmp_path, number, code):
    process = start(4)
    wait_for((tmp_path / "runs" / "run" / "events.jsonl").is_file)
    home = flower_home(process)
    assert os.path.isdir(home)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not os.path.exists(home)


def test_nothing_outlives_a_killed_command(start, tmp_path):
    process = start(4)
    wait_for((tmp_path / "runs" / "run" / "events.jsonl").is_file)
    mark, home = process_mark(process), flower_home(process)
    process.kill()
    process.communicate()
    wait_for(lambda: not marked(mark) and not os.path.exists(home))


def process_mark(process):
    return psutil.Process(process.pid).environ()[MARK]
