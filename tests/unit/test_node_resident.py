"""A real worker process: the same bits as in the message's own process, nothing loaded twice, kill -9, memory."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedllm import client, registry
from fedllm.errors import FedLLMError, WorkerError
from fedllm.models import load_bundle
from fedllm.node.forward import WORKER_SOCKET, WORKER_TIMEOUT, forward
from fedllm.node.health import ask
from fedllm.records import encode
from tests.unit.test_server import WORDS, write_rows

pytestmark = pytest.mark.timeout(280)


class WorkerProcess:
    """A worker with as many threads as this process may have; started again by :meth:`start`."""

    def __init__(self, folder):
        self.socket = folder / "w.sock"
        self.log = folder / "log"
        self.process = None

    def start(self, *options):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedllm.node.worker", "--socket", str(self.socket), *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def stop(self):
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = WorkerProcess(tmp_path_factory.mktemp("w"))
    worker.start()
    yield worker
    worker.process.kill()
    worker.process.wait()


@pytest.fixture
def flat(tmp_path):
    return {
        "model.name": "tiny-random:bert",
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "data.source": str(write_rows(tmp_path / "train.csv", 0, 60)),
        "data.test-fraction": 0.2,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.batch-size": 8,
        "train.local-steps": 3,
    }


def context(worker, flat, **settings):
    node = {"partition-id": 0, "num-partitions": 2, WORKER_SOCKET: str(worker.socket), WORKER_TIMEOUT: 120}
    return Context(7, 1, {**node, **settings}, RecordDict(), flat)


def message(flat, server_round, update="backprop", **metadata):
    bundle = load_bundle(registry.config_from_flat(flat), tuple(sorted(WORDS)))
    request = ConfigRecord(
        {
            "server-round": server_round,
            "seed": 3,
            "client": update,
            "client-parameters": "{}",
            "upload-codec": "fp32",
        }
    )
    content = RecordDict({"arrays": encode(bundle.initial_state), "config": request})
    return Message(content, dst_node_id=1, message_type="train", **metadata)


def bits(reply):
    return {name: array.data for name, array in reply.content["arrays"].items()}


def test_the_worker_gives_the_same_bits_as_the_messages_own_process(worker, flat):
    here = {number: client.train(message(flat, number), context(worker, flat)) for number in (1, 2)}
    assert bits(here[1]) != bits(here[2])
    for number in (1, 2, 1, 2):
        there = forward("train", message(flat, number), context(worker, flat))
        assert bits(there) == bits(here[number])
        metrics = [{**reply.content["metrics"]} for reply in (there, here[number])]
        for name in ("seconds", "peak-bytes"):
            assert all(entry.pop(name) > 0 for entry in metrics)
        assert metrics[0] == metrics[1]
    before = ask(worker.socket)
    scores = [
        answer(message(flat, 1), context(worker, flat)).content["metrics"]
        for answer in (client.evaluate, lambda *arguments: forward("evaluate", *arguments))
    ]
    assert scores[0]["loss"] == scores[1]["loss"]
    described = forward("describe", message(flat, 1), context(worker, flat)).content["config"]
    assert (described["name"], described["num-examples"]) == ("0", 24)
    after = ask(worker.socket)
    assert (after.model_loads, after.data_loads) == (before.model_loads, before.data_loads) == (1, 1)
    assert after.models == ("tiny-random:bert",)
    assert after.jobs_done == before.jobs_done + 2


BREAKING = """
import torch

class Breaking:
    def run(self, job):
        with torch.no_grad():
            for parameter in job.bundle.model.parameters():
                parameter.fill_(1.0)
        raise RuntimeError("broken in the middle")
"""


def test_a_job_that_fails_does_not_spoil_the_next(worker, flat, tmp_path, monkeypatch):
    (tmp_path / "breaking_client.py").write_text(BREAKING)
    monkeypatch.syspath_prepend(tmp_path)  # as Flower does with the folder of an app
    good = bits(forward("train", message(flat, 1), context(worker, flat)))
    with pytest.raises(FedLLMError, match="backprob"):
        forward("train", message(flat, 1, "backprob"), context(worker, flat))
    loads = ask(worker.socket).model_loads
    with pytest.raises(WorkerError, match=r"^RuntimeError: broken in the middle$"):
        forward("train", message(flat, 1, "breaking_client:Breaking"), context(worker, flat))
    assert bits(forward("train", message(flat, 1), context(worker, flat))) == good
    assert (
        ask(worker.socket).model_loads == loads + 1
    )  # the model was in the middle of something and was dropped
    assert "train, run 7, round 1, node 0: failed after" in worker.log.read_text()


def test_a_job_that_nobody_waits_for_stops(worker, flat):
    long = {**flat, "train.local-steps": 100_000_000}
    with pytest.raises(WorkerError, match="did not finish train within the 2 s"):
        forward("train", message(flat, 1, ttl=2.0), context(worker, long))
    started = time.monotonic()
    forward("train", message(flat, 1), context(worker, flat))
    assert time.monotonic() - started < 60


def test_kill_9_in_the_middle_of_a_job_then_the_next_message_works(worker, flat):
    long = {**flat, "train.local-steps": 100_000_000}
    good = bits(forward("train", message(flat, 2), context(worker, flat)))
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(forward, "train", message(flat, 1), context(worker, long))
        while not (health := ask(worker.socket)).job:
            time.sleep(0.05)
        worker.process.send_signal(signal.SIGKILL)
        assert worker.process.wait(10) == -signal.SIGKILL
        with pytest.raises(
            WorkerError, match=rf"process {health.pid}\) ended .* after it had begun with train"
        ):
            lost.result(20)
        waiting = pool.submit(forward, "train", message(flat, 2), context(worker, flat))
        worker.start("--memory-limit", "1KB")
        assert bits(waiting.result(120)) == good
    health = ask(worker.socket)
    assert (health.jobs_done, health.memory_limit, len(health.models)) == (1, 1000, 0)
    assert health.kept_bytes < 10_000  # the examples, used last; the model had to go
    assert worker.stop() == 0
    assert not worker.socket.exists()
    text = worker.log.read_text()
    assert "train, run 7, round 2, node 0: " in text
    assert "memory limit of 1000 bytes: forgot a model" in text


@pytest.mark.slow
def test_two_hundred_jobs_take_no_more_memory_than_twenty(tmp_path, flat):
    worker = WorkerProcess(tmp_path)
    worker.start()
    try:
        resident = []
        for number in range(200):
            forward("train", message(flat, number), context(worker, flat))
            if number % 3 == 0:
                forward("evaluate", message(flat, number), context(worker, flat))
            resident.append(ask(worker.socket).resident_bytes)
        growth = max(resident[100:]) - max(resident[:20])
        print(f"resident after 20 jobs {max(resident[:20])}, after 200 {resident[-1]}")
        assert growth < 8 << 20
    finally:
        worker.process.kill()
        worker.process.wait()
