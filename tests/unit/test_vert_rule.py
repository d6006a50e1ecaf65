"""Rules among the replies that VERT keeps, as weights from sketches."""

import pytest
import torch
from fedllm.strategies.robust import rules
from fedllm.strategies.vert.rule import WEIGHTS, weigh_kept

GENERATOR = torch.Generator().manual_seed(3)
UPDATES = torch.randn(12, 40, generator=GENERATOR) + 1.0


def test_mixing_and_median_by_weights_are_the_median_of_the_mixtures():
    weights = rules.mixed_geometric_median_weights(UPDATES, 3)
    mixed = rules.nnm(UPDATES, 3)
    expected = rules.geometric_median_weights(mixed) @ mixed
    assert torch.allclose(weights @ UPDATES, expected, atol=1e-5)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert (weights > 0).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_mean_of_the_weighed_is_the_rules_sum(name):
    factors = torch.tensor([0.0, 1.0, 0.5] + [1.0] * 9)
    weighed = weigh_kept(factors, UPDATES, WEIGHTS[name])
    kept = factors[1:, None] * UPDATES[1:]
    assert torch.equal(weighed > 0, factors > 0)
    assert torch.allclose(weighed @ UPDATES / 11, WEIGHTS[name](kept) @ kept, atol=1e-5)
    assert not weigh_kept(torch.zeros(12), UPDATES, WEIGHTS[name]).any()


def test_a_colluding_fifth_moves_the_mixed_median_less_than_the_mean():
    pushed = UPDATES.clone()
    pushed[:2] -= 6.0
    honest = UPDATES[2:].mean(0)
    moved = {name: (WEIGHTS[name](pushed) @ pushed - honest).norm() for name in WEIGHTS}
    assert moved["mixed-geometric-median"] < 0.5 * (pushed.mean(0) - honest).norm()


def test_few_replies_are_simply_averaged():
    """A fifth of four is nobody: every mixture is the mean."""
    weights = WEIGHTS["mixed-geometric-median"](UPDATES[:4])
    assert torch.allclose(weights, torch.full((4,), 0.25), atol=1e-6)
