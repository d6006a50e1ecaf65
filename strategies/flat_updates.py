"""A client's update as one flat vector, and the way back into its reply.

Tensors follow each other as the client was sent them, whatever the order of its reply: rules over coordinates compare a
number with the same one of the others. Updates, which come without what was sent, keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedllm.records import encode_like

Tensors = Mapping[str, Tensor]


def flat_update(start: Tensors, new: Tensors) -> Tensor:
    """``new`` − ``start`` as one float32 vector, tensor after tensor; factors of adapters are plain arrays here.

    Args:
        start: what the client was sent; empty if ``new`` already is an update.
        new: the tensors of its reply.
    """
    return torch.cat(
        [(new[name] - start[name] if start else new[name]).flatten().float() for name in _ordered(start, new)]
    )


def set_update(record: ArrayRecord, start: Tensors, update: Tensor) -> None:
    """Put ``start`` + ``update`` into a reply's record.

    Args:
        record: of the reply; its shapes say how the vector is cut.
        start: what the client was sent; empty if the reply carries an update.
        update: as :func:`flat_update` returns it.
    """
    shapes = {name: record[name].shape for name in _ordered(start, record)}
    pieces = torch.split(update, [math.prod(shape) for shape in shapes.values()])
    overwrite(
        record,
        {
            name: piece.view(shape) + start.get(name, 0)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        },
    )


def _ordered(start: Tensors, names: Iterable[str]) -> list[str]:
    """The names of a reply as they were sent; as they come if ``start`` is empty."""
    given = dict.fromkeys(names)
    return [name for name in start if name in given] if start else list(given)


def overwrite(record: ArrayRecord, tensors: Tensors) -> None:
    """Replace the arrays of a reply; what was encoded lossily becomes float32, which every reader takes as well."""
    dtypes = {name: array.dtype for name, array in record.items() if array.stype == "numpy.ndarray"}
    for name, array in encode_like(tensors, dtypes).items():
        record[name] = array
