"""What a week does to a federation, on purpose: docs/faults.md has the table of which this is the proof."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from safetensors.torch import load_file

from fedllm.errors import WorkerError
from fedllm.node.federation import Federation
from fedllm.node.health import ask
from fedllm.superlink import free_port
from tests import waiting
from tests.tiny_app import write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

wait_for = partial(waiting.wait_for, seconds=600)

CONFIG = """
strategy = "fedavg"
rounds = 3
seed = 3
model.name = "tiny-random:bert"
data.source = "train.csv"
data.test-fraction = 0.2
data.max-length = 16
train.local-steps = 300
train.batch-size = 8
server.min-nodes = 2
server.node-timeout = 900
simulation.clients = 2
"""
QUORUM = ["server.quorum=0.5", "server.min-nodes=1"]
"""One of the two nodes is enough."""


class Proxy:
    """Forwards TCP connections to a port of this machine, until it is cut in the middle of something large."""

    def __init__(self, target):
        self.target, self.port = target, free_port()
        self._cut_at_upload = self._is_cut = False
        self._open = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at_next_upload(self):
        """Break every connection when the next large piece goes up; nothing connects until :meth:`mend`."""
        self._cut_at_upload = True

    @property
    def is_cut(self):
        return self._is_cut

    def mend(self):
        self._is_cut = False

    def close(self):
        self._listener.close()
        self._break()

    def _break(self):
        while self._open:
            one = self._open.pop()
            with contextlib.suppress(OSError):  # the other side has closed it already
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            threading.Thread(target=self._copy, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, False), daemon=True).start()

    def _copy(self, source, sink, upwards):
        try:
            while data := source.recv(65536):
                if upwards and self._cut_at_upload and len(data) >= 4096:
                    sink.sendall(data[: len(data) // 2])
                    self._cut_at_upload, self._is_cut = False, True
                    self._break()
                    return
                sink.sendall(data)
        except OSError:
            pass  # cut, or closed by the other side
        finally:
            for one in (source, sink):
                one.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return write_app(tmp_path_factory.mktemp("apps") / "app", CONFIG, 120)


@pytest.fixture(scope="module")
def proxy():
    made = Proxy(free_port())
    yield made
    made.close()


@pytest.fixture(scope="module")
def federation(tmp_path_factory, proxy):
    """Two nodes with one thread each; the way of the second one to the SuperLink can be cut."""

    def settings(index):
        return {"threads": 1, "superlink": f"127.0.0.1:{(proxy.target, proxy.port)[index]}"}

    fleet = {"threads": 1, "fleet-address": f"127.0.0.1:{proxy.target}"}
    folder = tmp_path_factory.mktemp("fed") / "f"
    with Federation(folder, 2, node_settings=settings, superlink_settings=fleet) as made:
        yield made


@pytest.fixture
def whole(federation):
    """The federation with all of its processes there and known to the SuperLink."""
    for member in (federation.superlink, *federation.nodes):
        member.wait_until_ready()
    federation.wait_for_online(2)
    return federation


@pytest.fixture(scope="module")
def start(federation, app, tmp_path_factory):
    """Start a run of the app, or go on with one."""
    root = tmp_path_factory.mktemp("results")

    def start(name=None, overrides=(), **options):
        return federation.start_run(app, [f'run.root="{root}"', *overrides], name=name, **options)

    return start


@pytest.fixture(scope="module")
def undisturbed(federation, start):
    """The adapter of a run to which nothing happens."""
    run = start("undisturbed")
    assert run.wait(1200).completed
    return adapter(run)


def adapter(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(run, other):
    mine = adapter(run)
    return mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)


def of(run, name):
    return [event for event in run.events() if event["event"] == name]


def drops(run):
    return [(event["round"], event["node"]) for event in of(run, "node-dropped") if event["phase"] == "train"]


def training(node):
    """Wait until the worker of a node trains, and return its process id."""

    def trains():
        try:
            health = ask(node.state / "worker.sock", 30.0)
        except WorkerError:
            return None
        return health.pid if health.job.startswith("train") else None

    return wait_for(trains)


def kill(member, part):
    """kill -9 a part and wait until its supervisor has started another one."""
    before = member.pid(part)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: member.parts()[part]["pid"] not in (None, before))


def in_round(run, number, node):
    """Wait until a round trains on a node."""
    run.wait_for_event("round-started", 900, round=number)
    return training(node)


def test_the_serverapp_is_killed_in_training(whole, start, undisturbed):
    run = start("serverapp")
    in_round(run, 2, whole.nodes[0])
    whole.superlink.app_process().kill()
    assert not run.wait().completed
    assert not of(run, "run-finished")
    again = start(resume="serverapp")
    assert again.wait().completed
    assert of(again, "run-started")[-1]["first_round"] == 2
    assert same(again, undisturbed)


def test_the_superlink_is_killed_in_training(whole, start, undisturbed):
    run = start("superlink")
    in_round(run, 2, whole.nodes[0])
    kill(whole.superlink, "superlink")
    whole.superlink.wait_until_ready()
    whole.wait_for_online(2)
    assert not run.wait().completed
    again = start(resume="superlink")
    assert again.wait().completed
    assert of(again, "run-started")[-1]["first_round"] == 2
    assert same(again, undisturbed)


def test_a_worker_is_killed_in_training(whole, start):
    run = start("worker", QUORUM)
    os.kill(in_round(run, 1, whole.nodes[0]), signal.SIGKILL)
    assert run.wait().completed
    assert drops(run) == [(1, "0")]
    assert "it was killed, crashed or ran out of memory" in of(run, "node-dropped")[0]["reason"]
    assert [event["replies"] for event in of(run, "aggregated")] == [1, 2, 2]


def test_a_supernode_is_killed_in_training(whole, start):
    run = start("supernode", [*QUORUM, "server.deadline=120"])
    in_round(run, 1, whole.nodes[0])
    kill(whole.nodes[0], "supernode")
    assert run.wait(1200).completed
    assert (1, "0") in drops(run)
    assert of(run, "aggregated")[0]["replies"] == 1
    whole.wait_for_online(2, 300)  # a minute later: the run may be over by then


@pytest.mark.parametrize("part", ["worker", "supernode", "superlink"])
def test_a_part_is_killed_before_and_after_training(part, whole, start, undisturbed):
    member = whole.superlink if part == "superlink" else whole.nodes[0]
    kill(member, part)
    if part == "superlink":
        member.wait_until_ready()
        whole.wait_for_online(2)
    run = start(f"before-{part}")
    assert run.wait(1200).completed
    assert not drops(run)
    assert same(run, undisturbed)
    kill(member, part)
    member.wait_until_ready()
    whole.wait_for_online(2)
    assert same(run, undisturbed)


def test_the_serverapp_is_killed_before_training(whole, start, undisturbed):
    run = start("early")
    run.wait_for_event("run-started")
    whole.superlink.app_process().kill()
    assert not run.wait().completed
    again = start(resume="early")
    assert again.wait().completed
    assert same(again, undisturbed)


def test_a_node_slower_than_the_deadline(whole, start):
    run = start("slow", [*QUORUM, "server.deadline=60"])
    worker = in_round(run, 1, whole.nodes[0])
    os.kill(worker, signal.SIGSTOP)
    try:
        run.wait_for_event("aggregated", 900, round=1)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert run.wait(1200).completed
    assert (1, "0") in drops(run)


def test_a_node_that_joins_late(whole, start):
    late = whole.nodes[1]
    late.stop()
    run = start("late", [*QUORUM, "rounds=8"])
    in_round(run, 1, whole.nodes[0])
    late.start()
    assert run.wait(1200).completed
    asked = [event["asked"] for event in of(run, "aggregated")]
    assert (asked[0], asked[-1]) == (1, 2)


@pytest.mark.parametrize("seconds", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_the_network_is_cut_in_mid_upload(seconds, whole, start, proxy):
    # After some 40 s the SuperLink counts the node as gone, and rounds go on without it until it is back.
    run = start(f"cut-{seconds}", [*QUORUM, "server.deadline=300", f"rounds={3 if seconds < 30 else 16}"])
    in_round(run, 1, whole.nodes[1])
    proxy.cut_at_next_upload()
    wait_for(lambda: proxy.is_cut)
    time.sleep(seconds)
    proxy.mend()
    assert run.wait(1200).completed
    assert set(drops(run)) <= {(1, "1")}
    assert of(run, "aggregated")[-1]["replies"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_federation_whose_process_is_killed(number, tmp_path):
    folder = tmp_path / "f"
    code = f"""
import time
from pathlib import Path
from fedllm.node.federation import Federation
with Federation(Path({str(folder)!r}), 1):
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for((folder / "superlink" / "superlink.toml").is_file)
        federation = Federation(folder)
        wait_for(lambda: federation.superlink.parts().get("superlink", {}).get("pid"))
        process.send_signal(number)
        process.wait(60)
        wait_for(lambda: not federation.running and not federation.superlink.processes(), 120)
    finally:
        process.kill()
        process.wait()
