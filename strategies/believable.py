"""What of a reply can be judged, and how much of what it claims is believed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fedllm.strategies.flat_updates import Tensors
from fedllm.strategies.vert.sketch import Sketch

from fedllm.errors import ReplyError

LARGEST_NORM = 1e15
"""Of an update that is judged: sums of the squares of a hundred million such norms are within float32. Training never
comes near; an update beyond makes distances infinite and cosines NaN, those of the others, too."""

LARGEST_CLAIM = 4
"""A kept reply weighs at most so many times the median of what the kept replies claim to weigh: a number of examples is
the client's word, and one that says a billion would own the round. With 20 or 100 clients whose labels are dealt out by
Dirichlet shares of α = 0.3 this touches at most two claims in a thousand, of α = 0.1 three to five in a hundred."""


def middle(claims: Sequence[int]) -> int:
    """The median of what replies claim; the lower of two, so that one of two replies cannot lift it."""
    return sorted(claims)[(len(claims) - 1) // 2]


def check_tensors(sent: Tensors, new: Tensors) -> None:
    """Check that a reply can be compared with what its client was sent.

    Raises:
        ReplyError: no tensor, one that was not sent, one of another shape, or of truth values.
    """
    if not new:
        raise ReplyError(f"the reply has no tensors, expected some of the {len(sent)} that were sent")
    for name, value in new.items():
        if name not in sent:
            raise ReplyError(f"{name!r} was not sent, expected some of the {len(sent)} tensors that were")
        if value.shape != sent[name].shape:
            raise ReplyError(f"{name!r} has shape {tuple(value.shape)}, expected {tuple(sent[name].shape)}")
        if torch.bool in (value.dtype, sent[name].dtype):
            raise ReplyError(f"{name!r} is of truth values, expected numbers: they have no difference")


def is_bounded(sketch: Sketch) -> bool:
    """Whether an update can be compared with others: its norm is a number, and not beyond :data:`LARGEST_NORM`."""
    # NaN fails both comparisons.
    return sketch.norm <= LARGEST_NORM and float(sketch.vector.double().norm()) <= LARGEST_NORM
