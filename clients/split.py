"""Split learning: the client runs the first blocks, the server the rest (SplitLoRA, arXiv 2407.00952, steps a1–a5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from fedllm.clients.local import (
    LocalOptimizer,
    batch_of,
    check_loss,
    owned_parameters,
    result_of,
    steps_of,
    training,
)
from pydantic import Field
from torch import Tensor

from fedllm.errors import SplitError, TrainError
from fedllm.records import IMPORTANCE
from fedllm.split.codec import ActivationCodec
from fedllm.split.endpoint import Certificates
from fedllm.split.frames import Packet
from fedllm.split.importance import WeightImportance
from fedllm.split.model import SplitModel
from fedllm.split.stream import SplitStream
from fedllm.split.trainer import GRADIENT, HEAD, HIDDEN, STEP
from fedllm.tasks import Batch, loss_of_logits
from fedllm.update import TrainJob, TrainResult

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Split:
    """Trains the first blocks with gradients from the split server; the strategy ``hsplitlora`` starts it.

    Args:
        address: of the split server, as this node reaches it; the strategy tells it.
        token: this client's right to a stream; the strategy tells it.
        labels: ``server``: labels go up and the head runs there; ``client``: the head runs here, labels stay.
        codec: how activations, and gradients at the head, go up: fp32, bf16, fp16 or int8 with a scale per row.
        root_certificate: PEM file, on every node, of the authority that signed the server's certificate; empty: no
            TLS, on loopback only.
        connect_timeout: seconds within which the server must answer.
        step_timeout: seconds that the server may take for an answer.
        optimizer: ``adamw`` or ``sgd``; its state starts fresh in every round.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
    """

    def __init__(
        self,
        *,
        address: str = "",
        token: str = "",
        labels: Literal["server", "client"] = "server",
        codec: ActivationCodec = "fp32",
        root_certificate: str = "",
        connect_timeout: Positive = 30.0,
        step_timeout: Positive = 600.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: NonNegative = 0.0,
        max_grad_norm: NonNegative = 1.0,
    ) -> None:
        self.address = address
        self.token = token
        self.labels = labels
        self.codec: ActivationCodec = codec
        self.root_certificate = root_certificate
        self.connect_timeout = connect_timeout
        self.step_timeout = step_timeout
        self.optimizer = LocalOptimizer(optimizer, weight_decay=weight_decay, max_grad_norm=max_grad_norm)

    def run(self, job: TrainJob) -> TrainResult:
        """Train for the configured steps over one stream.

        Raises:
            SplitError: there is no server to split with, it cannot be reached, or it ended the stream; it says why.
            TrainError: a loss that is not finite.
        """
        if not self.address:
            raise TrainError(
                f'client {job.node}: the update rule split needs a split server; set strategy = "hsplitlora", which '
                "starts one and tells its address"
            )
        try:
            with self._stream() as stream:
                return self._train(job, stream)
        except SplitError as error:
            raise SplitError(f"client {job.node}, round {job.round}: {error}") from error

    def _stream(self) -> SplitStream:
        certificates = Certificates(root=Path(self.root_certificate)) if self.root_certificate else None
        return SplitStream(
            self.address,
            self.token,
            certificates,
            codec=self.codec,
            connect_timeout=self.connect_timeout,
            step_timeout=self.step_timeout,
        )

    def _train(self, job: TrainJob, stream: SplitStream) -> TrainResult:
        split = SplitModel(job.bundle.model.get_base_model())
        parameters = owned_parameters(job)
        optimizer = self.optimizer.build(job, parameters)
        losses: list[float] = []
        importance = WeightImportance(job.bundle.model.get_base_model())
        with training(job, parameters), importance.watching() if job.ask_importance else nullcontext():
            for step, batch, prepare_next in _with_the_next_in_hand(job):
                loss = self._step(job, split, stream, step, batch, prepare_next)
                check_loss(job, step, loss)
                self.optimizer.step(optimizer, parameters, parameters)
                losses.append(loss)
        stream.finish()
        traffic = {"split-bytes-up": stream.bytes_up, "split-bytes-down": stream.bytes_down}
        result = result_of(job, parameters, losses, **traffic)
        scores = {name: torch.tensor([score]) for name, score in importance.scores().items()}
        return replace(result, extras={IMPORTANCE: scores}) if scores else result

    def _step(
        self,
        job: TrainJob,
        split: SplitModel,
        stream: SplitStream,
        step: int,
        batch: Batch,
        idle: Iterator[None],
    ) -> float:
        """One step; while the server works, ``idle`` is advanced. Gradients are left in the parameters."""
        mask = batch["attention_mask"]
        sent = split.front(batch["input_ids"], mask, split.num_blocks)
        tensors: dict[str, Tensor] = {"hidden": sent, "mask": mask > 0}
        if self.labels == "server":
            tensors["labels"] = batch["labels"]
        stream.send(Packet(STEP, step, tensors))
        next(idle, None)
        if self.labels == "client":
            hidden = stream.receive(HIDDEN).tensors["hidden"].to(sent).requires_grad_()
            loss = loss_of_logits(job.task, split.head(hidden, mask), mask, batch["labels"])
            loss.backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            numbers = {"targets": float(job.task.num_targets(batch)), "loss": loss.item()}
            stream.send(Packet(HEAD, step, {"hidden": hidden.grad}, numbers))
        answer = stream.receive(GRADIENT)
        gradient = answer.tensors.get("hidden", torch.empty(0))
        if gradient.shape != sent.shape:
            raise SplitError(
                f"step {step}: a gradient of shape {list(gradient.shape)}, expected {list(sent.shape)}"
            )
        if sent.requires_grad:
            sent.backward(gradient.to(sent))  # type: ignore[no-untyped-call]
        return answer.numbers["loss"]


def _with_the_next_in_hand(job: TrainJob) -> Iterator[tuple[int, Batch, Iterator[None]]]:
    """Steps with their batches; advancing the iterator that comes with a step prepares the batch of the next one."""
    steps = steps_of(job)
    ready: list[tuple[int, Batch]] = []

    def prepare() -> Iterator[None]:
        for step, indices in steps:
            ready.append((step, batch_of(job, indices)))
            yield

    preparing = prepare()
    next(preparing, None)
    while ready:
        step, batch = ready.pop(0)
        yield step, batch, preparing
        if not ready:
            next(preparing, None)
