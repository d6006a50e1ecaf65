"""Which gradient mode a node uses: the one that it asks for, or the first of a list that its memory can afford."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

from pydantic import BeforeValidator

from fedllm.config import RunConfig, Scalar
from fedllm.errors import PlanError
from fedllm.lora.memory import MemoryModel
from fedllm.lora.modes import Mode, Rung, StepShape, mode_memory
from fedllm.narration import format_bytes
from fedllm.nodes import NodeInfo
from fedllm.planned import base_bits, compute_bytes
from fedllm.resources import GRADIENT_MODE, MEMORY

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

logger = logging.getLogger(__name__)


def _split(value: Any) -> Any:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


Modes = Annotated[tuple[Rung, ...], BeforeValidator(_split)]


class Ladder:
    """Gradient modes in order of preference, with what each needs.

    Args:
        modes: names of client updates; empty: nothing is planned.
    """

    def __init__(self, modes: Sequence[Mode]) -> None:
        self._modes = tuple(modes)
        self._needs: dict[Mode, int] = {}
        self._plugins: Mapping[str, Mapping[str, Scalar]] = {}
        self._told: dict[str, Mode] = {}

    def prepare(self, config: RunConfig, bundle: ModelBundle) -> None:
        """Predict the memory of every mode for the run's model, batch and length."""
        self._plugins = config.plugins
        if not self._modes:
            return
        from fedllm.model_spec import kept_attention, model_spec

        base: Any = bundle.model.get_base_model()
        settings: Any = bundle.model.peft_config["default"]
        spec = model_spec(type(base), base.config, settings.modules_to_save or ())
        model = config.model
        memory = MemoryModel(
            attention=kept_attention(base.config, bundle.device),
            adapter_dropout=config.lora.dropout > 0,
            quantized_compute=compute_bytes(model),
        )
        for mode in self._modes:
            own, batch = config.plugins.get(mode, {}), config.train.batch_size
            shape = StepShape(
                ranks=bundle.ranks,
                bits=base_bits(model),
                batch=batch,
                length=config.data.max_length,
                micro_batch=_pass_size(own, batch),
                tangents=int(own.get("tangent-chunk", 0) or own.get("tangents", 1)),
            )
            recomputes = replace(memory, checkpointing=bool(own.get("gradient-checkpointing", False)))
            self._needs[mode] = mode_memory(mode, spec, shape, recomputes).total

    def mode_of(self, node: NodeInfo) -> Mode | None:
        """The mode that a node asks for; else the first that fits the memory that it described, else the last.

        Raises:
            PlanError: the node did not say how much memory it has, or the strategy runs outside fedllm's server.
        """
        asked = None if node.description is None else node.description.get(GRADIENT_MODE)
        if asked in get_args(Rung):
            return cast(Mode, asked)
        if not self._modes:
            return None
        if not self._needs:
            raise PlanError("spry.modes needs the model's sizes: run the strategy by fedllm's server app")
        available = None if node.description is None else node.description.get(MEMORY)
        if not isinstance(available, int | float):
            raise PlanError(
                f"node {node.name} did not describe its {MEMORY}, by which spry.modes picks its gradient mode"
            )
        fitting = [mode for mode in self._modes if self._needs[mode] <= available]
        mode = fitting[0] if fitting else self._modes[-1]
        if self._told.get(node.name) != mode:
            self._told[node.name] = mode
            needs = f"needs {format_bytes(self._needs[mode])} of {format_bytes(available)}"
            if fitting:
                logger.info("node %s trains by %s, which %s", node.name, mode, needs)
            else:
                logger.warning("node %s: no mode of spry.modes fits; %s %s", node.name, mode, needs)
        return mode

    def parameters(self, mode: Mode) -> dict[str, Scalar]:
        """The parameters that the run's configuration has for a mode."""
        return dict(self._plugins.get(mode, {}))


def _pass_size(parameters: Mapping[str, Scalar], batch: int) -> int:
    """Examples that share a pass by a mode's own parameters; 0: they do not say."""
    if "gradient-accumulation" in parameters:
        return math.ceil(batch / int(parameters["gradient-accumulation"]))
    return int(parameters.get("micro-batch-size", 0))
