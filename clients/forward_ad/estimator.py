"""The forward gradient of one batch: tangents, dual passes over its pieces, and the estimate that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from fedllm.clients.forward_ad.jvp import DualPass, LossOf, Tensors, dual_pass
from fedllm.clients.local import check_loss, pieces_of
from torch import Tensor, nn

from fedllm.errors import TrainError
from fedllm.lora.modes import rows_at_once
from fedllm.tangents import Distribution, draw, project, regenerate
from fedllm.update import TrainJob


@dataclass
class ControlVariate:
    """A direction h that explains part of the derivatives: g = c h + (1/K) Σ_k (s_k − c ⟨h, v_k⟩) v_k.

    Unbiased for every c that does not depend on the v_k, since E[v vᵀ] = I; the noise falls by the squared cosine of h
    and the gradient. c is the least-squares fit of earlier derivatives, so neither length nor sign of h matters (ours).

    Attributes:
        direction: h, float32 on the CPU.
    """

    direction: Tensors
    _products: float = field(default=0.0, init=False)
    _squares: float = field(default=0.0, init=False)

    def split(self, jvps: Tensor, along: Tensor) -> tuple[float, Tensor]:
        """c, and the derivatives that remain; learns from both for the next time.

        Args:
            jvps: s ``[K]``.
            along: ⟨h, v_k⟩ ``[K]``.
        """
        coefficient = self._products / self._squares if self._squares > 0 else 0.0
        self._products += float(jvps.double() @ along.double())
        self._squares += float(along.double().square().sum())
        return coefficient, jvps - coefficient * along


@dataclass
class ForwardGradient:
    """Estimates the gradients of a job's batches.

    Attributes:
        job: whose examples and seed are used.
        loss: of its model in forward mode.
        perturbed: parameters that are estimated by forward gradients.
        heads: parameters whose gradients are exact.
        tangents: K.
        distribution: of the tangents.
        at_once: tangents that share a dual pass.
        micro_batch_size: examples that share a dual pass; 0: see :func:`fedllm.lora.modes.rows_at_once`.
        control: what is known about the gradient beforehand.
    """

    job: TrainJob
    loss: LossOf
    perturbed: Mapping[str, nn.Parameter]
    heads: Mapping[str, nn.Parameter]
    tangents: int
    distribution: Distribution
    at_once: int
    micro_batch_size: int
    control: ControlVariate | None = None

    def __call__(self, step: int, indices: list[int]) -> float:
        """Leave the estimated gradient of a batch in the parameters; returns its loss."""
        result = self.measure(step, indices)
        shapes = {name: parameter.shape for name, parameter in self.perturbed.items()}
        scalars = result.jvps.float()
        share, known = 0.0, {}
        if self.control is not None:
            known = {name: self.control.direction[name] for name in shapes}
            along = project(self.job.seed, step, self.tangents, known, self.distribution)
            share, scalars = self.control.split(scalars, along)
        estimate = regenerate(self.job.seed, step, scalars, shapes, self.distribution)
        for name, parameter in self.perturbed.items():
            gradient = estimate[name] + share * known[name] if known else estimate[name]
            parameter.grad = gradient.to(parameter)
        for name, parameter in self.heads.items():
            parameter.grad = result.heads[name]
        return result.loss

    def measure(self, step: int, indices: Sequence[int]) -> DualPass:
        """Loss, derivatives and exact head gradients of a batch, piece by piece: all three are additive.

        Raises:
            TrainError: the loss or a derivative is not finite; names client, step and tensor.
        """
        point = {name: parameter.detach() for name, parameter in self.perturbed.items()}
        tangents = self._tangents(step) if point else []
        total, jvps = 0.0, torch.zeros(self.tangents, dtype=torch.float64)
        heads = {name: torch.zeros_like(parameter) for name, parameter in self.heads.items()}
        for batch, share in pieces_of(self.job, indices, self._rows(indices)):
            objective = self.loss.at(batch)
            piece = dual_pass(objective, point, tangents, self.heads, self.loss.model, self.at_once)
            total += share * piece.loss
            if tangents:
                jvps += share * piece.jvps
            for name, gradient in piece.heads.items():
                heads[name].add_(gradient, alpha=share)
        check_loss(self.job, step, total)
        self._check_jvps(step, indices, jvps, tangents)
        return DualPass(total, jvps, heads)

    def _rows(self, indices: Sequence[int]) -> int:
        return self.micro_batch_size or rows_at_once(int(self.job.examples.lengths[list(indices)].max()))

    def _tangents(self, step: int) -> list[dict[str, Tensor]]:
        return [
            {
                name: draw(self.job.seed, step, tangent, name, p.shape, self.distribution).to(p)
                for name, p in self.perturbed.items()
            }
            for tangent in range(1, self.tangents + 1)
        ]

    def _check_jvps(
        self, step: int, indices: Sequence[int], jvps: Tensor, tangents: Sequence[Tensors]
    ) -> None:
        """Refuse derivatives that overflow, also when they are rounded to float32 for the server."""
        finite = torch.isfinite(jvps.float())
        if bool(finite.all()):
            return
        worst = int((~finite).nonzero()[0])
        raise TrainError(
            f"client {self.job.node}, round {self.job.round}: the derivative of step {step} along tangent {worst + 1} "
            f"is {float(jvps[worst])}; {self._culprit(indices, tangents[worst])} overflows in "
            f"{self.job.bundle.config.dtype}: use model.dtype bfloat16 or float32, or a smaller lora.alpha"
        )

    def _culprit(self, indices: Sequence[int], tangent: Tensors) -> str:
        """The first tensor whose own tangent overflows."""
        for name, value in tangent.items():
            point = {name: self.perturbed[name].detach()}
            for batch, _ in pieces_of(self.job, indices, self._rows(indices)):
                own = dual_pass(self.loss.at(batch), point, [{name: value}])
                if not bool(torch.isfinite(own.jvps.float()).all()):
                    return f"that of {name!r}"
        return "that of all tensors together"
