"""A worker in a thread, on a real socket, whose jobs are plain functions: queue, errors, sockets, versions."""

import gc
import os
import socket as sockets
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedllm import client, interruption
from fedllm.errors import ConfigError, PlanError, WorkerError
from fedllm.node import forward as forwarding
from fedllm.node.endpoint import owned
from fedllm.node.forward import WORKER_SOCKET, WORKER_TIMEOUT, forward
from fedllm.node.health import ask
from fedllm.node.worker import Worker

pytestmark = pytest.mark.timeout(60)


class Running:
    """A worker that serves in a thread until it is stopped."""

    def __init__(self, path, **options):
        self.path = path
        self.worker = Worker(**options)
        self.thread = threading.Thread(target=self.worker.serve, args=(path,))
        self.thread.start()
        eventually(lambda: ask(path), WorkerError)

    def stop(self):
        self.worker.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


def eventually(condition, ignored=(), seconds=20.0):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except ignored:
            pass
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s" / "w.sock"


@pytest.fixture
def start(path, monkeypatch):
    """Start workers that answer with the given function."""
    running = []

    def start(answer, path=path, **options):
        monkeypatch.setitem(
            client.ANSWERS, "train", lambda message, context: _reply(answer, message, context)
        )
        running.append(Running(path, **options))
        return running[-1]

    yield start
    for one in running:
        one.stop()
    gc.unfreeze()


def _reply(answer, message, context):
    return Message(answer(message, context) or RecordDict(), reply_to=message)


def send(path, number=0, ttl=30.0, timeout=5.0, content=None):
    content = content or RecordDict({"config": ConfigRecord({"server-round": number})})
    message = Message(content, dst_node_id=1, message_type="train", ttl=ttl)
    settings = {WORKER_SOCKET: str(path), WORKER_TIMEOUT: timeout, "name": "hospital"}
    return forward("train", message, Context(7, 1, settings, RecordDict(), {"rounds": 3})).content


def number_of(message):
    return int(message.content["config"]["server-round"])


class Gate:
    """A job that tells which messages it got, and waits until it may go on."""

    def __init__(self):
        self.seen, self.open = [], threading.Event()

    def __call__(self, message, context):
        self.seen.append(number_of(message))
        while not self.open.wait(0.01):
            interruption.check()
        return RecordDict({"config": ConfigRecord({"answer": number_of(message)})})


def test_content_and_context_arrive_and_the_answer_comes_back(start, path):
    def answer(message, context):
        record = ConfigRecord(
            {"run": context.run_id, "rounds": context.run_config["rounds"], "pid": os.getpid()}
        )
        return RecordDict({"config": record, **message.content})

    start(answer)
    data = os.urandom(9 << 20)  # more than gRPC takes in one message
    array = Array("uint8", (len(data),), "s", data)
    content = send(path, content=RecordDict({"arrays": ArrayRecord({"x": array})}))
    assert content["arrays"]["x"].data == data
    assert dict(content["config"]) == {"run": 7, "rounds": 3, "pid": os.getpid()}


def test_one_at_a_time_in_order_and_health_tells(start, path):
    gate = Gate()
    start(gate, max_waiting=2)
    with ThreadPoolExecutor() as pool:
        answers = []
        for number in (1, 2, 3):
            answers.append(pool.submit(send, path, number))
            eventually(lambda: len(gate.seen) + ask(path).jobs_waiting == len(answers))
        health = ask(path)
        assert (gate.seen, health.jobs_waiting) == ([1], 2)
        assert health.job == "train, run 7, round 1, node hospital"
        assert health.busy_seconds > 0
        with pytest.raises(WorkerError, match="2 messages wait for it already"):
            send(path, 4)
        gate.open.set()
        assert [answer.result()["config"]["answer"] for answer in answers] == [1, 2, 3]
    eventually(lambda: ask(path).busy_seconds == 0)
    health = ask(path)
    assert (health.jobs_done, health.jobs_failed, health.jobs_waiting, health.job) == (3, 0, 0, "")
    assert health.resident_bytes > 1e7
    assert health.worked_seconds > 0


def test_a_client_that_goes_away_takes_its_job_along(start, path):
    gate = Gate()
    start(gate)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(send, path, 1, ttl=1.0)
        eventually(lambda: gate.seen == [1])
        waiting = pool.submit(send, path, 2, ttl=0.5)
        for late in (running, waiting):
            with pytest.raises(WorkerError, match="did not finish train within the"):
                late.result()
        eventually(lambda: ask(path).jobs_failed == 1)
        gate.open.set()
        assert send(path, 3)["config"]["answer"] == 3
    assert gate.seen == [1, 3]  # the second never began


def test_errors_arrive_as_what_they_were_and_spoil_nothing(start, path):
    def answer(message, context):
        if number_of(message) == 1:
            raise PlanError("node 1: too small")
        if number_of(message) == 2:
            raise ValueError("first line\nsecond line")

    start(answer)
    with pytest.raises(PlanError, match=r"^node 1: too small$"):
        send(path, 1)
    with pytest.raises(WorkerError, match=r"^ValueError: first line second line$"):
        send(path, 2)
    assert send(path, 3) == RecordDict()
    assert ask(path).jobs_failed == 2


def test_another_version_is_refused(start, path, monkeypatch):
    start(lambda message, context: None)
    monkeypatch.setattr("fedllm.node.frames.__version__", "0.0.1")
    monkeypatch.setattr(forwarding, "to_frames", lambda packed: iter([_opening("0.0.2")]))
    with pytest.raises(WorkerError, match=r"this worker has fedllm 0\.0\.1.*0\.0\.2; install one version"):
        send(path)


def _opening(version):
    from fedllm.node.worker_pb2 import Frame, Opening

    return Frame(opening=Opening(version=version))


def test_messages_that_wait_go_to_the_next_worker(start, path):
    gate = Gate()
    first = start(gate)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(send, path, 1)
        eventually(lambda: gate.seen == [1])
        waiting = pool.submit(send, path, 2)
        eventually(lambda: ask(path).jobs_waiting == 1)
        first.worker.stop()
        gate.open.set()
        assert running.result()["config"]["answer"] == 1
        first.stop()
        start(gate)
        assert waiting.result()["config"]["answer"] == 2


def test_a_worker_that_comes_up_is_waited_for_and_none_is_named(start, path):
    with pytest.raises(
        WorkerError, match=r"no worker answered on .*w\.sock within 0\.3 s \(there is no such socket\)"
    ):
        send(path, timeout=0.3)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(send, path, timeout=20)
        time.sleep(0.3)
        start(lambda message, context: None)
        assert early.result() == RecordDict()


@pytest.mark.parametrize("value", [0, -1, "soon", True, float("nan")])
def test_the_time_to_wait_must_be_positive(path, value):
    with pytest.raises(ConfigError, match=WORKER_TIMEOUT):
        send(path, timeout=value)


def test_the_socket_is_private_and_gone_afterwards(start, path):
    running = start(lambda message, context: None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    running.stop()
    assert list(path.parent.iterdir()) == []


def test_a_live_socket_is_refused_and_keeps_working(start, path):
    start(lambda message, context: None)
    with pytest.raises(
        WorkerError, match=rf"a worker \(process {os.getpid()}\) has the socket .*w\.sock already"
    ):
        Worker().serve(path)
    assert send(path) == RecordDict()


def test_what_a_dead_worker_left_is_replaced(start, path):
    path.parent.mkdir(mode=0o700)
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name("w.sock.lock").write_text("999999")
    with pytest.raises(WorkerError, match="nobody listens on the socket"):
        send(path, timeout=0.3)
    start(lambda message, context: None)
    assert send(path) == RecordDict()


def test_a_file_in_the_place_of_the_socket_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(WorkerError, match="is there and no socket"), owned(path):
        pass
    assert path.read_text() == "precious"


def test_a_path_that_no_socket_can_have(tmp_path):
    path = tmp_path / ("x" * 100) / "w.sock"
    with pytest.raises(WorkerError, match="Linux allows 107"):
        Worker().serve(path)
    assert not path.parent.exists()


def test_a_job_finds_what_a_process_of_its_own_would(start, path, tmp_path, monkeypatch):
    apps = {}
    for name in ("one", "two"):
        apps[name] = tmp_path / name
        apps[name].mkdir()
        (apps[name] / "same_name.py").write_text(f"who = {name!r}")
    found = []

    def answer(message, context):
        import same_name

        found.append(
            (
                os.getcwd(),
                same_name.who,
                os.environ.get("LEFT"),
                torch.rand(1).item(),
                torch.is_grad_enabled(),
            )
        )
        os.environ["LEFT"] = "behind"
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        assert torch.rand(1).dtype == torch.float64

    here = os.getcwd()
    start(answer)
    for name in ("one", "one", "two"):
        monkeypatch.setattr("fedllm.node.messages._module_folders", lambda name=name: [str(apps[name])])
        monkeypatch.setattr("fedllm.node.messages.os.getcwd", lambda name=name: str(apps[name]))
        send(path)
    monkeypatch.undo()
    assert [entry[0] for entry in found] == [str(apps[name]) for name in ("one", "one", "two")]
    assert [entry[1] for entry in found] == ["one", "one", "two"]
    assert {entry[2:] for entry in found} == {(None, found[0][3], True)}
    assert os.getcwd() == here
    assert not {str(folder) for folder in apps.values()} & set(sys.path)


def test_a_working_directory_that_is_gone_is_named(start, path, monkeypatch):
    start(lambda message, context: None)
    monkeypatch.setattr("fedllm.node.messages.os.getcwd", lambda: "/no/such/folder")
    with pytest.raises(WorkerError, match="cannot enter /no/such/folder"):
        send(path)
