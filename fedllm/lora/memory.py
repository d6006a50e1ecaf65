"""Memory of one training step in bytes: what a node needs for bits, batch, length and ranks.

FedPipe-style, our reconstruction (arXiv 2404.06448): frozen base at the effective bits of its quantisation, 16 bytes
for every trainable float32 parameter, activations that grow with the tokens of a batch. Back-propagation stops at the
lowest adapted block, so blocks below it keep nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedllm.lora.spec import ModelSpec, WeightSpec

BITS = (32, 16, 8, 4)
"""Widths at which a base can be held."""

_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted peak of a training step, in bytes.

    Attributes:
        base: frozen weights.
        adapter: low-rank factors with gradients and optimiser state.
        heads: the same for heads, with the frozen copies that stay in the base.
        activations: kept for the backward pass.
        transient: logits and their gradient, gradients on their way down, dequantised weights.
        workspace: everything that is no tensor.
    """

    base: float
    adapter: float
    heads: float
    activations: float
    transient: float
    workspace: float

    @property
    def total(self) -> int:
        """All of it, rounded up."""
        parts = (self.base, self.adapter, self.heads, self.activations, self.transient, self.workspace)
        return math.ceil(math.fsum(parts) - 1e-3)  # not by a byte for what is whole but for rounding


@dataclass(frozen=True)
class MemoryModel:
    """Constants of the memory model; the defaults describe ``peft`` LoRA trained with AdamW.

    Attributes:
        attention: ``sdpa`` keeps no attention scores, ``eager`` does, and ``math`` keeps them in float32: that is sdpa
            without a fused kernel, as on a CPU with attention dropout.
        checkpointing: whether blocks are recomputed in the backward pass.
        adapter_dropout: whether adapters see a dropped copy of their input, which is then kept too.
        keeps_outputs: whether the outputs of all candidates that back-propagation passes are kept too, to tell which of
            them matter (:class:`fedllm.split.importance.WeightImportance`).
        quantized_compute: bytes of the dtype in which 8-bit and 4-bit bases compute.
        trainable_bytes: per trainable float32 parameter: value 4, gradient 4, Adam's moments 8.
        activation_scale: factor on activations and transients, 1 until :func:`calibrated` has fitted it.
        workspace_bytes: bytes beside tensors that a step takes after the process has started.
    """

    attention: str = "sdpa"
    checkpointing: bool = False
    adapter_dropout: bool = False
    keeps_outputs: bool = False
    quantized_compute: int = 2
    trainable_bytes: float = 16.0
    activation_scale: float = 1.0
    workspace_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.attention not in ("sdpa", "eager", "math"):
            raise ValueError(f"attention: expected sdpa, eager or math, found {self.attention!r}")
        if self.quantized_compute not in (2, 4):
            raise ValueError(f"quantized_compute: expected 2 or 4 bytes, found {self.quantized_compute}")
        for name in ("trainable_bytes", "activation_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, found {value}")
        if not (math.isfinite(self.workspace_bytes) and self.workspace_bytes >= 0):
            raise ValueError(f"workspace_bytes: expected at least 0, found {self.workspace_bytes}")

    def compute_bytes(self, bits: int) -> int:
        """Bytes of the dtype in which a base of this width computes, and holds what is not quantised."""
        return {32: 4, 16: 2}.get(bits, self.quantized_compute)

    def base_bytes(self, spec: ModelSpec, bits: int) -> float:
        """Frozen weights at a width: 4.5 bits for NF4 (block 64), 8 and a float32 per row for LLM.int8().

        Raises:
            ValueError: a width not in :data:`BITS`.
        """
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, found {bits}")
        kept = self.compute_bytes(bits)
        quantizable = sum(block.quantizable for block in spec.blocks)
        if bits in (32, 16):
            return float(spec.parameters * kept)
        rows = sum(block.quantizable_rows for block in spec.blocks)
        packed = quantizable + rows * _FLOAT32 if bits == 8 else quantizable * 4.5 / 8
        return (spec.parameters - quantizable) * kept + packed

    def adapter_bytes(self, weight: WeightSpec, rank: int) -> float:
        """Trainable state of one adapter."""
        return self.trainable_bytes * weight.adapter_parameters(rank)

    def input_bytes(self, weight: WeightSpec, batch: int, length: int) -> float:
        """Activations that exist because a weight is adapted: its input, in float32, for the gradient of A.

        In float32 several weights share one input; it is counted for each, which errs on the safe side. With
        checkpointing these copies live for one block at a time and are part of :meth:`fixed`.
        """
        if self.checkpointing:
            return 0.0
        return self._copy_bytes(weight, batch * length)

    def fixed(self, spec: ModelSpec, lowest: int, bits: int, batch: int, length: int) -> MemoryEstimate:
        """Everything that does not depend on the ranks, once the lowest adapted block is known.

        Args:
            spec: the model.
            lowest: block at which back-propagation stops; the number of blocks: only heads are trained.
            bits: width of the base.
            batch: examples in a step.
            length: tokens of the longest example.

        Raises:
            ValueError: a width not in :data:`BITS`.
        """
        compute = self.compute_bytes(bits)
        tokens, live = batch * length, spec.num_blocks - lowest
        block = tokens * spec.activations[compute].token + self._attention_bytes(spec, compute, batch, length)
        activations = live * block
        # Logits, their float32 copy, log-probabilities and the gradient of these, all at once.
        loss = float(tokens * spec.vocabulary * (compute + 3 * _FLOAT32))
        if self.checkpointing and live:
            copies = [0.0] * spec.num_blocks
            for weight in spec.weights:
                copies[weight.block] += self._copy_bytes(weight, tokens)
            recomputed = block + max(copies[lowest:])  # of one block, after the logits have gone
            activations = recomputed + live * tokens * spec.hidden_size * compute
            loss = max(loss - recomputed, 0.0)
        if self.keeps_outputs:
            activations += compute * tokens * sum(w.rows for w in spec.weights if w.block >= lowest)
        transient = max(loss, self._gradients(spec, live, bits, batch, length))
        if bits in (8, 4):
            transient += spec.largest_weight * compute  # one weight at a time is dequantised
        return MemoryEstimate(
            base=self.base_bytes(spec, bits),
            adapter=0.0,
            heads=spec.head_parameters * (self.trainable_bytes + compute),
            activations=activations * self.activation_scale,
            transient=transient * self.activation_scale,
            workspace=self.workspace_bytes,
        )

    def predict(
        self, spec: ModelSpec, ranks: Mapping[str, int], bits: int, batch: int, length: int
    ) -> MemoryEstimate:
        """Peak of a training step.

        Args:
            spec: the model.
            ranks: rank by weight name; 0 or absent: not adapted.
            bits: width of the base.
            batch: examples in a step.
            length: tokens of the longest example.

        Raises:
            ValueError: a width not in :data:`BITS`.
        """
        fixed = self.fixed(spec, spec.lowest_block(ranks), bits, batch, length)
        adapted = [weight for weight in spec.weights if ranks.get(weight.name, 0) > 0]
        inputs = math.fsum(self.input_bytes(weight, batch, length) for weight in adapted)
        return replace(
            fixed,
            adapter=math.fsum(self.adapter_bytes(weight, ranks[weight.name]) for weight in adapted),
            activations=fixed.activations + inputs * self.activation_scale,
        )

    def _copy_bytes(self, weight: WeightSpec, tokens: int) -> float:
        copies = 3 if self.adapter_dropout else 1  # the float32 input, the mask's factors, the dropped input
        return float(copies * _FLOAT32 * tokens * weight.cols)

    def _attention_bytes(self, spec: ModelSpec, compute: int, batch: int, length: int) -> float:
        """What a block keeps of its attention beside queries, keys and values in the compute dtype."""
        tokens, pairs = batch * length, batch * length**2
        if self.attention == "sdpa":  # its output, and the log-sum-exp of each head
            return float(tokens * (spec.hidden_size * compute + spec.num_heads * _FLOAT32))
        if self.attention == "eager":
            return pairs * spec.activations[compute].pair
        widened = 3 * spec.hidden_size * (_FLOAT32 - compute)
        return pairs * spec.activations[_FLOAT32].pair + tokens * widened

    def _gradients(self, spec: ModelSpec, live: int, bits: int, batch: int, length: int) -> float:
        """Gradients on their way through one block, which live beside what is kept."""
        if not live:
            return 0.0
        compute = self.compute_bytes(bits)
        wide = 2 * batch * length * max(spec.feed_forward, spec.hidden_size) * compute
        scores = 2 * batch * spec.num_heads * length**2 * compute if self.attention != "sdpa" else 0
        return float(wide + scores)


def calibrated(
    model: MemoryModel,
    spec: ModelSpec,
    measured_bytes: float,
    *,
    ranks: Mapping[str, int],
    bits: int,
    batch: int,
    length: int,
) -> MemoryModel:
    """Fit the activations to one measured training step; weights and optimiser state are exact already.

    Args:
        model: its :attr:`MemoryModel.activation_scale` is replaced.
        spec: the model that was trained.
        measured_bytes: the step's peak, counted as the budget is: what the process held before does not belong to it.
        ranks: rank by weight name in that step.
        bits: width of the base in that step.
        batch: its examples.
        length: its tokens per example.

    Raises:
        ValueError: the peak is not above what weights and optimiser state alone take.
    """
    estimate = replace(model, activation_scale=1.0).predict(spec, ranks, bits, batch, length)
    scaled = estimate.activations + estimate.transient
    rest = estimate.total - scaled
    if not (math.isfinite(measured_bytes) and measured_bytes > rest and scaled > 0):
        raise ValueError(
            f"a measured peak of {measured_bytes:.0f} bytes cannot be right: weights, optimiser state and workspace "
            f"alone take {rest:.0f}"
        )
    return replace(model, activation_scale=(measured_bytes - rest) / scaled)
