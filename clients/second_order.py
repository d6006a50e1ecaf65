"""Clients that send the gradient of their whole loss, and one Hessian–vector product with it, or with local steps.

What FedSGD, SOFIM (arXiv 2403.02833) and FAGH (arXiv 2403.11041, §client) ask for. The model is in evaluation mode, so
that the loss is one function of the adapter, and the weights of the batches make the streamed sums those of one batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from fedllm.clients.backprop import Backprop
from fedllm.clients.local import owned_parameters, training
from pydantic import Field
from torch import Tensor

from fedllm.batches import length_sorted_batches
from fedllm.curvature import NO_DOUBLE_BACKWARD, Curvature, HvpMethod, gradient_and_hvp
from fedllm.errors import NonFiniteLossError, TrainError
from fedllm.records import ADAPTER, GRADIENT, HESSIAN_DIRECTION, HESSIAN_ROW, NUM_TARGETS, ReplyKind
from fedllm.tasks import Batch
from fedllm.update import TrainJob, TrainResult

logger = logging.getLogger(__name__)


class FullGradient:
    """The gradient of the client's mean loss over all its examples, in batches of ``train.batch-size``.

    Steps, epochs and learning rates of the ``train`` section are not used: the server takes the step.
    """

    sends: ClassVar[ReplyKind] = GRADIENT

    def run(self, job: TrainJob) -> TrainResult:
        """Compute the gradient at the adapter that was sent; if the loss is not finite there, only say so."""
        try:
            found = _curvature(job, None, "double-backward", 0.0, "gradient")
        except NonFiniteLossError as error:
            return _not_finite(job, error, self.sends)
        return _result(job, found, evaluations=1)


class GradientAndHessianRow:
    """The full gradient and the Hessian's product with the direction that the server sends (FAGH's client).

    Without a direction in the message only the gradient is computed.

    Args:
        hessian: ``double-backward`` is exact and uses the attention kernel that allows it;
            ``central-difference`` works with every kernel and quantised base, at two more gradients.
        epsilon: length of the difference's step.
    """

    sends: ClassVar[ReplyKind] = GRADIENT

    def __init__(
        self, *, hessian: HvpMethod = "double-backward", epsilon: Annotated[float, Field(gt=0)] = 1e-2
    ) -> None:
        self.hessian: HvpMethod = hessian
        self.epsilon = epsilon

    def run(self, job: TrainJob) -> TrainResult:
        """Compute gradient and product at the adapter that was sent; if the loss is not finite there, only say so.

        Raises:
            TrainError: a direction of another adapter, or a model whose backward pass cannot be differentiated; the
                client and the model are named.
        """
        direction = job.inputs.get(HESSIAN_DIRECTION)
        try:
            found = _curvature(job, direction, self.hessian, self.epsilon, "gradient-and-hessian-row")
        except NonFiniteLossError as error:
            return _not_finite(job, error, self.sends)
        return _result(job, found, _evaluations(found, self.hessian))


class BackpropAndHessianRow(Backprop):
    """Local steps, and the Hessian's product with the server's direction at the adapter that was sent (ours).

    For the strategy ``fagh-opt``, which reads the local steps as a gradient. The loss that is reported is that of the
    adapter that was sent, over all examples, so that the server can judge its own last step.

    Args:
        hessian: see :class:`GradientAndHessianRow`.
        epsilon: see :class:`GradientAndHessianRow`.
        kwargs: keywords of :class:`fedllm.clients.backprop.Backprop`.
    """

    def __init__(
        self,
        *,
        hessian: HvpMethod = "double-backward",
        epsilon: Annotated[float, Field(gt=0)] = 1e-2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hessian: HvpMethod = hessian
        self.epsilon = epsilon

    def run(self, job: TrainJob) -> TrainResult:
        """Compute the product, then train for the configured steps; if the first loss is not finite, only say so.

        Raises:
            TrainError: as of :meth:`GradientAndHessianRow.run` and :meth:`fedllm.clients.backprop.Backprop.run`.
        """
        direction = job.inputs.get(HESSIAN_DIRECTION)
        try:
            before = _curvature(job, direction, self.hessian, self.epsilon, "backprop-and-hessian-row")
        except NonFiniteLossError as error:
            return _not_finite(job, error, ADAPTER)
        result = super().run(job)
        extras = {} if before.product is None else {HESSIAN_ROW: before.product}
        return replace(
            result,
            loss=before.loss,
            metrics={
                **result.metrics,
                "step-loss": result.loss,
                "gradient-evaluations": result.metrics["steps"] + _evaluations(before, self.hessian),
                NUM_TARGETS: int(before.weight),
            },
            extras={**result.extras, **extras},
        )


def _curvature(
    job: TrainJob, direction: Mapping[str, Tensor] | None, method: HvpMethod, epsilon: float, key: str
) -> Curvature:
    """Gradient and product over all examples; errors name the client, the model, and the key to set."""
    parameters = owned_parameters(job)
    advice = f"set {key}.hessian=central-difference, or model.attention=eager"
    where = f"client {job.node}, round {job.round}, model {job.bundle.config.name}"
    attention = str(getattr(job.bundle.model.config, "_attn_implementation", ""))
    if direction is not None and method == "double-backward" and attention.startswith("flash"):
        # Some of its kernels say nothing and leave the product without their part.
        raise TrainError(f"{where}: {NO_DOUBLE_BACKWARD}: its attention is {attention}; {advice}")
    with training(job, parameters, dropout=False):
        try:
            return gradient_and_hvp(
                lambda batch: job.task.loss(job.bundle.model, batch),
                parameters,
                _batches(job),
                direction,
                method=method,
                epsilon=epsilon,
            )
        except TrainError as error:
            way_out = f"; {advice}" if NO_DOUBLE_BACKWARD in str(error) else ""
            raise type(error)(f"{where}: {error}{way_out}") from error


def _batches(job: TrainJob) -> Iterator[tuple[Batch, float]]:
    """All examples once, each batch with the number of its targets: examples, or label tokens."""
    bundle = job.bundle
    for indices in length_sorted_batches(job.examples, job.train.batch_size):
        batch = job.task.collate(job.examples, indices, bundle.tokenizer.pad_token_id)
        weight = job.task.num_targets(batch)
        yield {name: tensor.to(bundle.device) for name, tensor in batch.items()}, float(weight)


def _not_finite(job: TrainJob, error: NonFiniteLossError, sends: ReplyKind) -> TrainResult:
    """What tells the server that the adapter it sent is of no use, with arrays of the expected form."""
    logger.warning("%s", error)
    arrays = {
        name: job.start[name] if sends == ADAPTER else torch.zeros_like(p, dtype=torch.float32)
        for name, p in owned_parameters(job).items()
    }
    return TrainResult(arrays, num_examples=len(job.examples), loss=math.inf)


def _evaluations(found: Curvature, method: HvpMethod) -> int:
    """Gradients that were computed, where an exact product counts as one and a difference as two."""
    if found.product is None:
        return 1
    return 2 if method == "double-backward" else 3


def _result(job: TrainJob, found: Curvature, evaluations: int) -> TrainResult:
    return TrainResult(
        arrays=found.gradient,
        num_examples=len(job.examples),
        loss=found.loss,
        metrics={"steps": 0, "gradient-evaluations": evaluations, NUM_TARGETS: int(found.weight)},
        extras={} if found.product is None else {HESSIAN_ROW: found.product},
    )
