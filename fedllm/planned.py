"""What a planning strategy tells one node to change in a round: base weights' bits, batch size and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fedllm.config import ModelConfig, RunConfig
from fedllm.errors import PlanError

Bits = Literal[4, 8, 16, 32]

PLAN_BITS, PLAN_BATCH_SIZE, PLAN_LOCAL_STEPS = "plan-bits", "plan-batch-size", "plan-local-steps"
PLAN_BYTES, PLAN_BLOCKS = "plan-bytes", "plan-blocks"
"""Keys of a message's configuration; without ``plan-bits`` nothing is planned."""


@dataclass(frozen=True)
class Planned:
    """The settings of one node.

    Attributes:
        bits: width of the base weights: 32 is float32; 16 the run's half-precision dtype, else bfloat16; 8 and 4 are
            bitsandbytes' int8 and NF4.
        batch_size: examples in a step.
        local_steps: optimiser steps in a round; 0: the run's configuration decides.
        bytes: memory that the plan expects to need; 0: not known.
        blocks: first blocks of the model that the node holds; 0: all of them.
    """

    bits: Bits
    batch_size: int
    local_steps: int = 0
    bytes: int = 0
    blocks: int = 0

    def to_config(self) -> dict[str, int]:
        """The settings as they travel."""
        return {
            PLAN_BITS: self.bits,
            PLAN_BATCH_SIZE: self.batch_size,
            PLAN_LOCAL_STEPS: self.local_steps,
            PLAN_BYTES: self.bytes,
            PLAN_BLOCKS: self.blocks,
        }

    @classmethod
    def from_config(cls, record: Mapping[str, Any]) -> Planned | None:
        """Read the settings of a message; None if nothing is planned.

        Raises:
            PlanError: a value is missing or out of bounds; the key is named.
        """
        if PLAN_BITS not in record:
            return None
        bits = _whole(record, PLAN_BITS, 4)
        if bits not in (4, 8, 16, 32):
            raise PlanError(f"the server sent {PLAN_BITS}={bits}, expected 4, 8, 16 or 32")
        return cls(
            cast(Bits, bits),
            _whole(record, PLAN_BATCH_SIZE, 1),
            _whole(record, PLAN_LOCAL_STEPS, 0),
            _whole(record, PLAN_BYTES, 0),
            _whole(record, PLAN_BLOCKS, 0) if PLAN_BLOCKS in record else 0,
        )

    def apply(self, config: RunConfig) -> RunConfig:
        """The run's configuration as this node shall use it."""
        train: dict[str, int] = {"batch_size": self.batch_size}
        base: dict[str, str | int] = {**base_settings(config.model, self.bits)}
        if self.blocks:
            base["blocks"] = self.blocks
        if self.local_steps:
            train["local_steps"] = self.local_steps
        return config.model_copy(
            update={
                "model": config.model.model_copy(update=base),
                "train": config.train.model_copy(update=train),
            }
        )


def base_settings(model: ModelConfig, bits: Bits) -> dict[str, str]:
    """The keys of a model's configuration that hold its base weights in a number of bits."""
    if bits == 32:
        return {"dtype": "float32", "quantization": "none"}
    if bits == 16:
        half = model.dtype if model.dtype != "float32" else "bfloat16"
        return {"dtype": half, "quantization": "none"}
    return {"dtype": model.dtype, "quantization": f"{bits}bit"}


def base_bits(model: ModelConfig) -> Bits:
    """Bits of the base weights as a configuration has them."""
    if model.quantization != "none":
        return 4 if model.quantization == "4bit" else 8
    return 32 if model.dtype == "float32" else 16


def compute_bytes(model: ModelConfig) -> int:
    """Bytes of the dtype in which 8-bit and 4-bit weights compute, see :class:`fedllm.lora.memory.MemoryModel`."""
    return 4 if model.dtype == "float32" else 2


def _whole(record: Mapping[str, Any], key: str, least: int) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"the server sent {key}={value!r}, expected a whole number of at least {least}")
    return value
