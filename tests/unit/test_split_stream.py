"""Split training through a real gRPC channel on loopback, and what may happen to a stream."""

import threading
import time

import pytest
import torch

from fedllm.errors import SplitError
from fedllm.split.frames import Packet
from fedllm.split.model import SplitModel
from fedllm.split.server import SplitServer
from fedllm.split.session import Session, Ticket
from fedllm.split.stream import SplitStream
from fedllm.split.trainer import GRADIENT, HEAD, HIDDEN, STEP, SplitTrainer
from tests.unit.test_split_cohort import batches, loss, whole
from tests.unit.test_split_model import build

CUTS = [3, 1, 2, 1]


class Round:
    """A server with one open session whose trainer runs in a thread."""

    def __init__(self, model, cuts, labels="server", mode="parallel", step_timeout=20.0, join_timeout=20.0):
        self.split = SplitModel(model)
        self.tickets = [Ticket(str(i), f"token-{i}", cut) for i, cut in enumerate(cuts)]
        self.session = Session(self.tickets, join_timeout=join_timeout, step_timeout=step_timeout)
        self.gradients = []
        parameters = list(model.parameters())
        self.trainer = SplitTrainer(
            self.split,
            self.session,
            torch.optim.SGD(parameters, lr=0.0),
            loss if labels == "server" else None,
            mode=mode,
            max_grad_norm=0.0,
            after_backward=lambda: self.gradients.append(
                [None if p.grad is None else p.grad.clone() for p in parameters]
            ),
        )
        self.server = SplitServer("127.0.0.1:0")
        self.thread = threading.Thread(target=self._train)

    def _train(self):
        try:
            self.trainer.run()
        except SplitError as error:
            self.failure = error

    def __enter__(self):
        self.server.open(self.session)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.session.close("test over")
        self.thread.join(20)
        self.server.close()
        assert not self.thread.is_alive()

    def stream(self, index=0, **options):
        return SplitStream(f"127.0.0.1:{self.server.port}", f"token-{index}", **options)


def run_client(round_, model, index, batch, labels, results, steps=1):
    """One client with a model of its own."""
    split, (ids, mask, y), cut = SplitModel(model), batch, CUTS[index]
    with round_.stream(index) as stream:
        for number in range(1, steps + 1):
            sent = split.front(ids, mask, cut)
            tensors = {"hidden": sent.float(), "mask": mask > 0}
            if labels == "server":
                stream.send(Packet(STEP, number, tensors | {"labels": y}))
            else:
                stream.send(Packet(STEP, number, tensors))
                output = stream.receive(HIDDEN).tensors["hidden"].double().requires_grad_()
                value, count = loss(split.head(output, mask), mask, y)
                value.backward()
                stream.send(
                    Packet(
                        HEAD,
                        number,
                        {"hidden": output.grad.float()},
                        {"targets": count, "loss": value.item()},
                    )
                )
            answer = stream.receive(GRADIENT)
            sent.backward(answer.tensors["hidden"].double())
            results[index] = answer.numbers["loss"]
        stream.finish()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t not in before and "split" in t.name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def together(targets):
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_split_is_unsplit_across_a_channel(family, labels):
    model = build(family)
    data = batches(classes=family == "bert")
    losses, counts, expected = whole(model, data)
    clients = [build(family) for _ in CUTS]
    results = {}
    with Round(model, CUTS, labels) as round_:
        together(
            [
                lambda i=i: run_client(round_, clients[i], i, data[i], labels, results)
                for i in range(len(CUTS))
            ]
        )
    assert [results[i] for i in range(len(CUTS))] == pytest.approx(losses, rel=1e-5)
    shares = [count / sum(counts) for count in counts]
    names = [name for name, _ in model.named_parameters()]
    (on_server,) = round_.gradients
    for name, gradient in zip(names, on_server, strict=True):
        total = torch.zeros(()) if gradient is None else gradient.clone()
        for client, share in zip(clients, shares, strict=True):
            own = client.get_parameter(name).grad
            total = total if own is None else total + share * own
        if name in expected:
            torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_who_is_first_does_not_matter(mode):
    outcomes = []
    for order in ([0, 1, 2], [2, 1, 0]):
        model, data, results = build("llama"), batches(classes=False), {}
        clients = [build("llama") for _ in CUTS]
        with Round(model, CUTS[:3], mode=mode) as round_:

            def late(i, place, round_=round_, clients=clients, data=data, results=results):
                time.sleep(0.15 * place)
                run_client(round_, clients[i], i, data[i], "server", results, steps=2)

            together([lambda i=i, place=place: late(i, place) for place, i in enumerate(order)])
        assert round_.trainer.steps == (2 if mode == "parallel" else 6)
        outcomes.append(
            (
                results,
                round_.gradients,
                [p.grad for c in clients for p in c.parameters() if p.grad is not None],
            )
        )
    assert outcomes[0][0] == outcomes[1][0]
    for first, second in zip(outcomes[0][2], outcomes[1][2], strict=True):
        assert torch.equal(first, second)


def step(hidden=None, mask=None, labels=None):
    _, good_mask, y = batches(classes=False)[0]
    hidden = torch.randn(2, 9, 16) if hidden is None else hidden
    return Packet(
        STEP,
        1,
        {
            "hidden": hidden,
            "mask": good_mask if mask is None else mask,
            "labels": y if labels is None else labels,
        },
    )


def good_client(round_, index, done):
    with round_.stream(index) as stream:
        for _ in range(2):
            stream.send(step())
            stream.receive(GRADIENT)
        stream.finish()
    done.append(index)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (
            lambda: step(hidden=torch.full((2, 9, 16), float("nan"))),
            "client 0: step 1, tensor 'hidden': values are not finite",
        ),
        (
            lambda: step(hidden=torch.randn(2, 9, 17)),
            r"expected hidden states \[batch, length, 16\], found \[2, 9, 17\]",
        ),
        (lambda: step(mask=torch.zeros(2, 9)), "a token in every row"),
        (lambda: step(labels=torch.zeros(7, dtype=torch.int64)), "expected labels for a batch"),
        (lambda: Packet("dance", 1), "sent 'dance', expected 'step'"),
        (lambda: Packet(STEP, 1, {"hidden": torch.ones(2, 9, 16)}), "expected the tensors"),
    ],
)
def test_a_bad_client_is_told_and_the_others_go_on(packet, message):
    done = []
    with Round(build("llama"), CUTS[:2]) as round_:

        def bad():
            with round_.stream(0) as stream:
                stream.send(packet())
                with pytest.raises(SplitError, match=message):
                    stream.receive(GRADIENT)
                done.append("told")

        together([bad, lambda: good_client(round_, 1, done)])
    assert sorted(map(str, done)) == ["1", "told"]
    assert round_.session.seats[0].reason
    assert round_.session.seats[1].reason is None


def test_a_client_killed_in_mid_stream():
    done = []
    with Round(build("llama"), CUTS[:2]) as round_:

        def killed():
            stream = round_.stream(0)
            stream.send(step())
            stream.close()

        together([killed, lambda: good_client(round_, 1, done)])
    assert done == [1]
    assert "lost" in round_.session.seats[0].reason or "ended" in round_.session.seats[0].reason


def test_a_client_slower_than_the_deadline():
    done = []
    with Round(build("llama"), CUTS[:2], step_timeout=0.5) as round_:

        def slow():
            with round_.stream(0) as stream:
                with pytest.raises(SplitError, match=r"client 0 sent nothing within 0\.5 s"):
                    stream.receive(GRADIENT)
                done.append("told")

        together([slow, lambda: good_client(round_, 1, done)])
    assert sorted(map(str, done)) == ["1", "told"]


def test_a_client_that_never_comes():
    done = []
    with Round(build("llama"), CUTS[:2], join_timeout=0.5) as round_:
        good_client(round_, 1, done)
    assert round_.session.seats[0].reason == "client 0 did not open its stream within 0.5 s"


def test_tokens():
    with Round(build("llama"), CUTS[:2]) as round_:
        with pytest.raises(SplitError, match="not one of this round's"):
            round_.stream(7)
        with round_.stream(0), pytest.raises(SplitError, match="has been used"):
            round_.stream(0)


def test_an_error_of_the_server_reaches_every_client(monkeypatch):
    def broken(self, parts):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("fedllm.split.cohort.CohortStep._forward", lambda self: broken(self, None))
    with Round(build("llama"), CUTS[:1]) as round_, round_.stream(0) as stream:
        stream.send(step())
        with pytest.raises(SplitError, match="the server could not do the step: CUDA out of memory"):
            stream.receive(GRADIENT)
    assert "CUDA" in str(round_.failure)


def test_an_address_that_nobody_answers():
    with pytest.raises(SplitError, match=r"127\.0\.0\.1:9 did not answer within 0\.3 s.*hsplitlora\.address"):
        SplitStream("127.0.0.1:9", "t", connect_timeout=0.3)


@pytest.mark.parametrize("address", ["192.0.2.1:5000", "example.org:5000", "0.0.0.0:0"])
def test_without_tls_only_on_loopback(address):
    with pytest.raises(SplitError, match="without TLS"):
        SplitStream(address, "t")
    with pytest.raises(SplitError, match="without TLS"):
        SplitServer(address)


def test_a_port_that_is_taken():
    first = SplitServer("127.0.0.1:0")
    try:
        with pytest.raises(SplitError, match="cannot listen on"):
            SplitServer(f"127.0.0.1:{first.port}")
    finally:
        first.close()
