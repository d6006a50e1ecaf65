"""The server's part of split training: answers the steps of a session until nobody is left.

``parallel``: one step over the concatenated batches of all clients (SplitLoRA, arXiv 2407.00952, steps a3–a4);
``sequential``: one step for each client, in the order of the seats, as the authors' released code does it. Who sends
first never matters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedllm.errors import SplitError
from fedllm.split.cohort import CohortStep, Loss, Part
from fedllm.split.frames import Packet
from fedllm.split.model import SplitModel
from fedllm.split.session import Seat, Session

logger = logging.getLogger(__name__)

STEP, HIDDEN, HEAD, GRADIENT = "step", "hidden", "head", "gradient"
"""Kinds of packets in a step: activations up; and down the gradient of these, or, where labels stay on the client,
first the last hidden states, for which the client sends the gradient at the head."""

_FAILED = "the server could not do the step"


class SplitTrainer:
    """Trains the server's blocks with what the clients of a session send.

    Args:
        split: the server's model, adapters included; in training mode as the caller wants it.
        session: the clients.
        optimizer: of the server's trainable parameters.
        loss: of the task; None where labels stay on the clients.
        mode: ``parallel`` or ``sequential``.
        max_grad_norm: the server's gradient is scaled down to this norm; 0: never.
        after_backward: called before each optimiser step, with gradients in place.
    """

    def __init__(
        self,
        split: SplitModel,
        session: Session,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None,
        *,
        mode: Literal["parallel", "sequential"] = "parallel",
        max_grad_norm: float = 1.0,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        self._split = split
        self._session = session
        self._optimizer = optimizer
        self._loss = loss
        self._mode = mode
        self._max_grad_norm = max_grad_norm
        self._after_backward = after_backward
        self.steps = 0
        self.losses: list[float] = []

    def run(self) -> None:
        """Answer steps until every client has left; an error of the server itself ends the session with its reason.

        Raises:
            SplitError: the server failed; all clients have been told.
        """
        try:
            while arrived := self._session.gather(STEP):
                groups = [arrived] if self._mode == "parallel" else [[one] for one in arrived]
                for group in groups:
                    self._step(group)
        except Exception as error:
            self._session.close(f"{_FAILED}: {error}")
            raise SplitError(f"{_FAILED}: {error}") from error

    def _step(self, arrived: Sequence[tuple[Seat, Packet]]) -> None:
        group = [(seat, packet, part) for seat, packet in arrived if (part := self._part(seat, packet))]
        if not group:
            return
        seats = [seat for seat, _, _ in group]
        step = CohortStep(self._split, [part for _, _, part in group])
        if self._loss is not None:
            gradients, losses = step.backward_from_labels(self._loss)
        else:
            gradients, losses = self._through_heads(step, seats, [packet.step for _, packet, _ in group])
        if self._update():
            self.losses.extend(value for value in losses if math.isfinite(value))
        for (seat, packet, _), gradient, loss in zip(group, gradients, losses, strict=True):
            if not math.isfinite(loss):
                self._session.leave(
                    seat, f"client {seat.ticket.node}, step {packet.step}: the loss is {loss}"
                )
            self._session.answer(seat, Packet(GRADIENT, packet.step, {"hidden": gradient}, {"loss": loss}))

    def _part(self, seat: Seat, packet: Packet) -> Part | None:
        """What a client sent, or None after it has been told what is wrong with it."""
        try:
            return part_of(packet, seat.ticket.cut, self._split, labels=self._loss is not None)
        except SplitError as error:
            self._session.leave(seat, f"client {seat.ticket.node}, step {packet.step}: {error}")
            return None

    def _through_heads(
        self, step: CohortStep, seats: Sequence[Seat], numbers: Sequence[int]
    ) -> tuple[list[Tensor], list[float]]:
        """Let the clients run the head; one that is lost meanwhile counts for nothing."""
        outputs = step.outputs
        for seat, output, number in zip(seats, outputs, numbers, strict=True):
            self._session.answer(seat, Packet(HIDDEN, number, {"hidden": output}))
        gradients = [torch.zeros_like(output) for output in outputs]
        counts, losses = [0] * len(seats), [math.nan] * len(seats)
        for seat, packet in self._session.gather(HEAD, among=seats):
            place = seats.index(seat)
            gradient, count = packet.tensors.get("hidden"), packet.numbers.get("targets", 0.0)
            if (
                gradient is None
                or gradient.shape != outputs[place].shape
                or not 1 <= count <= gradient.numel()
            ):
                self._session.leave(
                    seat,
                    f"client {seat.ticket.node}, step {packet.step}: expected the gradient of hidden states of shape "
                    f"{tuple(outputs[place].shape)} and its number of targets",
                )
                continue
            gradients[place] = gradient.to(outputs[place])
            counts[place], losses[place] = int(count), packet.numbers.get("loss", math.nan)
        if not any(counts):
            return gradients, losses
        return step.backward_from_heads(gradients, counts), losses

    def _update(self) -> bool:
        parameters = [
            p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        finite = bool(parameters) and all(bool(torch.isfinite(p.grad).all()) for p in parameters)
        if finite:
            if self._after_backward is not None:
                self._after_backward()
            if self._max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
            self._optimizer.step()
            self.steps += 1
        elif parameters:
            logger.warning(
                "step %d: the server's gradient is not finite; the step is left out", self.steps + 1
            )
        self._optimizer.zero_grad(set_to_none=True)
        return finite


def part_of(packet: Packet, cut: int, split: SplitModel, *, labels: bool) -> Part:
    """Check the tensors of a step.

    Raises:
        SplitError: a tensor is missing or has another shape than it must.
    """
    tensors: Mapping[str, Tensor] = packet.tensors
    expected = {"hidden", "mask"} | ({"labels"} if labels else set())
    if tensors.keys() != expected:
        raise SplitError(f"expected the tensors {sorted(expected)}, found {sorted(tensors)}")
    hidden, mask, width = tensors["hidden"], tensors["mask"], split.width
    if hidden.dim() != 3 or hidden.shape[2] != width or not hidden.shape[0] or not hidden.shape[1]:
        raise SplitError(f"expected hidden states [batch, length, {width}], found {list(hidden.shape)}")
    if mask.shape != hidden.shape[:2] or not bool(mask.any(dim=1).all()):
        raise SplitError(
            f"expected a mask {list(hidden.shape[:2])} with a token in every row, found {list(mask.shape)}"
        )
    if labels and tensors["labels"].shape not in (mask.shape, mask.shape[:1]):
        raise SplitError(
            f"expected labels for a batch of {list(mask.shape)}, found {list(tensors['labels'].shape)}"
        )
    device, dtype = split.device, split.dtype
    return Part(
        cut, hidden.to(device, dtype), mask.to(device), tensors["labels"].to(device) if labels else None
    )
