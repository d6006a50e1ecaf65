"""Importance against autograd on the dense update, AdaLoRA's recursion by hand, and a planted weight."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedllm.errors import PlanError, ReplyError, TrainError
from fedllm.lora.factors import fold
from fedllm.lora.importance import (
    AdapterStep,
    Importance,
    ImportanceTracker,
    check_report,
    combine,
    energy_curve,
    triplet_sensitivity,
)


def random_step(seed, d=7, k=5, r=3, scale=2.0, true_rank=None):
    """An adapter with the gradients of a nonlinear loss of its update, and that loss."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, k, generator=generator, dtype=torch.float64)
    b = torch.randn(d, r, generator=generator, dtype=torch.float64)
    if true_rank is not None:
        b[:, true_rank:] = 0
    x = torch.randn(4, k, generator=generator, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()

    def loss(update):
        return (x @ update.T).sin().sum() + (update**2).sum()

    loss(scale * b @ a).backward()
    return AdapterStep(a.detach(), b.detach(), a.grad, b.grad, scale), loss


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("true_rank", [None, 2])
def test_sensitivities_are_those_of_autograd_on_the_dense_decomposition(seed, true_rank):
    step, loss = random_step(seed, true_rank=true_rank)
    found = triplet_sensitivity(step)
    u, values, vh = torch.linalg.svd(step.scale * step.lora_B @ step.lora_A, full_matrices=False)
    left, lam, right = u[:, :3].clone(), values[:3].clone(), vh[:3].clone()
    for tensor in (left, lam, right):
        tensor.requires_grad_()
    loss((left * lam) @ right).backward()
    torch.testing.assert_close(found.left, (left * left.grad).abs().detach())
    torch.testing.assert_close(found.values, (lam * lam.grad).abs().detach())
    torch.testing.assert_close(found.right, (right * right.grad).abs().detach())


def test_a_fresh_adapter_has_no_effect_yet():
    step, _ = random_step(0, true_rank=0)
    found = triplet_sensitivity(step)
    assert [tuple(entries.shape) for entries in found] == [(7, 3), (3,), (3, 5)]
    assert not any(entries.any() for entries in found)
    tracker = ImportanceTracker()
    tracker.update({"w": step})
    with pytest.raises(TrainError, match="two warm-up steps or more"):
        tracker.report({"w": fold(step.lora_A, step.lora_B)})


def test_the_tracker_follows_adaloras_recursion():
    steps = [{"u": random_step(seed)[0], "v": random_step(seed + 10, d=4)[0]} for seed in range(4)]
    tracker = ImportanceTracker(0.8, 0.6)
    for step in steps:
        tracker.update(step)
    scores = {}
    for name in ("u", "v"):
        mean = uncertainty = [0.0, 0.0, 0.0]
        for step in steps:
            found = triplet_sensitivity(step[name])
            mean = [0.8 * m + 0.2 * i for m, i in zip(mean, found, strict=True)]
            uncertainty = [
                0.6 * u + 0.4 * (i - m).abs() for u, i, m in zip(uncertainty, found, mean, strict=True)
            ]
        left, values, right = (m * u for m, u in zip(mean, uncertainty, strict=True))
        scores[name] = sum(
            float(values[j]) + float(left[:, j].mean()) + float(right[j].mean()) for j in range(3)
        )
    adapters = {name: fold(step.lora_A, step.lora_B, 2.0) for name, step in steps[-1].items()}
    report = tracker.report(adapters)
    total = sum(scores.values())
    assert report.scores == pytest.approx({name: score / total for name, score in scores.items()})
    values = torch.linalg.svdvals(adapters["u"].product())[:3] ** 2
    assert report.curves["u"] == pytest.approx((values.cumsum(0) / values.sum()).tolist())
    with pytest.raises(ValueError, match="smoothing factor"):
        ImportanceTracker(1.0)


class Adapted(nn.Module):
    """A frozen layer with a LoRA adapter."""

    def __init__(self, frozen, rank, generator):
        super().__init__()
        d, k = frozen.shape
        self.frozen = frozen
        self.a = nn.Parameter(torch.randn(rank, k, generator=generator) / math.sqrt(k))
        self.b = nn.Parameter(torch.zeros(d, rank))

    def forward(self, x):
        return x @ self.frozen.T + 2.0 * (x @ self.a.T) @ self.b.T


@pytest.mark.parametrize("planted", range(4))
@pytest.mark.parametrize("seed", range(3))
def test_a_weight_whose_true_update_is_large_ranks_first_after_warm_up(planted, seed):
    generator = torch.Generator().manual_seed(seed)
    width, rank = 24, 4
    frozen = [torch.randn(width, width, generator=generator) / math.sqrt(width) for _ in range(4)]
    layers = [Adapted(weight, rank, generator) for weight in frozen]
    truth = list(frozen)
    for index in range(4):
        size = 1.0 if index == planted else 0.05
        change = torch.randn(width, 2, generator=generator) @ torch.randn(2, width, generator=generator)
        truth[index] = truth[index] + size * change / change.norm() * frozen[index].norm()

    def run(x, maps):
        for layer in maps:
            x = x + torch.tanh(layer(x))
        return x

    teacher = [lambda x, weight=weight: x @ weight.T for weight in truth]
    parameters = [p for layer in layers for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    tracker = ImportanceTracker()
    for _ in range(40):
        x = torch.randn(64, width, generator=generator)
        loss = (run(x, layers) - run(x, teacher)).square().mean()
        loss.backward()
        tracker.update(
            {
                str(i): AdapterStep(layer.a, layer.b, layer.a.grad, layer.b.grad, 2.0)
                for i, layer in enumerate(layers)
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report({str(i): fold(layer.a, layer.b, 2.0) for i, layer in enumerate(layers)})
    assert math.fsum(report.scores.values()) == pytest.approx(1.0)
    assert max(report.scores, key=report.scores.get) == str(planted), report.scores
    check_report("n", report, [str(i) for i in range(4)])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_an_energy_curve_rises_concavely_to_one(values):
    values = sorted(values, reverse=True)
    curve = energy_curve(torch.tensor(values, dtype=torch.float64))
    assert curve[-1] == pytest.approx(1.0)
    steps = [high - low for low, high in zip((0.0, *curve), curve, strict=False)]
    assert all(step >= 0 for step in steps)
    assert all(second <= first + 1e-9 for first, second in itertools.pairwise(steps))


def test_gains_without_curves_are_logarithmic():
    gains = Importance({"w": 1.0}).gains("w", [0, 1, 3, 7])
    assert gains == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_gains_follow_the_curve_and_end_with_it():
    importance = Importance({"w": 1.0}, {"w": (0.5, 0.75, 1.0)})
    assert importance.gains("w", [0, 1, 2, 4, 8]) == [0, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(PlanError, match="importance of v: it has no energy curve"):
        importance.gains("v", [1])


NAMES = ["a", "b"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": 1.0}, "node bob: importance of b: it is missing"),
        ({"a": math.nan, "b": 1.0}, "node bob: importance of a: expected a finite number"),
        ({"a": 1.0, "b": math.inf}, "node bob: importance of b: expected a finite number"),
        (
            {"a": 1.0, "b": -0.1},
            "node bob: importance of b: expected a finite number of 0 or more, found -0.1",
        ),
        ({"a": "1", "b": 1.0}, "node bob: importance of a: expected a number"),
        ({"a": True, "b": 1.0}, "node bob: importance of a: expected a number"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "node bob: importance score of c, which is no candidate"),
        ({"a": 0.0, "b": 0.0}, "node bob: the importance of all 2 weights is 0"),
    ],
)
def test_bad_scores_are_refused_with_node_and_weight(scores, message):
    with pytest.raises(ReplyError, match=message):
        check_report("bob", Importance(scores), NAMES)


@pytest.mark.parametrize(
    "curve", [(), (0.5, 0.4), (-0.1, 1.0), (0.5, 1.1), (math.nan,), (0.5, math.nan, 1.0)]
)
def test_bad_curves_are_refused_with_node_and_weight(curve):
    report = Importance({"a": 1.0, "b": 1.0}, {"a": (1.0,), "b": curve})
    with pytest.raises(ReplyError, match="node bob: energy curve of b"):
        check_report("bob", report, NAMES)


def test_the_cohorts_importance_is_the_mean_by_examples():
    reports = {"x": Importance({"a": 3.0, "b": 1.0}), "y": Importance({"a": 0.1, "b": 0.3})}
    combined = combine(reports, {"x": 30, "y": 10, "absent": 1000})
    assert combined.scores == pytest.approx({"a": 0.75 * 0.75 + 0.25 * 0.25, "b": 0.75 * 0.25 + 0.25 * 0.75})
    assert combined == combine(dict(reversed(reports.items())), {"y": 10, "x": 30})
    assert combined.curves == {}


def test_score_times_gain_of_the_cohort_is_the_mean_of_the_nodes():
    reports = {
        "x": Importance({"a": 3.0, "b": 1.0}, {"a": (0.9, 1.0), "b": (1.0,)}),
        "y": Importance({"a": 1.0, "b": 1.0}, {"a": (0.5, 0.7, 1.0), "b": (0.6, 1.0)}),
    }
    combined = combine(reports, {"x": 1, "y": 3})
    for name in NAMES:
        for rank in (1, 2, 3, 8):
            parts = [
                share * report.scores[name] / sum(report.scores.values()) * report.gains(name, [rank])[0]
                for share, report in zip((0.25, 0.75), reports.values(), strict=True)
            ]
            assert combined.scores[name] * combined.gains(name, [rank])[0] == pytest.approx(sum(parts))
    check_report("all", combined, NAMES)
