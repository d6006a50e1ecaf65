"""Importance on its way from a client's training to the server."""

import math

import pytest
import torch
from flwr.app import ArrayRecord

from fedllm import registry
from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.errors import ReplyError
from fedllm.importance_report import read_importance
from fedllm.lora.importance import check_report
from fedllm.models import load_bundle
from fedllm.records import IMPORTANCE, encode
from fedllm.tasks import get_task
from fedllm.update import TrainJob


def train(ask, steps=4, state=None):
    config = registry.config_from_flat({"model.name": "tiny-random:bert", "lora.rank": 4})
    bundle = load_bundle(config, ("a", "b"))
    bundle.load_adapter_state(bundle.initial_state if state is None else state(bundle), any_ranks=True)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 50, (6,), generator=generator).tolist() for _ in range(20)]
    examples = Encoded.from_lists(tokens, [i % 2 for i in range(20)])
    settings = TrainConfig(batch_size=4, learning_rate=1e-2, local_steps=steps)
    torch.manual_seed(0)  # for dropout
    task, start = get_task(config.task), bundle.adapter_state()
    job = TrainJob(bundle, task, examples, settings, 1, 1, "7", start, ask_importance=ask)
    return bundle, registry.build("clients", "backprop", {}).run(job)


def test_every_adapted_module_is_told_of_and_training_is_the_same():
    bundle, asked = train(True)
    _, plain = train(False)
    assert IMPORTANCE not in plain.extras
    assert all(torch.equal(asked.arrays[name], plain.arrays[name]) for name in plain.arrays)
    report = read_importance("7", encode(asked.extras[IMPORTANCE]))
    check_report("7", report, list(bundle.ranks))
    assert math.fsum(report.scores.values()) == pytest.approx(1.0, abs=1e-5)
    assert {len(curve) for curve in report.curves.values()} == {4}
    assert all(curve[-1] == pytest.approx(1.0) for curve in report.curves.values())


def test_modules_that_the_node_does_not_hold_are_left_out():
    def half(bundle):
        kept = list(bundle.ranks)[:3]
        return {
            name: tensor
            for name, tensor in bundle.initial_state.items()
            if bundle.is_head(name) or any(f"{module}.lora" in name for module in kept)
        }

    bundle, result = train(True, state=half)
    assert set(result.extras[IMPORTANCE]) == set(bundle.ranks)
    assert len(bundle.ranks) == 3


def test_one_step_from_a_fresh_adapter_tells_nothing():
    """B is still zero: nothing has had an effect on the loss, and the adapter goes out without a report."""
    _, result = train(True, steps=1)
    assert result.extras == {}
    assert result.arrays


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_a_report_of_another_form_is_refused_by_name(shape):
    with pytest.raises(ReplyError, match="node 7: importance of layer has shape"):
        read_importance("7", encode({"layer": torch.ones(shape)}))
    assert read_importance("7", ArrayRecord()).scores == {}
