"""What all update rules share: the tensors they train, their batches, the local steps, and what they return.

A gradient mode is a function that leaves the gradient of one batch in ``parameter.grad`` and returns its loss; how it
gets there is its own affair. :func:`descend` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from fedllm.batches import train_batches
from fedllm.errors import TrainError
from fedllm.tasks import Batch
from fedllm.update import TrainJob, TrainResult

Parameters = Mapping[str, torch.nn.Parameter]
Gradient = Callable[[int, list[int]], float]
"""From the step, from 1, and the indices of its examples to the loss; the gradient is left in the parameters."""


@dataclass(frozen=True)
class LocalOptimizer:
    """How local steps are taken.

    Attributes:
        kind: ``adamw`` or ``sgd``; its state starts fresh in every round.
        weight_decay: decoupled weight decay.
        momentum: momentum of SGD.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        proximal_mu: weight of FedProx's term µ/2 ‖w − w_global‖² (arXiv 1812.06127); 0: none.
    """

    kind: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float = 0.0
    proximal_mu: float = 0.0

    def build(self, job: TrainJob, parameters: Parameters) -> torch.optim.Optimizer:
        """A fresh torch optimiser with one group for the low-rank factors and one for the heads."""
        bundle, train = job.bundle, job.train
        factors = [p for name, p in parameters.items() if not bundle.is_head(name)]
        heads = [p for name, p in parameters.items() if bundle.is_head(name)]
        groups = [
            {"params": factors, "lr": train.learning_rate},
            {"params": heads, "lr": train.head_learning_rate or train.learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        # An adapter is many small tensors: the fused kernels spare a Python loop over them in every step.
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            groups, lr=1.0, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Parameters, start: Mapping[str, torch.Tensor]
    ) -> None:
        """One step with the gradients that the parameters hold; clears them."""
        if self.proximal_mu > 0:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=self.proximal_mu)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def owned_parameters(job: TrainJob) -> dict[str, torch.nn.Parameter]:
    """The live parameters that this client trains and returns, in the model's order.

    Raises:
        TrainError: the message names a tensor that the adapter does not have.
    """
    parameters = job.bundle.trainable()
    if unknown := [name for name in job.owned if name not in parameters]:
        raise TrainError(
            f"client {job.node}, round {job.round}: the server asks it to train {unknown[0]!r}, which is no tensor "
            f"of the adapter of {job.bundle.config.name}; are model and lora settings the same on both sides?"
        )
    if not job.owned:
        return parameters
    owned = frozenset(job.owned)
    return {name: parameter for name, parameter in parameters.items() if name in owned}


@contextmanager
def training(job: TrainJob, parameters: Parameters, *, dropout: bool = True) -> Iterator[None]:
    """Let gradients go to the given parameters only; afterwards the model is in evaluation mode and as it was.

    Below the lowest of them autograd then keeps nothing, since nothing there needs a gradient.

    Args:
        job: whose model it is.
        parameters: those that need gradients inside.
        dropout: whether dropout is active inside.
    """
    trained = {id(parameter) for parameter in parameters.values()}
    others = [p for p in job.bundle.trainable().values() if id(p) not in trained]
    for parameter in others:
        parameter.requires_grad_(False)
    job.bundle.model.train(dropout)
    try:
        yield
    finally:
        job.bundle.model.eval()
        job.bundle.model.zero_grad(set_to_none=True)
        for parameter in others:
            parameter.requires_grad_(True)


def descend(
    job: TrainJob, parameters: Parameters, optimizer: LocalOptimizer, gradient: Gradient
) -> list[float]:
    """Take the round's local steps; returns the losses of their batches.

    Raises:
        TrainError: a loss that is not finite; the step and the client are named.
    """
    stepper = optimizer.build(job, parameters)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = []
    for step, indices in steps_of(job):
        loss = gradient(step, indices)
        check_loss(job, step, loss)
        optimizer.step(stepper, parameters, start)
        losses.append(loss)
    return losses


def steps_of(job: TrainJob) -> Iterator[tuple[int, list[int]]]:
    """The steps of the round, from 1, with the indices of their examples."""
    return enumerate(train_batches(job.examples, job.train, job.seed), start=1)


def batch_of(job: TrainJob, indices: Sequence[int]) -> Batch:
    """The examples at the indices, padded, on the model's device."""
    batch = job.task.collate(job.examples, indices, job.bundle.tokenizer.pad_token_id)
    return {name: tensor.to(job.bundle.device) for name, tensor in batch.items()}


def check_loss(job: TrainJob, step: int, loss: float) -> None:
    """Refuse a loss that is not finite.

    Raises:
        TrainError: names the client, the round and the step.
    """
    if not math.isfinite(loss):
        raise TrainError(
            f"client {job.node}, round {job.round}: the loss of step {step} is {loss}; lower train.learning-rate, "
            "or use a wider model.dtype"
        )


def pieces_of(job: TrainJob, indices: Sequence[int], micro_batch: int) -> Iterator[tuple[Batch, float]]:
    """A batch in pieces of at most ``micro_batch`` examples, on the model's device.

    Yields:
        A piece and its share of the batch: the loss of the batch is the sum of share × loss of the piece.
    """
    pieces = [indices[first : first + micro_batch] for first in range(0, len(indices), micro_batch)]
    pad = job.bundle.tokenizer.pad_token_id
    batches = [job.task.collate(job.examples, piece, pad) for piece in pieces]
    weights = [job.task.num_targets(batch) for batch in batches]
    for batch, weight in zip(batches, weights, strict=True):
        yield {name: tensor.to(job.bundle.device) for name, tensor in batch.items()}, weight / sum(weights)


def accumulate_gradient(job: TrainJob, indices: Sequence[int], micro_batch: int) -> float:
    """Back-propagate a batch in pieces of at most ``micro_batch`` examples; the gradient is that of the whole batch.

    Returns:
        The loss of the whole batch.
    """
    loss = 0.0
    for batch, share in pieces_of(job, indices, micro_batch):
        piece_loss = job.task.loss(job.bundle.model, batch) * share
        piece_loss.backward()  # type: ignore[no-untyped-call]
        loss += piece_loss.item()
    return loss


def result_of(
    job: TrainJob, parameters: Parameters, losses: Sequence[float], **metrics: float
) -> TrainResult:
    """What the client returns: float32 copies of the parameters on the CPU, and the mean loss."""
    return TrainResult(
        arrays={name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()},
        num_examples=len(job.examples),
        loss=sum(losses) / len(losses),
        metrics={"steps": len(losses), **metrics},
    )
