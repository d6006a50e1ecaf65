"""Zeroth-order local training: two forward passes a step, in the memory of inference (MeZO, FedMeZO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from fedllm.clients.local import (
    Parameters,
    batch_of,
    check_loss,
    owned_parameters,
    result_of,
    steps_of,
    training,
)
from pydantic import Field

from fedllm.seeding import derive_seed
from fedllm.tasks import Batch
from fedllm.update import TrainJob, TrainResult


class ZerothOrder:
    """FedMeZO's local steps (Ling et al., KDD 2024, arXiv 2402.05926; MeZO: Malladi et al., 2023, arXiv 2305.17333).

    With z ~ N(0, I), s = [L(w + εz) − L(w − εz)] / 2ε is an estimate of ⟨∇L, z⟩ and w ← w − η s z a step of SGD (SPSA,
    Spall 1992). z is drawn again from its seed whenever it is needed, and the weights are moved in place: neither z
    nor a second copy of the weights is ever in memory as a whole. Dropout is off: both passes see the same function.

    Args:
        epsilon: distance ε of the two points.
        perturbations: directions z a step; their estimates are averaged.
    """

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Field(gt=0)] = 1e-3,
        perturbations: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        self.epsilon = epsilon
        self.perturbations = perturbations

    def run(self, job: TrainJob) -> TrainResult:
        """Take the round's local steps.

        Raises:
            TrainError: a loss that is not finite; the step and the client are named.
        """
        parameters = owned_parameters(job)
        rates = {
            name: (job.train.head_learning_rate if job.bundle.is_head(name) else 0.0)
            or job.train.learning_rate
            for name in parameters
        }
        losses = []
        with training(job, parameters, dropout=False), torch.no_grad():
            for step, indices in steps_of(job):
                batch = batch_of(job, indices)
                seeds = [derive_seed(job.seed, "spsa", step, k) for k in range(self.perturbations)]
                estimates = [self._estimate(job, parameters, batch, step, seed) for seed in seeds]
                for seed, (slope, _) in zip(seeds, estimates, strict=True):
                    for name, parameter, z in directions(parameters, seed):
                        parameter.add_(z, alpha=-rates[name] * slope / self.perturbations)
                losses.append(sum(loss for _, loss in estimates) / self.perturbations)
        return result_of(job, parameters, losses)

    def _estimate(
        self, job: TrainJob, parameters: Parameters, batch: Batch, step: int, seed: int
    ) -> tuple[float, float]:
        """Slope along one direction, and the mean of the two losses; the weights end where they began."""
        slope, loss = directional_slope(job, parameters, batch, seed, self.epsilon)
        check_loss(job, step, loss)
        return slope, loss


def directional_slope(
    job: TrainJob, parameters: Parameters, batch: Batch, seed: int, epsilon: float
) -> tuple[float, float]:
    """[L(w + εz) − L(w − εz)] / 2ε for the z of a seed, and the mean of the two losses.

    The weights are moved in place and back; what remains is rounding.
    """
    perturb(parameters, seed, epsilon)
    above = float(job.task.loss(job.bundle.model, batch))
    perturb(parameters, seed, -2 * epsilon)
    below = float(job.task.loss(job.bundle.model, batch))
    perturb(parameters, seed, epsilon)
    return (above - below) / (2 * epsilon), (above + below) / 2


def perturb(parameters: Parameters, seed: int, scale: float) -> None:
    """Add ``scale`` times the direction of a seed to the parameters, in place."""
    for _, parameter, z in directions(parameters, seed):
        parameter.add_(z, alpha=scale)


def directions(parameters: Parameters, seed: int) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """Name, parameter and standard normal direction, tensor by tensor; the same for the same seed and names."""
    # Drawn on the CPU: generators of other devices give other streams.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        z = torch.randn(parameter.shape, generator=generator)
        yield name, parameter, z.to(parameter.device, parameter.dtype)
