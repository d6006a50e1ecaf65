"""Memory of one local step in every gradient mode, and which modes fit a node.

Back-propagation follows :class:`fedllm.lora.memory.MemoryModel`. Forward modes keep nothing for a backward pass: what
lives is the widest moment of one layer. For zeroth order that is the layer itself, for forward mode the layer and, for
every tangent that shares its pass, its derivative with the temporaries of the activation function's. The counts below
are fitted to those of ``fedllm.live_memory`` on BERT and Llama blocks. Forward mode computes a bounded number of
attention scores and logits at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fedllm.lora.memory import MemoryEstimate, MemoryModel
from fedllm.lora.spec import ModelSpec

Mode = Literal["backprop", "backprop-checkpointed", "backprop-top-k", "forward-ad", "zeroth-order"]
LADDER: tuple[Mode, ...] = get_args(Mode)
"""From the best gradient and the most memory downwards; the names are those of the client updates."""
Rung = Literal["backprop", "backprop-checkpointed", "forward-ad", "zeroth-order"]
"""The modes that train all that a node is dealt."""

FORWARD_AD_TOKENS = 1024
"""Tokens of a batch that share a pass of forward mode, unless ``forward-ad.micro-batch-size`` says otherwise."""
_AT_ONCE = 2**21  # attention scores, and logits, that forward mode has at a time
_FLOAT32 = 4


@dataclass(frozen=True)
class StepShape:
    """What one local step computes on.

    Attributes:
        ranks: rank by weight name; absent: not adapted.
        bits: width of the base.
        batch: examples of a step.
        length: tokens of the longest example.
        micro_batch: examples that share a pass, in modes that can cut a batch; 0: the mode's own choice.
        tangents: tangents of forward mode that share a pass.
        blocks: top blocks that ``backprop-top-k`` trains.
    """

    ranks: Mapping[str, int]
    bits: int
    batch: int
    length: int
    micro_batch: int = 0
    tangents: int = 1
    blocks: int = 1


def rows_at_once(length: int) -> int:
    """Examples of a length that share a pass of forward mode unless told otherwise: 1,024 tokens' worth, at least one.

    Without a graph pieces cost no more operations than the whole, and so many tokens keep any device busy.
    """
    return max(1, FORWARD_AD_TOKENS // length)


def mode_memory(mode: Mode, spec: ModelSpec, shape: StepShape, memory: MemoryModel) -> MemoryEstimate:
    """Predicted peak of a step.

    Args:
        mode: name of the client update.
        spec: the model.
        shape: what the step computes on.
        memory: constants of back-propagation; forward modes take its attention and compute dtype.

    Raises:
        ValueError: an unknown width of the base.
    """
    rows = _rows(mode, shape)
    if mode == "backprop-checkpointed":
        memory = replace(memory, checkpointing=True)
    if mode == "backprop-top-k":
        first = spec.num_blocks - min(shape.blocks, spec.num_blocks)
        trained = {w.name: shape.ranks.get(w.name, 0) for w in spec.weights if w.block >= first}
        estimate = memory.predict(spec, trained, shape.bits, rows, shape.length)
        rest = _adapter_parameters(spec, shape.ranks) - _adapter_parameters(spec, trained)
        return replace(estimate, adapter=estimate.adapter + _FLOAT32 * rest)
    if mode in ("backprop", "backprop-checkpointed"):
        return memory.predict(spec, shape.ranks, shape.bits, rows, shape.length)
    return (_forward_ad if mode == "forward-ad" else _zeroth_order)(spec, shape, rows, memory)


def fitting(
    modes: Sequence[Mode], spec: ModelSpec, shape: StepShape, memory: MemoryModel, available: float
) -> list[Mode]:
    """The modes whose predicted peak is at most ``available`` bytes, in the order given."""
    return [mode for mode in modes if mode_memory(mode, spec, shape, memory).total <= available]


def _rows(mode: Mode, shape: StepShape) -> int:
    """Examples in memory at once."""
    own = rows_at_once(shape.length) if mode == "forward-ad" else shape.batch
    return min(shape.batch, shape.micro_batch or own)


def _zeroth_order(spec: ModelSpec, shape: StepShape, rows: int, memory: MemoryModel) -> MemoryEstimate:
    tokens = rows * shape.length
    hidden, wide, scores = _sizes(spec, tokens, shape, memory)
    widest = max(
        3 * hidden + 3 * wide,  # residual, input and output of the layer; its product, LoRA's, their sum
        5 * hidden + (2 * scores * rows if memory.attention == "eager" else 0),
        2 * _FLOAT32 * tokens * spec.vocabulary,  # logits and log-probabilities
    )
    return _estimate(spec, shape, memory, state=_FLOAT32, widest=widest)


def _forward_ad(spec: ModelSpec, shape: StepShape, rows: int, memory: MemoryModel) -> MemoryEstimate:
    tokens, tangents = rows * shape.length, shape.tangents
    hidden, wide, scores = _sizes(spec, tokens, shape, memory)
    scores = min(scores, max(_AT_ONCE * _FLOAT32, scores / spec.num_heads))
    logits = min(tokens * spec.vocabulary, _AT_ONCE)
    widest = max(
        hidden + tangents * (hidden + 5 * wide),
        4 * hidden + scores + tangents * (4 * hidden + 5.5 * scores),
        _FLOAT32 * logits * (3 + 2.25 * tangents),
    )
    # Value, copy at the start and gradient; tangents.
    return _estimate(spec, shape, memory, state=_FLOAT32 * (2 + tangents), widest=widest)


def _sizes(spec: ModelSpec, tokens: int, shape: StepShape, memory: MemoryModel) -> tuple[float, float, float]:
    """Bytes of hidden states, of the wide layer's output, and of one example's attention scores."""
    compute = memory.compute_bytes(shape.bits)
    scores = spec.num_heads * shape.length**2 * compute
    return tokens * spec.hidden_size * compute, tokens * spec.feed_forward * compute, scores


def _estimate(
    spec: ModelSpec, shape: StepShape, memory: MemoryModel, *, state: float, widest: float
) -> MemoryEstimate:
    compute = memory.compute_bytes(shape.bits)
    return MemoryEstimate(
        base=memory.base_bytes(spec, shape.bits),
        adapter=state * _adapter_parameters(spec, shape.ranks),
        heads=spec.head_parameters * (_FLOAT32 * 3 + compute),
        activations=float(widest),
        transient=float(spec.largest_weight * compute) if shape.bits in (8, 4) else 0.0,
        workspace=memory.workspace_bytes,
    )


def _adapter_parameters(spec: ModelSpec, ranks: Mapping[str, int]) -> int:
    return sum(weight.adapter_parameters(ranks.get(weight.name, 0)) for weight in spec.weights)
