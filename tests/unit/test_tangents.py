"""Tangents: the same bits everywhere, the right moments, and gradients that a server rebuilds from scalars."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.tangents import draw, from_scalars, head_seed, is_second_factor, project, regenerate

DISTRIBUTIONS = ["rademacher", "gaussian"]
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}


def dense(seed, step, count, shapes, distribution):
    """All tangents as rows of one matrix, in float64."""
    return torch.stack(
        [
            torch.cat([draw(seed, step, k, name, shape, distribution).flatten() for name, shape in shapes.items()])
            for k in range(1, count + 1)
        ]
    ).double()  # fmt: skip


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()]).double()


@pytest.mark.parametrize(
    ("distribution", "digest"), [("rademacher", "517fc64b6fdd6db6"), ("gaussian", "a002877e3b6c87c3")]
)
def test_bits_never_change(distribution, digest):
    values = draw(7, 3, 2, "layer.lora_B.weight", (33, 5), distribution)
    assert hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_rademacher_reads_the_bits_of_philox():
    from fedllm.seeding import derive_seed

    key = derive_seed(5, "tangent", 1, 2, "w")
    words = [int(word) for word in np.random.Philox(key=key).random_raw(2)]
    expected = [1.0 if words[i // 64] >> (i % 64) & 1 else -1.0 for i in range(100)]
    assert draw(5, 1, 2, "w", (10, 10), "rademacher").flatten().tolist() == expected


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments(distribution):
    """Mean 0, variance 1; the bounds are 5 standard errors, so that a fair draw fails once in a million."""
    values = draw(1, 1, 1, "w", (400_000,), distribution).double()
    fourth = {"rademacher": 1.0, "gaussian": 3.0}[distribution]
    assert abs(values.mean()) < 5 / 400_000**0.5
    assert abs(values.square().mean() - 1) <= 5 * ((fourth - 1) / 400_000) ** 0.5
    assert (values**4).mean() == pytest.approx(fourth, rel=0.05)
    assert abs((values[1:] * values[:-1]).mean()) < 5 / 400_000**0.5


def test_gaussian_follows_the_normal_distribution():
    """Kolmogorov–Smirnov: √n D above 2.3 has a probability of 5e-5."""
    values = draw(1, 1, 1, "w", (20_000,), "gaussian").double().sort().values
    expected = torch.special.ndtr(values)
    distance = (expected - torch.arange(20_000) / 20_000).abs().max()
    assert distance * 20_000**0.5 < 2.3


def test_streams_differ_in_every_part_of_their_key():
    keys = [(s, t, k, n) for s in (1, 2) for t in (1, 2) for k in (1, 2) for n in ("a", "b")]
    rows = torch.stack([draw(*key, (4096,), "rademacher") for key in keys])
    correlation = rows @ rows.T / 4096
    assert (correlation - torch.eye(len(keys))).abs().max() < 6 / 64


@given(
    seed=st.integers(0, 2**63 - 1),
    count=st.integers(1, 5),
    distribution=st.sampled_from(DISTRIBUTIONS),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_regenerated_gradient_is_the_weighted_sum(seed, count, distribution, sizes):
    shapes = {f"w{i}": (size,) for i, size in enumerate(sizes)}
    scalars = draw(seed, 9, 9, "scalars", (count,), "gaussian")
    found = regenerate(seed, 2, scalars, shapes, distribution)
    expected = scalars.double() @ dense(seed, 2, count, shapes, distribution) / count
    assert list(found) == list(shapes)
    torch.testing.assert_close(flat(found), expected, rtol=1e-5, atol=1e-6)
    # One unit alone has the same bits as within the whole.
    assert all(
        torch.equal(regenerate(seed, 2, scalars, {name: shape}, distribution)[name], found[name])
        for name, shape in shapes.items()
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_projections_and_their_inverse(distribution):
    gradient = {name: draw(3, 1, 1, name, shape, "gaussian") for name, shape in SHAPES.items()}
    scalars = project(11, 4, 6, gradient, distribution)
    torch.testing.assert_close(
        scalars.double(), dense(11, 4, 6, SHAPES, distribution) @ flat(gradient), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_forward_gradients_are_unbiased_and_their_error_is_as_predicted(distribution):
    """E ĝ = g; E‖ĝ − g‖²/‖g‖² = (d ∓ 1)/K for Rademacher and Gaussian tangents. Bounds: 5 standard errors."""
    gradient = {name: draw(3, 1, 1, name, shape, "gaussian") for name, shape in SHAPES.items()}
    true, runs = flat(gradient), 600
    errors = {}
    for count in (1, 4):
        estimates = torch.stack(
            [
                flat(
                    regenerate(seed, 1, project(seed, 1, count, gradient, distribution), SHAPES, distribution)
                )
                for seed in range(runs)
            ]
        )
        deviation = (estimates.mean(0) - true).abs() / (estimates.std(0) / runs**0.5)
        assert deviation.max() < 5
        relative = (estimates - true).square().sum(1) / true.square().sum()
        predicted = (len(true) + (1 if distribution == "gaussian" else -1)) / count
        assert abs(relative.mean() - predicted) < 5 * relative.std() / runs**0.5
        errors[count] = float(relative.mean())
    assert errors[1] / errors[4] == pytest.approx(4, rel=0.25)


def test_the_server_rebuilds_adapter_and_heads_from_one_list_of_scalars():
    heads = {"head": (4, 3)}
    scalars = torch.arange(1.0, 6.0)
    found = from_scalars(8, 1, scalars, SHAPES, heads, 3, "rademacher")
    assert list(found) == [*SHAPES, "head"]
    alone = regenerate(8, 1, scalars[:3], SHAPES, "rademacher")
    assert all(torch.equal(found[name], alone[name]) for name in SHAPES)
    assert torch.equal(found["head"], regenerate(head_seed(8), 1, scalars[3:], heads, "rademacher")["head"])


@pytest.mark.parametrize(("count", "heads"), [(2, {}), (4, {}), (3, {"head": (2,)}), (2, {"head": (2,)})])
def test_a_wrong_number_of_scalars_is_refused(count, heads):
    with pytest.raises(ValueError, match=rf"found scalars of shape \({count},\), expected 3"):
        from_scalars(8, 1, torch.ones(count), SHAPES, heads, 3, "rademacher")


def test_second_factors_are_told_by_their_names():
    assert is_second_factor("base_model.model.encoder.layer.0.query.lora_B.weight")
    assert not is_second_factor("base_model.model.encoder.layer.0.query.lora_A.weight")
    assert not is_second_factor("base_model.model.classifier.weight")
