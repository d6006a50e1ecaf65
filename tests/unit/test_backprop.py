"""Back-propagation against autograd by hand."""

import pytest
import torch
from fedllm.clients.backprop import Backprop

from fedllm.batches import train_batches
from fedllm.errors import TrainError
from tests.unit.test_strategy_contract import job


def sgd_by_hand(task, rate, head_rate, steps, mu=0.0):
    """Plain SGD with one gradient per batch, written out."""
    parameters = task.bundle.trainable()
    start = {name: value.detach().clone() for name, value in parameters.items()}
    task.bundle.model.train()
    for _, indices in zip(range(steps), train_batches(task.examples, task.train, task.seed), strict=False):
        batch = task.task.collate(task.examples, indices, task.bundle.tokenizer.pad_token_id)
        gradients = torch.autograd.grad(task.task.loss(task.bundle.model, batch), list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                step = head_rate if task.bundle.is_head(name) else rate
                parameter -= step * (gradient + mu * (parameter - start[name]))
    task.bundle.model.eval()
    return task.bundle.adapter_state()


@pytest.fixture
def without_dropout(monkeypatch):
    def build(**train):
        task = job(local_steps=3, head_learning_rate=0.05, **train)
        for module in task.bundle.model.modules():
            if isinstance(module, torch.nn.Dropout):
                monkeypatch.setattr(module, "p", 0.0)
        return task

    return build


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_sgd_is_sgd(without_dropout, mu):
    expected = sgd_by_hand(without_dropout(), 0.01, 0.05, 3, mu)
    update = Backprop(optimizer="sgd", max_grad_norm=0.0, proximal_mu=mu)
    found = update.run(without_dropout()).arrays
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(without_dropout, pieces):
    whole = Backprop(optimizer="sgd").run(without_dropout())
    cut = Backprop(optimizer="sgd", gradient_accumulation=pieces).run(without_dropout())
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    for name in whole.arrays:
        torch.testing.assert_close(cut.arrays[name], whole.arrays[name], rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing(without_dropout):
    plain = Backprop().run(without_dropout()).arrays
    checkpointed = Backprop(gradient_checkpointing=True).run(without_dropout()).arrays
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-6)


def test_clipping_bounds_a_step(without_dropout):
    task = without_dropout()
    result = Backprop(optimizer="sgd", max_grad_norm=1e-3).run(task)
    moved = torch.sqrt(sum((result.arrays[k] - task.start[k]).square().sum() for k in task.start))
    assert 0 < moved <= 3 * 0.05 * 1e-3


def test_a_loss_that_is_not_finite_names_step_and_client(without_dropout):
    task = without_dropout()
    state = {name: value.clone() for name, value in task.start.items()}
    head = next(name for name in state if task.bundle.is_head(name))
    state[head].fill_(3e38)
    task.bundle.load_adapter_state(state)
    with pytest.raises(TrainError, match=r"client 0, round 1: the loss of step 1 is"):
        Backprop().run(task)
    assert all(parameter.grad is None for parameter in task.bundle.trainable().values())
