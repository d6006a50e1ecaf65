"""Local training by back-propagation: AdamW or SGD on the adapter, as FedAvg and FedProx do it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Literal

from fedllm.clients.local import (
    LocalOptimizer,
    accumulate_gradient,
    descend,
    owned_parameters,
    result_of,
    training,
)
from pydantic import Field

from fedllm.importance_report import ImportanceProbe
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
        self.optimizer = LocalOptimizer(optimizer, weight_decay, momentum, max_grad_norm, proximal_mu)
        self.gradient_accumulation = gradient_accumulation
        self.gradient_checkpointing = gradient_checkpointing

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps.

        Raises:
            TrainError: a loss that is not finite; the step and the client are named.
        """
        parameters = owned_parameters(job)

        probe = ImportanceProbe(job.bundle) if job.ask_importance else None

        def gradient(step: int, indices: list[int]) -> float:
            loss = accumulate_gradient(job, indices, math.ceil(len(indices) / self.gradient_accumulation))
            if probe is not None:
                probe.observe()
            return loss

        checkpointing = (
            job.bundle.gradient_checkpointing(True) if self.gradient_checkpointing else nullcontext()
        )
        with training(job, parameters), checkpointing:
            losses = descend(job, parameters, self.optimizer, gradient)
        result = result_of(job, parameters, losses)
        return result if probe is None else replace(result, extras=probe.extras())
