"""The example's client and server against pooled data, in process."""

import sys
from pathlib import Path

import pytest
import torch
from fedllm.strategies.second_order.fagh import FAGH
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedllm.events import EventBus
from fedllm.records import HESSIAN_DIRECTION, HESSIAN_ROW, decode
from fedllm.rounds import run_rounds
from tests.fakes import FakeGrid, Recorder

pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "second_order"
CLIENTS = 4


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import client_app
        import digits

        load = digits.load
        digits.load = lambda mnist: tuple(values[:400] for values in load(mnist))
        yield client_app, digits
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in ("client_app", "digits"):
            sys.modules.pop(name, None)


def context(partition, network="logistic"):
    config = {"network": network, "mnist": "", "alpha": 1.0, "seed": 0}
    node = {"partition-id": partition, "num-partitions": CLIENTS}
    return Context(run_id=1, node_id=partition + 1, node_config=node, state=RecordDict(), run_config=config)


def test_every_training_digit_has_one_client(example):
    digits = example[1]
    parts = [digits.client_examples("", client, CLIENTS, 0.2, 3) for client in range(CLIENTS)]
    test_x, _ = digits.test_examples("")
    assert sum(len(y) for _, y in parts) + len(test_x) == 400
    counts = sum(y.bincount(minlength=10) for _, y in parts)
    y = digits.load("")[1]
    assert torch.equal(counts, y[torch.arange(len(y)) % 5 != 0].bincount(minlength=10))
    again = digits.client_examples("", 1, CLIENTS, 0.2, 3)
    assert torch.equal(again[0], parts[1][0])
    with pytest.raises(ValueError, match="logistic"):
        digits.build("resnet", 0)
    assert sum(p.numel() for p in digits.build("lenet", 0).parameters()) == 28_874


@pytest.mark.parametrize("network", ["logistic", "lenet"])
def test_mean_of_the_answers_is_gradient_and_product_of_the_pooled_loss(example, network):
    client_app, digits = example
    model = digits.build(network, 5)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator).div(100) for name, p in model.named_parameters()
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "config": ConfigRecord({"server-round": 1}),
            HESSIAN_DIRECTION: ArrayRecord(direction),
        }
    )
    sums: dict[str, dict[str, torch.Tensor]] = {"arrays": {}, HESSIAN_ROW: {}}
    total = 0
    for partition in range(CLIENTS):
        message = Message(content, dst_node_id=partition + 1, message_type="train")
        reply = client_app.train(message, context(partition, network))
        count = reply.content["metrics"]["num-examples"]
        total += count
        for record, found in sums.items():
            for name, value in decode(reply.content[record]).items():
                found[name] = found.get(name, 0) + count * value.double()

    parts = [digits.client_examples("", client, CLIENTS, 1.0, 0) for client in range(CLIENTS)]
    x, y = (torch.cat(values) for values in zip(*parts, strict=True))
    assert len(y) == total
    model.double()
    loss = torch.nn.functional.cross_entropy(model(x.double()), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    slope = sum((g * u).sum() for g, u in zip(gradient, direction.values(), strict=True))
    product = torch.autograd.grad(slope, list(model.parameters()))
    for (name, _), g, h in zip(model.named_parameters(), gradient, product, strict=True):
        torch.testing.assert_close(sums["arrays"][name] / total, g.detach(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(sums[HESSIAN_ROW][name] / total, h, rtol=1e-2, atol=1e-5)


def test_fagh_trains_with_these_clients(example):
    client_app, digits = example
    model = digits.build("logistic", 0)
    x, y = digits.test_examples("")

    def accuracy(arrays):
        model.load_state_dict(decode(arrays))
        return float((model(x).argmax(1) == y).double().mean())

    start = ArrayRecord(model.state_dict())
    grid = FakeGrid(range(1, CLIENTS + 1), lambda message, node: client_app.train(message, context(node - 1)))
    strategy = FAGH(fraction_evaluate=0.0)
    result = run_rounds(strategy, grid, start, 8)
    assert accuracy(result.arrays) > 0.8
    losses = [metrics["loss"] for metrics in result.train_metrics_clientapp.values()]
    assert losses[-1] < 0.4 * losses[0]


def test_a_client_without_a_digit_is_left_out_with_the_reason(example, monkeypatch):
    client_app, digits = example
    load = client_app.examples

    def examples(mnist, client, *rest):
        return tuple(values[: 400 * (client != 2)] for values in load(mnist, client, *rest))

    monkeypatch.setattr(client_app, "examples", examples)
    start = ArrayRecord(digits.build("logistic", 0).state_dict())
    grid = FakeGrid(range(1, CLIENTS + 1), lambda message, node: client_app.train(message, context(node - 1)))
    recorder = Recorder()
    with EventBus([recorder]) as events:
        result = run_rounds(FAGH(fraction_evaluate=0.0), grid, start, 2, events=events)
    dropped = [(event["round"], event["node"], event["reason"]) for event in recorder.of("node-dropped")]
    assert dropped == [(n, "3", "'num-examples' is 0, expected a positive whole number") for n in (1, 2)]
    assert all(torch.isfinite(tensor).all() for tensor in decode(result.arrays).values())
