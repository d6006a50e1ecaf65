"""Local training by back-propagation: AdamW or SGD on the adapter, as FedAvg and FedProx do it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedllm.batches import train_batches
from fedllm.config import TrainConfig
from fedllm.errors import TrainError
from fedllm.models import ModelBundle
from fedllm.update import TrainJob, TrainResult

NonNegative = Annotated[float, Field(ge=0)]


class Backprop:
    """Back-propagation with AdamW or SGD (FedAvg, arXiv 1602.05629; proximal term of FedProx, arXiv 1812.06127).

    Args:
        optimizer: ``adamw`` or ``sgd``; its state starts fresh in every round.
        weight_decay: decoupled weight decay.
        momentum: momentum of SGD.
        gradient_accumulation: pieces into which every batch is cut; the gradient stays that of the whole batch.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        proximal_mu: weight of FedProx's term µ/2 ‖w − w_global‖²; 0: none.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        *,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: NonNegative = 0.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        gradient_accumulation: Annotated[int, Field(ge=1)] = 1,
        max_grad_norm: NonNegative = 1.0,
        proximal_mu: NonNegative = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.gradient_accumulation = gradient_accumulation
        self.max_grad_norm = max_grad_norm
        self.proximal_mu = proximal_mu
        self.gradient_checkpointing = gradient_checkpointing

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps.

        Raises:
            TrainError: a loss that is not finite; the step and the client are named.
        """
        model = job.bundle.model
        parameters = job.bundle.trainable()
        optimizer = self._optimizer(job.bundle, job.train)
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        losses = []
        checkpointing = (
            job.bundle.gradient_checkpointing(True) if self.gradient_checkpointing else nullcontext()
        )
        model.train()
        try:
            with checkpointing:
                for step, indices in enumerate(train_batches(job.examples, job.train, job.seed), start=1):
                    loss = self._backward(job, indices)
                    if not math.isfinite(loss):
                        raise TrainError(
                            f"client {job.node}, round {job.round}: the loss of step {step} is {loss}; lower "
                            "train.learning-rate, or use a wider model.dtype"
                        )
                    self._step(optimizer, parameters, start)
                    losses.append(loss)
        finally:
            model.eval()
            model.zero_grad(set_to_none=True)
        return TrainResult(
            arrays=job.bundle.adapter_state(),
            num_examples=len(job.examples),
            loss=sum(losses) / len(losses),
            metrics={"steps": len(losses)},
        )

    def _optimizer(self, bundle: ModelBundle, train: TrainConfig) -> torch.optim.Optimizer:
        parameters = bundle.trainable()
        groups = [
            {
                "params": [p for name, p in parameters.items() if not bundle.is_head(name)],
                "lr": train.learning_rate,
            },
            {
                "params": [p for name, p in parameters.items() if bundle.is_head(name)],
                "lr": train.head_learning_rate or train.learning_rate,
            },
        ]
        groups = [group for group in groups if group["params"]]
        # An adapter is many small tensors: the fused kernels spare a Python loop over them in every step.
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            groups, lr=1.0, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )

    def _backward(self, job: TrainJob, indices: list[int]) -> float:
        """Accumulate the gradient of one batch; returns its loss."""
        pieces = list(_pieces(indices, self.gradient_accumulation))
        pad = job.bundle.tokenizer.pad_token_id
        batches = [job.task.collate(job.examples, piece, pad) for piece in pieces]
        weights = [job.task.num_targets(batch) for batch in batches]
        total, loss = sum(weights), 0.0
        for batch, weight in zip(batches, weights, strict=True):
            on_device = {name: tensor.to(job.bundle.device) for name, tensor in batch.items()}
            piece_loss = job.task.loss(job.bundle.model, on_device) * (weight / total)
            piece_loss.backward()  # type: ignore[no-untyped-call]
            loss += piece_loss.item()
        return loss

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, torch.nn.Parameter],
        start: Mapping[str, torch.Tensor],
    ) -> None:
        if self.proximal_mu > 0:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start[name], alpha=self.proximal_mu)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _pieces(indices: list[int], count: int) -> Iterator[list[int]]:
    size = math.ceil(len(indices) / count)
    for first in range(0, len(indices), size):
        yield indices[first : first + size]
