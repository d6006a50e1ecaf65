"""What speaks for each client over many rounds."""

import pytest
import torch
from fedllm.strategies.vert.evidence import Evidence


def test_a_running_mean_begins_with_the_first_round():
    evidence = Evidence(0.5, 10)
    evidence.weigh(["a", "b"], torch.tensor([1.0, -2.0]))
    evidence.weigh(["b"], torch.tensor([1.0]))
    assert evidence.of(["a", "b", "never"]).tolist() == [1.0, -0.5, 0.0]


def test_who_was_not_weighed_for_longest_is_forgotten():
    evidence = Evidence(0.5, 2)
    evidence.weigh(["a", "b"], torch.tensor([1.0, 2.0]))
    evidence.weigh(["a"], torch.tensor([1.0]))
    evidence.weigh(["c"], torch.tensor([3.0]))
    assert evidence.of(["a", "b", "c"]).tolist() == [1.0, 0.0, 3.0]


def test_it_survives_a_checkpoint_with_its_order():
    first, second = Evidence(0.2, 2), Evidence(0.2, 2)
    first.weigh(["a", "b"], torch.tensor([0.3, 0.1]))
    second.load_state_dict(first.state_dict())
    for evidence in (first, second):
        evidence.weigh(["c"], torch.tensor([0.7]))
    assert torch.equal(first.of(["a", "b", "c"]), second.of(["a", "b", "c"]))
    assert second.of(["a", "b"]).tolist() == pytest.approx([0.0, 0.1])
