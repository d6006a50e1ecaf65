"""What a plan is made from and what it says: a node's budget, the options, and the plans themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fedllm.errors import PlanError
from fedllm.lora.memory import BITS, MemoryModel
from fedllm.lora.timing import TimeModel

_KEYS = {
    "memory-bytes": "memory_bytes",
    "num-examples": "num_examples",
    "flops-per-second": "flops_per_second",
    "upload-rate": "upload_rate",
    "download-rate": "download_rate",
}


def one_epoch(num_examples: int, batch_size: int) -> int:
    """Steps of a round in which every example is seen once."""
    return math.ceil(num_examples / batch_size)


def ranks_up_to(limit: int) -> tuple[int, ...]:
    """The ranks that may be planned unless some are given: powers of two below the limit, and the limit."""
    return (*(2**i for i in range(limit.bit_length()) if 2**i < limit), limit)


@dataclass(frozen=True)
class NodeBudget:
    """What a node can spend.

    Attributes:
        node: its name.
        memory_bytes: bytes for a training step, beyond what the process takes before the model is loaded.
        num_examples: training examples it holds.
        flops_per_second: measured speed, see :meth:`TimeModel.measured_speed`; infinite: time does not count.
        upload_rate: bytes per second from the node; infinite: no delay.
        download_rate: bytes per second to the node; infinite: no delay.

    Raises:
        PlanError: a budget that is not positive, or NaN; the node and the key are named.
    """

    node: str
    memory_bytes: float
    num_examples: int
    flops_per_second: float = math.inf
    upload_rate: float = math.inf
    download_rate: float = math.inf

    def __post_init__(self) -> None:
        for key, name in _KEYS.items():
            value = getattr(self, name)
            bounded = name not in ("memory_bytes", "num_examples") or value < math.inf
            if not (value > 0 and bounded):  # NaN fails every comparison
                raise PlanError(f"node {self.node}: {key} is {value!r}, expected a positive number")

    @classmethod
    def from_description(
        cls, node: str, description: Mapping[str, object], required: Iterable[str] = ()
    ) -> NodeBudget:
        """Read a budget from what a node told of itself.

        Args:
            node: its name.
            description: ``memory-bytes`` and ``num-examples``; optionally ``flops-per-second``, ``upload-rate`` and
                ``download-rate`` in bytes per second. Other keys are ignored.
            required: optional keys that must be there too.

        Raises:
            PlanError: a key is missing, or its value is no positive finite number; the node and the key are named.
        """
        values: dict[str, float] = {}
        for key, name in _KEYS.items():
            if key not in description:
                if key in ("memory-bytes", "num-examples", *required):
                    raise PlanError(f"node {node}: its budget lacks {key}; expected a positive number")
                continue
            value = description[key]
            number = (
                float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            )
            if not (math.isfinite(number) and number > 0):
                raise PlanError(f"node {node}: {key} is {value!r}, expected a positive number")
            if key == "num-examples" and number != int(number):
                raise PlanError(f"node {node}: {key} is {value!r}, expected a whole number")
            values[name] = number
        count = int(values.pop("num_examples"))
        return cls(node=node, num_examples=count, **values)


@dataclass(frozen=True)
class PlanOptions:
    """What may be planned, and how a plan is judged.

    Attributes:
        ranks: allowed ranks of an adapted weight; 0 (not adapted) is always allowed.
        batch_sizes: allowed batch sizes.
        bits: allowed widths of the base.
        sequence_length: tokens of the longest example.
        steps: optimiser steps of a round, of (num_examples, batch_size).
        deadline_seconds: of a round, transfers included; infinite: none.
        under_training_weight: value lost by a node that does none of its steps; a plan's gain is at most 1.
        memory: constants of the memory model.
        time: constants of the time model.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    bits: tuple[int, ...] = (16, 8, 4)
    sequence_length: int = 128
    steps: Callable[[int, int], int] = one_epoch
    deadline_seconds: float = math.inf
    under_training_weight: float = 1.0
    memory: MemoryModel = field(default_factory=MemoryModel)
    time: TimeModel = field(default_factory=TimeModel)

    def __post_init__(self) -> None:
        for name in ("ranks", "batch_sizes", "bits"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise PlanError(f"{name}: expected positive whole numbers, found {values}")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        if unknown := set(self.bits) - set(BITS):
            raise PlanError(f"bits: expected some of {BITS}, found {sorted(unknown)}")
        if self.sequence_length < 1:
            raise PlanError(f"sequence_length: expected at least 1, found {self.sequence_length}")
        if not self.deadline_seconds > 0:
            raise PlanError(f"deadline_seconds: expected a positive number, found {self.deadline_seconds}")
        if not (math.isfinite(self.under_training_weight) and self.under_training_weight >= 0):
            raise PlanError(f"under_training_weight: expected at least 0, found {self.under_training_weight}")


@dataclass(frozen=True)
class NodePlan:
    """What one node does.

    Attributes:
        node: its name.
        bits: width of its base.
        batch_size: examples in a step.
        steps: optimiser steps of a round; fewer than asked for when the deadline comes first.
        ranks: rank of every adapted weight, by its name in the base model.
        predicted_bytes: peak memory of a step.
        predicted_seconds: of a round, transfers included; 0 when neither speed nor link is known.
        under_training: share of the round's steps that the deadline leaves undone.
        value: gain (0 to 1) minus the penalty for under-training.
    """

    node: str
    bits: int
    batch_size: int
    steps: int
    ranks: Mapping[str, int]
    predicted_bytes: int
    predicted_seconds: float
    under_training: float
    value: float


@dataclass(frozen=True)
class CohortPlan:
    """Plans of all nodes that can take part, and why the others cannot; both by node name."""

    plans: Mapping[str, NodePlan]
    errors: Mapping[str, PlanError]
