"""What a client does with a training message: the protocol that every local update rule follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.models import ModelBundle
from fedllm.tasks import Task


@dataclass(frozen=True)
class TrainJob:
    """Everything that an update rule needs, without any Flower type.

    Attributes:
        bundle: base model with the adapter of this message already loaded in place.
        task: loss, collation and metrics.
        examples: the client's tokenised training examples, at least one.
        train: learning rates, batch size, steps.
        seed: seed of this (run, round, client); all randomness of the job follows from it.
        round: server round, from 1.
        node: the client's name, for messages.
        start: the adapter as it was sent; read-only.
        owned: names of the tensors to train and return; empty: all that are trainable.
        inputs: further array records of the message by name, for example the server's last step.
        ask_importance: also report how important each adapted module is, where the rule can tell.
    """

    bundle: ModelBundle
    task: Task
    examples: Encoded
    train: TrainConfig
    seed: int
    round: int
    node: str
    start: Mapping[str, torch.Tensor]
    owned: tuple[str, ...] = ()
    inputs: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    ask_importance: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What an update rule returns.

    Attributes:
        arrays: tensors by PEFT state-dict name, normally the new adapter.
        num_examples: training examples that the client holds; the weight of its reply.
        loss: mean training loss over the steps; infinite if that of the adapter which was sent is not finite;
            the arrays then count for nothing.
        metrics: further numbers for the log.
        extras: further tensors by record name, for example ``{"hessian-row": {...}}``.
    """

    arrays: Mapping[str, torch.Tensor]
    num_examples: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


class ClientUpdate(Protocol):
    """A local update rule; its constructor's keywords are its configuration."""

    def run(self, job: TrainJob) -> TrainResult:
        """Train on the client's examples and return what is sent to the server."""
        ...


class Attack(Protocol):
    """What a hostile client does instead of training honestly, in simulations only.

    One with a method ``check_labels(labels)`` may refuse the task's classes before the first round.
    """

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """What the client sends; ``update`` is the rule that an honest client runs on the job."""
        ...
