"""Exact back-propagation in little memory: per-block checkpoints, micro-batches, block inputs on the host."""

from __future__ import annotations

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

from fedllm.update import TrainJob, TrainResult

NonNegative = Annotated[float, Field(ge=0)]


class BackpropCheckpointed:
    """Back-propagation that keeps one input a block and recomputes the rest (Chen et al., 2016, arXiv 1604.06174).

    The gradient is that of plain back-propagation. It costs about one more forward pass; what is kept is the input of
    every block and the activations of one. MeBP (arXiv 2510.03425) trains billion-parameter models on phones this way.

    Args:
        micro_batch_size: examples that are in memory at once; the gradient stays that of the whole batch.
            0: the whole batch.
        offload: keep the blocks' inputs in the host's memory until the backward pass needs them; on a CPU they are
            there anyway.
        optimizer: ``adamw`` or ``sgd``; its state starts fresh in every round.
        weight_decay: decoupled weight decay.
        momentum: momentum of SGD.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        proximal_mu: weight of FedProx's term µ/2 ‖w − w_global‖²; 0: none.
    """

    def __init__(
        self,
        *,
        micro_batch_size: Annotated[int, Field(ge=0)] = 0,
        offload: bool = False,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: NonNegative = 0.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        max_grad_norm: NonNegative = 1.0,
        proximal_mu: NonNegative = 0.0,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.offload = offload
        self.optimizer = LocalOptimizer(optimizer, weight_decay, momentum, max_grad_norm, proximal_mu)

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps.

        Raises:
            TrainError: a loss that is not finite; the step and the client are named.
        """
        parameters = owned_parameters(job)

        def gradient(step: int, indices: list[int]) -> float:
            return accumulate_gradient(job, indices, self.micro_batch_size or len(indices))

        with training(job, parameters), job.bundle.gradient_checkpointing(offload=self.offload):
            losses = descend(job, parameters, self.optimizer, gradient)
        return result_of(job, parameters, losses)
