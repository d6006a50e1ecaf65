"""Back-propagation that stops: only the top blocks' adapters and the head are trained."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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

from fedllm.errors import TrainError
from fedllm.update import TrainJob, TrainResult

NonNegative = Annotated[float, Field(ge=0)]
_BLOCK = re.compile(r"\.(\d+)\.")


class BackpropTopK:
    """Back-propagation through the top k blocks only; below them nothing is kept (as FedQuad, arXiv 2506.01001).

    With k = 1 it costs little more than inference, in time and in memory. Tensors of lower blocks are returned as they
    were sent.

    Args:
        blocks: how many blocks, counted from the output, are trained besides the heads; 0: the heads alone.
        gradient_accumulation: pieces into which every batch is cut; the gradient stays that of the whole batch.
        optimizer: ``adamw`` or ``sgd``; its state starts fresh in every round.
        weight_decay: decoupled weight decay.
        momentum: momentum of SGD.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        proximal_mu: weight of FedProx's term µ/2 ‖w − w_global‖²; 0: none.
    """

    def __init__(
        self,
        *,
        blocks: Annotated[int, Field(ge=0)] = 1,
        gradient_accumulation: Annotated[int, Field(ge=1)] = 1,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: NonNegative = 0.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        max_grad_norm: NonNegative = 1.0,
        proximal_mu: NonNegative = 0.0,
    ) -> None:
        self.blocks = blocks
        self.gradient_accumulation = gradient_accumulation
        self.optimizer = LocalOptimizer(optimizer, weight_decay, momentum, max_grad_norm, proximal_mu)

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps.

        Raises:
            TrainError: the client owns nothing in the top blocks, or a loss is not finite.
        """
        owned = owned_parameters(job)
        top = top_names(list(job.bundle.trainable()), self.blocks)
        trained = {name: p for name, p in owned.items() if name in top or job.bundle.is_head(name)}
        if not trained:
            raise TrainError(
                f"client {job.node}, round {job.round}: none of the {len(owned)} tensors that it is to train "
                f"belongs to the top {self.blocks} blocks or the head; raise backprop-top-k.blocks"
            )

        def gradient(step: int, indices: list[int]) -> float:
            return accumulate_gradient(job, indices, math.ceil(len(indices) / self.gradient_accumulation))

        with training(job, trained):
            losses = descend(job, trained, self.optimizer, gradient)
        return result_of(job, owned, losses)


def top_names(names: Sequence[str], blocks: int) -> frozenset[str]:
    """The names that belong to the last blocks or come after the first of them.

    Args:
        names: of tensors in the model's order; the first number in a name is that of its block.
        blocks: how many blocks; more than there are is all of them.
    """
    if blocks == 0:
        return frozenset()
    numbers = [int(match[1]) if (match := _BLOCK.search(name)) else None for name in names]
    found = sorted({number for number in numbers if number is not None})
    if blocks >= len(found):
        return frozenset(names)
    lowest = found[-blocks]
    first = next(index for index, number in enumerate(numbers) if number == lowest)
    return frozenset(
        name
        for index, (name, number) in enumerate(zip(names, numbers, strict=True))
        if (number >= lowest if number is not None else index > first)
    )
