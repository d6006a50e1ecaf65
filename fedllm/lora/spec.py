"""What the planner must know of a base model: sizes, counts and candidate weights, without the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSpec:
    """A linear layer that may get an adapter ΔW = B A of shape ``[rows, cols]``.

    Attributes:
        name: full module name in the base model, for example ``model.layers.0.self_attn.q_proj``.
        rows: output width d.
        cols: input width k.
        block: index of its transformer block.
    """

    name: str
    rows: int
    cols: int
    block: int

    def adapter_parameters(self, rank: int) -> int:
        """Entries of A ``[rank, cols]`` and B ``[rows, rank]``."""
        return rank * (self.rows + self.cols)


@dataclass(frozen=True)
class BlockSpec:
    """Parameters of one transformer block.

    Attributes:
        parameters: all of them.
        quantizable: entries of the linear weights that bitsandbytes quantises; the rest keeps its dtype.
        quantizable_rows: rows (output features) of those weights; 8-bit weights have one scale a row.
    """

    parameters: int
    quantizable: int
    quantizable_rows: int


@dataclass(frozen=True)
class ActivationSpec:
    """Bytes that one block keeps for the backward pass, the base weights being frozen.

    Attributes:
        token: bytes per token, without attention scores.
        pair: bytes per pair of tokens of one example when attention keeps its scores (``eager``).
    """

    token: float
    pair: float


@dataclass(frozen=True)
class ModelSpec:
    """A base model, or the part of one that a node holds.

    A part is a spec with fewer blocks: the planner plans whatever a spec describes.

    Attributes:
        hidden_size: width h of the residual stream.
        num_heads: attention heads.
        feed_forward: inner width of the feed-forward layer.
        vocabulary: entries of the output layer; 0 when the model has none, as for classification.
        blocks: parameters of each block, in order.
        weights: candidates for adapters.
        embedding_parameters: tables that are looked up and not multiplied.
        output_parameters: frozen parameters after the blocks that are not tied to the embedding.
        head_parameters: parameters of the heads that are trained in full, in float32.
        largest_weight: entries of the largest quantisable weight.
        activations: by bytes of the compute dtype (2 and 4), what a block keeps.
    """

    hidden_size: int
    num_heads: int
    feed_forward: int
    vocabulary: int
    blocks: tuple[BlockSpec, ...]
    weights: tuple[WeightSpec, ...]
    embedding_parameters: int
    output_parameters: int
    head_parameters: int
    largest_weight: int
    activations: Mapping[int, ActivationSpec]

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return len(self.blocks)

    @property
    def parameters(self) -> int:
        """Frozen parameters of the base, without heads."""
        inside = sum(block.parameters for block in self.blocks)
        return inside + self.embedding_parameters + self.output_parameters

    def lowest_block(self, ranks: Mapping[str, int]) -> int:
        """Block of the lowest adapted weight; the number of blocks when there is none.

        Args:
            ranks: rank by weight name; 0 or absent: not adapted.
        """
        adapted = [weight.block for weight in self.weights if ranks.get(weight.name, 0) > 0]
        return min(adapted, default=self.num_blocks)
