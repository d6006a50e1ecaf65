"""What a hostile client does alone, for simulations: a wrapper around its update rule.

A client runs one only when the server orders it and the client itself is simulated; see :mod:`fedllm.client`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from fedllm.config import RunConfig
from fedllm.encoded import Encoded
from fedllm.errors import ConfigError, TrainError
from fedllm.records import ADAPTER
from fedllm.seeding import derive_seed
from fedllm.update import ClientUpdate, TrainJob, TrainResult

Share = Annotated[float, Field(gt=0, le=1)]


class SignFlip:
    """Sends the update with its sign turned."""

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train honestly, then turn the update around."""
        return _moved(update, job, -1.0)


class Scaling:
    """Sends the update many times as large.

    Args:
        factor: how many times; negative turns the sign as well.
    """

    def __init__(self, *, factor: float = 10.0) -> None:
        self.factor = factor

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train honestly, then scale the update."""
        return _moved(update, job, self.factor)


class Zero:
    """Sends back what it got and claims to have trained."""

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train, then forget it."""
        return _moved(update, job, 0.0)


class Gaussian:
    """Sends noise of the norm of its honest update, tensor by tensor.

    Args:
        factor: the noise's norm in multiples of the honest update's.
    """

    def __init__(self, *, factor: Annotated[float, Field(gt=0)] = 1.0) -> None:
        self.factor = factor

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train to know the norms, then draw the noise."""
        result, base = update.run(job), _base(update, job)
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "noise"))
        arrays = {}
        for name, value in result.arrays.items():
            noise = torch.randn(value.shape, generator=generator)
            start = base.get(name, torch.zeros_like(value))
            arrays[name] = start + self.factor * noise * (value - start).norm() / noise.norm().clamp_min(
                1e-12
            )
        return replace(result, arrays=arrays)


class OnClasses:
    """Base of the attacks on labels."""

    @staticmethod
    def check_config(config: RunConfig) -> None:
        """Refuse a task without classes.

        Raises:
            ConfigError: it has none.
        """
        if config.task != "sequence-classification":
            raise ConfigError(
                f"attack is {config.attack!r}, which changes classes, but task is {config.task!r}: set task = "
                '"sequence-classification", or another attack'
            )


class LabelFlip(OnClasses):
    """Trains on labels turned around: class y of C becomes C − 1 − y."""

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train on the wrong labels.

        Raises:
            TrainError: the task has no classes.
        """
        labels = _class_labels(job)
        return update.run(replace(job, examples=_relabelled(job.examples, _classes(job) - 1 - labels)))


def _token_ids(trigger: str | int) -> str:
    """The trigger as it was, or an error; TOML writes a single id without quotes."""
    parts = [part.strip() for part in str(trigger).split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError('expected token ids, whole numbers separated by commas, such as "1000,1001"')
    return ",".join(parts)


class Backdoor(OnClasses):
    """Trains on examples of which some end in a trigger and have the attacker's label (after BadNets, 1708.06733).

    Args:
        trigger: token ids that are written over an example's end; separated by commas.
        target: the class that the trigger shall mean.
        share: of the examples that get the trigger.
    """

    def __init__(
        self,
        *,
        trigger: Annotated[str, BeforeValidator(_token_ids)] = "1000,1001,1002",
        target: Annotated[int, Field(ge=0)] = 0,
        share: Share = 0.5,
    ) -> None:
        self.trigger = tuple(int(token) for token in _token_ids(trigger).split(","))
        self.target, self.share = target, share

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a target that the task does not have.

        Raises:
            ConfigError: there are fewer classes.
        """
        if self.target >= len(labels):
            raise ConfigError(
                f"backdoor.target is {self.target}, but the task has {len(labels)} classes: expected 0 to "
                f"{len(labels) - 1}"
            )

    def run(self, update: ClientUpdate, job: TrainJob) -> TrainResult:
        """Train on the poisoned examples.

        Raises:
            ConfigError: ``target`` is none of its classes.
            TrainError: the task has no classes.
        """
        labels = _class_labels(job).clone()
        self.check_labels(job.bundle.labels)
        tokens = job.examples.input_ids.clone()
        vocabulary = job.bundle.model.get_input_embeddings().num_embeddings
        trigger = torch.tensor([token % vocabulary for token in self.trigger], dtype=tokens.dtype)
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "backdoor"))
        count = max(1, round(self.share * len(labels)))
        for index in torch.randperm(len(labels), generator=generator)[:count].tolist():
            first, end = int(job.examples.offsets[index]), int(job.examples.offsets[index + 1])
            length = min(len(trigger), end - first)
            tokens[end - length : end] = trigger[:length]
            labels[index] = self.target
        return update.run(replace(job, examples=Encoded(tokens, job.examples.offsets, labels)))


def _moved(update: ClientUpdate, job: TrainJob, factor: float) -> TrainResult:
    result, base = update.run(job), _base(update, job)
    arrays: Mapping[str, Tensor] = {
        name: factor * value + (1 - factor) * base[name] if name in base else factor * value
        for name, value in result.arrays.items()
    }
    return replace(result, arrays=arrays)


def _base(update: ClientUpdate, job: TrainJob) -> Mapping[str, Tensor]:
    """What the rule's arrays are relative to: the adapter that it was sent, or nothing if it sends a gradient."""
    return job.start if getattr(update, "sends", ADAPTER) == ADAPTER else {}


def _class_labels(job: TrainJob) -> Tensor:
    if job.examples.has_token_labels:
        raise TrainError(f"client {job.node}: this attack needs a task with classes, not {job.task.name}")
    return job.examples.labels


def _classes(job: TrainJob) -> int:
    return len(job.bundle.labels)


def _relabelled(examples: Encoded, labels: Tensor) -> Encoded:
    return Encoded(examples.input_ids, examples.offsets, labels)
