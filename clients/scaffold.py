"""SCAFFOLD's local steps (Karimireddy et al., ICML 2020, arXiv 1910.06378): plain SGD on corrected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from fedllm.clients.local import (
    LocalOptimizer,
    Parameters,
    accumulate_gradient,
    descend,
    owned_parameters,
    result_of,
    training,
)
from pydantic import Field
from torch import Tensor

from fedllm.errors import TrainError
from fedllm.records import CORRECTION, MEAN_GRADIENT
from fedllm.update import TrainJob, TrainResult


class ScaffoldSgd:
    """SGD with the server's correction c − c_i added to every gradient; returns the mean of the uncorrected ones.

    That mean is the new control variate c_i of option II. Without a correction in the message it is zero.

    Args:
        micro_batch: largest number of examples that are back-propagated at once; 0: the whole batch.
    """

    def __init__(self, *, micro_batch: Annotated[int, Field(ge=0)] = 0) -> None:
        self.micro_batch = micro_batch

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps.

        Raises:
            TrainError: a loss that is not finite, or a correction that does not fit the adapter.
        """
        parameters = owned_parameters(job)
        correction = _checked(job, parameters)
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

        def gradient(step: int, indices: list[int]) -> float:
            loss = accumulate_gradient(job, indices, self.micro_batch or len(indices))
            for name, parameter in parameters.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                sums[name].add_(parameter.grad)
                if name in correction:
                    parameter.grad.add_(correction[name])
            return loss

        with training(job, parameters):
            losses = descend(job, parameters, LocalOptimizer(kind="sgd"), gradient)
        means = {name: total / len(losses) for name, total in sums.items()}
        return replace(result_of(job, parameters, losses), extras={MEAN_GRADIENT: means})


def _checked(job: TrainJob, parameters: Parameters) -> Mapping[str, Tensor]:
    """The correction of the message on the parameters' devices."""
    correction = job.inputs.get(CORRECTION, {})
    for name, tensor in correction.items():
        if name not in parameters or tensor.shape != parameters[name].shape:
            raise TrainError(
                f"client {job.node}, round {job.round}: the correction's {name!r} of shape {tuple(tensor.shape)} "
                "fits no parameter of the adapter"
            )
    return {name: tensor.to(parameters[name]) for name, tensor in correction.items()}
