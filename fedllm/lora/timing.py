"""Time of a round in seconds: floating-point operations over a node's measured speed, and its link.

F = [2 P + 2 P_above] n for the frozen matrices, 4 n s h a block (twice that on the way back) for attention, and
6 n r (d + k) for each adapter. There are no weight gradients of the base, and back-propagation stops at the lowest
adapted block: a rank costs almost nothing, while batch, bits and the lowest adapted block decide. FedPipe-style, our
reconstruction (arXiv 2404.06448).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedllm.lora.spec import ModelSpec


@dataclass(frozen=True)
class TimeModel:
    """Constants of the time model.

    Attributes:
        checkpointing: whether blocks are computed a second time in the backward pass.
        slowdown: by bits, how much longer a step takes than at 16 bits; our estimates, to be measured where it counts.
        wire_bytes: bytes of a parameter on the link.
    """

    checkpointing: bool = False
    slowdown: Mapping[int, float] = field(default_factory=lambda: {32: 1.0, 16: 1.0, 8: 2.0, 4: 1.5})
    wire_bytes: float = 4.0

    def base_flops(self, spec: ModelSpec, lowest: int, batch: int, length: int) -> float:
        """Operations of one step without adapters.

        Args:
            spec: the model.
            lowest: block at which back-propagation stops; the number of blocks: only heads are trained.
            batch: examples in a step.
            length: tokens of an example.
        """
        tokens = batch * length
        inside = [2.0 * block.quantizable for block in spec.blocks]
        attention = 4.0 * length * spec.hidden_size
        output = 2.0 * spec.hidden_size * spec.vocabulary
        forward = sum(inside) + attention * spec.num_blocks + output
        above = sum(inside[lowest:])
        live = spec.num_blocks - lowest
        backward = above + 2 * attention * live + output
        if self.checkpointing:
            backward += above + attention * live
        heads = 6.0 * spec.head_parameters * batch
        return tokens * (forward + backward) + heads

    def adapter_flops(self, parameters: int, batch: int, length: int) -> float:
        """Operations of one step in adapters with Σ r (d + k) parameters."""
        return (8.0 if self.checkpointing else 6.0) * parameters * batch * length

    def step_seconds(
        self,
        spec: ModelSpec,
        ranks: Mapping[str, int],
        bits: int,
        batch: int,
        length: int,
        flops_per_second: float,
    ) -> float:
        """Seconds of one training step; arguments as for :meth:`MemoryModel.predict`, and the node's speed."""
        parameters = sum(weight.adapter_parameters(ranks.get(weight.name, 0)) for weight in spec.weights)
        flops = self.base_flops(spec, spec.lowest_block(ranks), batch, length)
        flops += self.adapter_flops(parameters, batch, length)
        return flops * self.slowdown[bits] / flops_per_second

    def link_seconds(self, parameters: int, upload_rate: float, download_rate: float) -> float:
        """Seconds to send adapters and heads down and up once.

        Args:
            parameters: how many travel.
            upload_rate: bytes per second from the node; infinite: no delay.
            download_rate: bytes per second to the node.
        """
        return parameters * self.wire_bytes * (1 / upload_rate + 1 / download_rate)

    def measured_speed(
        self,
        spec: ModelSpec,
        ranks: Mapping[str, int],
        bits: int,
        batch: int,
        length: int,
        seconds: float,
    ) -> float:
        """A node's operations per second from one timed training step, the inverse of :meth:`step_seconds`.

        Raises:
            ValueError: a time that is not positive and finite.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds of a step: expected a positive number, found {seconds}")
        return self.step_seconds(spec, ranks, bits, batch, length, 1.0) / seconds


@dataclass(frozen=True)
class RoundWork:
    """How the time of a round depends on the adapter's size, for one node, width, batch and lowest block."""

    steps: int
    deadline: float
    step_seconds: float
    step_seconds_per_parameter: float
    link_seconds: float
    link_seconds_per_parameter: float
    weight: float

    def steps_done(self, size: NDArray[np.float64]) -> NDArray[np.float64]:
        """Whole steps before the deadline."""
        return np.floor(self._progress(size) + 1e-9)

    def penalty(self, size: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weighted under-training; infinite where not one step ends in time."""
        done = self.steps_done(size)
        return np.where(done >= 1, self.weight * (1 - done / self.steps), np.inf)

    def relaxed(self, size: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same with fractions of steps: at most :meth:`penalty`, and it bounds what lies between two sizes."""
        return self.weight * (1 - np.clip(self._progress(size), 0, self.steps) / self.steps)

    def _progress(self, size: NDArray[np.float64]) -> NDArray[np.float64]:
        step = self.step_seconds + self.step_seconds_per_parameter * size
        left = self.deadline - self.link_seconds - self.link_seconds_per_parameter * size
        if self.deadline == math.inf:
            return np.full(np.shape(size), float(self.steps))
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.where(step > 0, left / step, np.where(left >= 0, np.inf, -np.inf))
        return np.clip(steps, 0, self.steps)

    def seconds(self, steps: int, size: float) -> float:
        """Of a round with so many steps."""
        step = self.step_seconds + self.step_seconds_per_parameter * size
        return steps * step + self.link_seconds + self.link_seconds_per_parameter * size
