"""Local training without back-propagation: forward gradients of the adapter, exact gradients of the heads."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from fedllm.clients.forward_ad.check import check_derivative, check_loss_agrees, short_batch
from fedllm.clients.forward_ad.estimator import ControlVariate, ForwardGradient
from fedllm.clients.forward_ad.setting import forward_mode
from fedllm.clients.local import (
    LocalOptimizer,
    batch_of,
    check_loss,
    descend,
    owned_parameters,
    result_of,
    steps_of,
    training,
)
from pydantic import Field
from torch import nn

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, TrainError
from fedllm.records import DIRECTION, SCALARS
from fedllm.tangents import Distribution, head_seed, is_second_factor, project
from fedllm.update import TrainJob, TrainResult

Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]

logger = logging.getLogger(__name__)

_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class ForwardAD:
    """Forward-mode automatic differentiation (Spry, arXiv 2405.15551), after the paper's weaknesses are removed.

    A step draws K tangents v_k for the client's tensors, gets the loss and s_k = ⟨∇loss, v_k⟩ in one forward pass, and
    goes along (1/K) Σ_k s_k v_k. The paper perturbs heads along with the adapter, by Gaussian tangents, and steps by
    AdamW: ``exact-heads = false``, ``distribution = "gaussian"``, ``optimizer = "adamw"``, ``dropout = true``.

    Args:
        tangents: K; the noise falls as 1/K.
        distribution: of the tangents, ``rademacher`` (±1) or ``gaussian``; the variance of the estimate is the same.
        optimizer: ``sgd`` or ``adamw``; its state starts fresh in every round. AdamW's first step has the length of
            the learning rate whatever the derivative was.
        weight_decay: decoupled weight decay.
        momentum: momentum of SGD.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        exact_heads: differentiate heads exactly (ours) instead of perturbing them along with the adapter.
        b_only: perturb and train only B of every product B A; A stays as the server drew it.
        upload: ``adapter`` returns the client's tensors after the local steps (the paper's per-epoch mode); ``scalars``
            returns the K derivatives of one batch without a step, and ``head_tangents`` projections of the heads' exact
            gradient (per-iteration mode).
        head_tangents: H, scalars that stand for the heads' gradient with ``upload = "scalars"``; 0: heads stay.
        control_variate: take what the server's last step explains out of the noise, if it sends that step; with
            ``upload = "adapter"`` only.
        micro_batch_size: examples that share a pass; 0: as many as have 1,024 tokens. The gradient stays that of
            the whole batch.
        tangent_chunk: tangents that share a pass by ``vmap``; 0: all. One at a time needs the least memory and twice
            the computation of many.
        dropout: keep dropout active, whose mask loss and derivative share.
    """

    def __init__(
        self,
        *,
        tangents: Annotated[int, Field(ge=1)] = 1,
        distribution: Distribution = "rademacher",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        weight_decay: NonNegative = 0.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        max_grad_norm: NonNegative = 0.0,
        exact_heads: bool = True,
        b_only: bool = False,
        upload: Literal["adapter", "scalars"] = "adapter",
        head_tangents: Count = 8,
        control_variate: bool = False,
        micro_batch_size: Count = 0,
        tangent_chunk: Count = 0,
        dropout: bool = False,
    ) -> None:
        if control_variate and upload == "scalars":
            raise ConfigError(
                'forward-ad.control-variate needs forward-ad.upload = "adapter": from scalars alone the server '
                "would rebuild another gradient"
            )
        self.tangents = tangents
        self.distribution: Distribution = distribution
        self.optimizer = LocalOptimizer(optimizer, weight_decay, momentum, max_grad_norm)
        self.exact_heads = exact_heads
        self.b_only = b_only
        self.upload = upload
        self.head_tangents = head_tangents
        self.control_variate = control_variate
        self.micro_batch_size = micro_batch_size
        self.tangent_chunk = tangent_chunk
        self.dropout = dropout

    @staticmethod
    def check_config(config: RunConfig) -> None:
        """Refuse scalars where no strategy asks for them.

        Raises:
            ConfigError: ``upload`` is set, but the strategy expects tensors.
        """
        per_iteration = config.plugins.get("spry", {}).get("communication") == "per-iteration"
        if config.plugins.get("forward-ad", {}).get("upload") == "scalars" and not (
            config.strategy == "spry" and per_iteration
        ):
            raise ConfigError(
                'forward-ad.upload is scalars, but the strategy expects tensors: set strategy = "spry" and '
                'spry.communication = "per-iteration", which asks clients for scalars by itself'
            )

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps, or measure one batch.

        Raises:
            TrainError: a loss or derivative that is not finite (step and tensor are named), or nothing to train.
            ModelError: the model has no correct forward-mode derivative.
        """
        owned = owned_parameters(job)
        with self._gradient(job, owned) as gradient:
            if self.upload == "scalars":
                return self._measure(job, gradient)
            losses = descend(job, {**gradient.perturbed, **gradient.heads}, self.optimizer, gradient)
        return result_of(job, owned, losses, tangents=self.tangents)

    @contextmanager
    def _gradient(self, job: TrainJob, owned: dict[str, nn.Parameter]) -> Iterator[ForwardGradient]:
        """The estimator of a job; the model is in forward mode inside."""
        heads = {name: p for name, p in owned.items() if self.exact_heads and job.bundle.is_head(name)}
        perturbed = {
            name: p
            for name, p in owned.items()
            if name not in heads and (job.bundle.is_head(name) or not self.b_only or is_second_factor(name))
        }
        if not heads and not perturbed:
            raise TrainError(
                f"client {job.node}, round {job.round}: none of its {len(owned)} tensors is trained by forward-ad "
                "(with b-only, A is not); deal whole units"
            )
        trained = {**perturbed, **heads}
        with training(job, trained, dropout=self.dropout):
            self._check(job)
            with forward_mode(job.bundle.model, job.task, trained) as loss:
                yield ForwardGradient(
                    job,
                    loss,
                    perturbed,
                    heads,
                    self.tangents,
                    self.distribution,
                    self.tangent_chunk or self.tangents,
                    self.micro_batch_size,
                    self._control(job),
                )

    def _control(self, job: TrainJob) -> ControlVariate | None:
        direction = job.inputs.get(DIRECTION)
        return ControlVariate(direction) if self.control_variate and direction else None

    def _measure(self, job: TrainJob, gradient: ForwardGradient) -> TrainResult:
        step, indices = next(steps_of(job))
        result = gradient.measure(step, indices)
        heads = project(head_seed(job.seed), step, self.head_tangents, result.heads, self.distribution)
        scalars = torch.cat([result.jvps.float(), heads[: self.head_tangents if result.heads else 0]])
        return TrainResult({SCALARS: scalars}, len(job.examples), result.loss, {"steps": 1})

    def _check(self, job: TrainJob) -> None:
        """Check the model's forward mode before its first use in this process, without dropout.

        All of the adapter is perturbed for it, whatever this client owns: a model is checked once, and later jobs may
        own what this one does not.
        """
        model, config = job.bundle.model, job.bundle.config
        perturbed = {name: p for name, p in job.bundle.trainable().items() if not job.bundle.is_head(name)}
        if model in _CHECKED or not perturbed:
            return
        base: Any = model.get_base_model()
        logger.info(
            "%s: forward-ad replaces its attention (%s) by one that has a forward-mode derivative",
            config.name,
            base.config._attn_implementation,
        )
        model.eval()
        batch = short_batch(batch_of(job, next(steps_of(job))[1][:1]))
        dtype = getattr(torch, config.dtype)
        with torch.no_grad():
            stock = float(job.task.loss(model, batch))
        check_loss(job, 1, stock)
        # LLM.int8 rounds its layers' inputs, which forward mode does not; half precision rounds everything.
        tolerance = 0.1 if config.quantization == "8bit" else 0.002 if dtype == torch.float32 else 0.05
        with forward_mode(model, job.task, perturbed) as loss:
            point = {name: p.detach() for name, p in perturbed.items()}
            with torch.no_grad():
                check_loss_agrees(float(loss.at(batch)(point)), stock, tolerance, config.name)
            check_derivative(loss, batch, point, dtype, config.name)
        model.train(self.dropout)
        _CHECKED.add(model)
