"""FwdLLM: forward gradients by finite differences, as many as their variance asks for, in promising directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Annotated, Literal

import torch
from fedllm.clients.local import (
    LocalOptimizer,
    Parameters,
    batch_of,
    check_loss,
    descend,
    owned_parameters,
    result_of,
    training,
)
from pydantic import Field

from fedllm.records import DIRECTION
from fedllm.seeding import derive_seed
from fedllm.update import TrainJob, TrainResult

Tensors = dict[str, torch.Tensor]


class FwdLLM:
    """Forward gradients, paced by their variance, in directions like the last one (FwdLLM, arXiv 2308.13894).

    A perturbation v gives the gradient [L(w + hv) − L(w − hv)] / 2h · v. *Variance-controlled pacing*: perturbations
    of one batch are collected, in two halves, until ‖mean₁ − mean₂‖² / 4, an estimate of the variance of the mean of
    all, is below ``variance``; no step is taken before. *Discriminative sampling*: of ``candidates`` draws of a tensor
    the one with the largest cosine to a direction is taken: to the server's last step, if the message carries it, else
    to the gradient of this client's last batch.

    The variance is taken over all tensors and not over one probe layer, and every perturbation and batch has draws of
    its own: in the code that Spry compares with, all perturbations of a batch share one draw.

    Args:
        finite_difference: distance h of the two points from the weights.
        variance: threshold of the variance of the mean gradient.
        min_perturbations: perturbations of a batch before its variance is looked at.
        max_perturbations: perturbations of a batch after which the step is taken whatever the variance.
        candidates: draws among which a tensor's perturbation is chosen.
        optimizer: ``sgd`` or ``adamw``; its state starts fresh in every round.
        momentum: momentum of SGD.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
    """

    def __init__(
        self,
        *,
        finite_difference: Annotated[float, Field(gt=0)] = 1e-2,
        variance: Annotated[float, Field(gt=0)] = 10.0,
        min_perturbations: Annotated[int, Field(ge=2)] = 2,
        max_perturbations: Annotated[int, Field(ge=2)] = 10,
        candidates: Annotated[int, Field(ge=1)] = 10,
        optimizer: Literal["adamw", "sgd"] = "sgd",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        max_grad_norm: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.finite_difference = finite_difference
        self.variance = variance
        self.min_perturbations = min_perturbations
        self.max_perturbations = max_perturbations
        self.candidates = candidates
        self.optimizer = LocalOptimizer(optimizer, weight_decay, momentum, max_grad_norm)

    def run(self, job: TrainJob) -> TrainResult:
        """Take the round's local steps.

        Raises:
            TrainError: a loss that is not finite; the step and the client are named.
        """
        parameters = owned_parameters(job)
        steps = _Steps(self, job, parameters)
        with training(job, parameters, dropout=False), torch.no_grad():
            losses = descend(job, parameters, self.optimizer, steps.gradient)
        return result_of(job, parameters, losses, perturbations=steps.perturbations)


class _Steps:
    """The gradients of one round."""

    def __init__(self, rule: FwdLLM, job: TrainJob, parameters: Parameters) -> None:
        self.rule = rule
        self.job = job
        self.parameters = parameters
        self.perturbations = 0
        sent = job.inputs.get(DIRECTION, {})
        self.follows_server = bool(sent)
        self.direction = {
            name: sent[name].to(p.device, p.dtype) for name, p in parameters.items() if name in sent
        }

    def gradient(self, step: int, indices: list[int]) -> float:
        batch = batch_of(self.job, indices)
        losses = []

        def sample(number: int) -> Tensors:
            v = self._perturbation(step, number)
            slope, loss = self._slope(v, batch)
            check_loss(self.job, step, loss)
            losses.append(loss)
            return {name: slope * value for name, value in v.items()}

        rule = self.rule
        mean, taken = paced_mean(
            sample, rule.variance, least=rule.min_perturbations, most=rule.max_perturbations
        )
        for name, parameter in self.parameters.items():
            parameter.grad = mean[name]
        self.perturbations += taken
        if not self.follows_server:
            self.direction = {name: value.clone() for name, value in mean.items()}
        return sum(losses) / len(losses)

    def _perturbation(self, step: int, number: int) -> Tensors:
        # Drawn on the CPU: generators of other devices give other streams.
        seed = derive_seed(self.job.seed, "fwdllm", step, number)
        generator = torch.Generator().manual_seed(seed)
        return {
            name: most_similar(p, self.direction.get(name), self.rule.candidates, generator)
            for name, p in self.parameters.items()
        }

    def _slope(self, v: Tensors, batch: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        h = self.rule.finite_difference
        losses = []
        for scale in (h, -2 * h):
            self._move(v, scale)
            losses.append(float(self.job.task.loss(self.job.bundle.model, dict(batch))))
        self._move(v, h)
        return (losses[0] - losses[1]) / (2 * h), sum(losses) / 2

    def _move(self, v: Tensors, scale: float) -> None:
        for name, parameter in self.parameters.items():
            parameter.add_(v[name], alpha=scale)


def paced_mean(
    sample: Callable[[int], Tensors], variance: float, *, least: int, most: int
) -> tuple[Tensors, int]:
    """Average samples until the variance of their mean, estimated from two halves, is below a threshold.

    Samples go to the halves in turn. With independent samples E‖mean₁ − mean₂‖² / 4 is the trace of the covariance of
    the mean of all of them.

    Args:
        sample: from a number, from 1, to a sample; each is asked for once.
        variance: the threshold.
        least: samples before the variance is looked at; at least 2.
        most: samples after which the mean is taken as it is.

    Returns:
        The mean, and how many samples it has.
    """
    halves: tuple[Tensors, Tensors] = ({}, {})
    for number in count(1):
        half = halves[(number - 1) % 2]
        for name, value in sample(number).items():
            half[name] = half[name] + value if name in half else value
        even = number % 2 == 0
        if number >= most or (even and number >= least and _variance(halves, number) < variance):
            first, second = halves
            return {name: (first[name] + second.get(name, 0)) / number for name in first}, number
    raise AssertionError("unreachable")


def _variance(halves: tuple[Tensors, Tensors], number: int) -> float:
    each = number / 2
    gaps = (float((halves[0][name] - halves[1][name]).square().sum()) for name in halves[0])
    return sum(gaps) / each**2 / 4


def most_similar(
    like: torch.Tensor, direction: torch.Tensor | None, candidates: int, generator: torch.Generator
) -> torch.Tensor:
    """Of several standard normal draws the one with the largest absolute cosine to a direction.

    The sign does not matter, since v and −v give the same forward gradient.

    Args:
        like: gives shape, device and dtype.
        direction: of that shape; None or zero: the first draw is taken.
        candidates: how many draws.
        generator: on the CPU.
    """
    if direction is None or not bool(direction.any()):
        candidates = 1
    best, largest = None, -1.0
    for drawn in _draws(like, candidates, generator):
        if direction is None or candidates == 1:
            return drawn
        cosine = float(torch.linalg.vecdot(drawn.flatten(), direction.flatten()).abs() / drawn.norm())
        if cosine > largest:
            best, largest = drawn, cosine
    assert best is not None
    return best


def _draws(like: torch.Tensor, number: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(number):
        yield torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
