"""Attention that can be differentiated in forward mode and never holds all scores at once.

PyTorch's fused kernels have no forward-mode derivative, and the plain formula has scores [batch, heads, length, length]
with as many tangents. Without a graph nothing must be kept, so the plain formula is applied to a few heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from fedllm.errors import ModelError

NAME = "fedllm_forward_ad"
_SCORES = (
    2**21
)  # scores that exist at a time; 8 MiB each of scores, probabilities and their tangents in float32
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def chunked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v, a few (row, key head) pairs at a time; transformers' attention interface.

    Args:
        module: tells whether dropout applies.
        query: ``[batch, heads, length, width]``.
        key: ``[batch, key heads, key length, width]``; each serves heads / key heads queries in turn.
        value: like ``key``.
        attention_mask: added to the scores, ``[batch or 1, 1 or heads, length, key length]``.
        scaling: of the scores; None: 1/√width.
        dropout: of the probabilities, in training mode.
        **kwargs: what other kernels take.

    Returns:
        ``[batch, length, heads, width]``, and no probabilities.

    Raises:
        ModelError: the model asks for a variant of attention that this is not.
    """
    if wanted := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise ModelError(
            f"{type(module).__name__}: forward mode has no attention with {', '.join(wanted)}; "
            "choose another gradient mode for this model"
        )
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    pairs = max(1, _SCORES // (groups * length * key.shape[2]))
    rows, columns = max(1, pairs // key.shape[1]), min(pairs, key.shape[1])
    outputs = []
    for row in range(0, batch, rows):
        parts = []
        for column in range(0, key.shape[1], columns):
            some = slice(row, row + rows), slice(column, column + columns)
            parts.append(
                _attend(
                    torch.unflatten(query, 1, (-1, groups))[some],
                    key[some].unsqueeze(2),
                    value[some].unsqueeze(2),
                    _mask_of(attention_mask, some, groups),
                    scale,
                    dropout if module.training else 0.0,
                ).flatten(1, 2)
            )
        outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.transpose(1, 2), None


def _mask_of(mask: Tensor | None, some: tuple[slice, slice], groups: int) -> Tensor | None:
    """The mask of some rows and key heads, to be added to ``[rows, key heads, groups, length, key length]``."""
    if mask is None:
        return None
    own = mask[some[0]] if mask.shape[0] > 1 else mask
    return own.unsqueeze(2) if own.shape[1] == 1 else torch.unflatten(own, 1, (-1, groups))[:, some[1]]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    shape = (*query.shape[:-1], key.shape[-2])
    kept = F.dropout(value.new_ones(shape), dropout) if dropout else None
    output: Tensor = Attention.apply(query, key, value, mask, kept, scale)[0]  # type: ignore[no-untyped-call]
    return output


class Attention(torch.autograd.Function):
    """(softmax(q kᵀ s + mask) ∘ kept) v and its probabilities, which serve the derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """``query`` is ``[…, groups, length, width]``; ``key`` and ``value`` are ``[…, 1, key length, width]``."""
        scores = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=_wide(value.dtype)).to(value.dtype)
        return (weights if kept is None else weights * kept) @ value, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and the probabilities."""
        query, key, value, _, kept, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_forward(query, key, value, kept, output[1])
        ctx.save_for_backward(query, key, value, kept, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(
        ctx: Any, query: Tensor | None, key: Tensor | None, value: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        """Tangent of the output from those that are there."""
        at_query, at_key, at_value, kept, weights = ctx.saved_tensors
        total = scores = None
        if value is not None:
            total = (weights if kept is None else weights * kept) @ value
        if query is not None:
            scores = query @ at_key.transpose(-1, -2)
        if key is not None:
            by_key = at_query @ key.transpose(-1, -2)
            scores = by_key if scores is None else scores + by_key
        if scores is not None:
            tangent = _through_softmax(scores, weights, ctx.scale)
            moved = (tangent if kept is None else tangent * kept) @ at_value
            total = moved if total is None else total + moved
        return total, None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        if gradient is None:
            return (None,) * 6
        query, key, value, kept, weights = ctx.saved_tensors
        of_weights = gradient @ value.transpose(-1, -2)
        of_value = (weights if kept is None else weights * kept).transpose(-1, -2) @ gradient
        scores = _through_softmax(of_weights if kept is None else of_weights * kept, weights, ctx.scale)
        of_key = scores.transpose(-1, -2) @ query
        return scores @ key, _ungroup(of_key), _ungroup(of_value), None, None, None


def _through_softmax(vector: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The symmetric derivative of softmax, times the scale of the scores, applied to a vector."""
    product = vector.to(_wide(vector.dtype)) * weights
    return ((product - weights * product.sum(-1, keepdim=True)) * scale).to(weights.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _ungroup(gradient: Tensor) -> Tensor:
    """The sum over the queries that share a key head."""
    return gradient.sum(-3, keepdim=True)


@contextmanager
def differentiable_attention(model: Any) -> Iterator[None]:
    """Let a transformers model attend by :func:`chunked_attention` inside the block.

    Models that do not follow transformers' attention interface attend by PyTorch's ``math`` kernel, if they use its
    scaled dot product at all.

    Args:
        model: a transformers model, not its adapter's wrapper.

    Raises:
        ModelError: the model's attention is fixed to a kernel without a forward-mode derivative.
    """
    AttentionInterface.register(NAME, chunked_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    follows = model._can_set_attn_implementation()
    if not follows and before not in ("eager", "sdpa"):
        raise ModelError(
            f"{type(model).__name__} ({model.config._name_or_path}) attends by {before!r}, which has no forward-mode "
            'derivative, and cannot be switched; set model.attention = "eager"'
        )
    if follows:
        model.set_attn_implementation(NAME)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if follows:
            model.set_attn_implementation(before)
