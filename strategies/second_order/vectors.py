"""Long vectors in blocks: sums in float64 without a float64 copy of the vector, and no overflow at either end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Elements that are worked on at once: a few float64 blocks fit a core's cache."""


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover ``range(size)``."""
    for first in range(0, size, BLOCK):
        yield slice(first, min(first + BLOCK, size))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state that is kept for vectors of ``dtype``: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(vector: Tensor, divisor: float = 1.0) -> Tensor:
    """A float64 copy, divided if wanted, which may be written to."""
    copied = vector.to(torch.float64, copy=True)
    return copied if divisor == 1 else copied.div_(divisor)


def largest(vector: Tensor) -> float:
    """The largest modulus in a vector; 0 for an empty one."""
    return max((vector[part].abs().max().item() for part in blocks(len(vector))), default=0.0)


def scale_of(vector: Tensor) -> float:
    """A divisor that keeps squares of the entries in float64's range: 1 unless the entries are float64."""
    if vector.dtype != torch.float64:
        return 1.0  # squares of what float32 can hold, denormals too, lie well inside float64
    peak = largest(vector)
    return peak if peak > 0 else 1.0


def dots(vectors: Sequence[Tensor], other: Tensor) -> Tensor:
    """Inner products ``[k]`` (float64, CPU) of k vectors with another one, summed in float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64)
    for part in blocks(len(other)) if vectors else ():
        one = other[part].double()
        total += torch.stack([torch.dot(vector[part].double(), one) for vector in vectors]).cpu()
    return total


def norm(vector: Tensor) -> float:
    """Euclidean norm, summed in float64 and safe from overflow and underflow."""
    scale = scale_of(vector)
    total = 0.0
    for part in blocks(len(vector)):
        scaled = wide(vector[part], scale)
        total += torch.dot(scaled, scaled).item()
    return float(scale * math.sqrt(total))


def combine(out: Tensor, coefficients: Sequence[float], vectors: Sequence[Tensor]) -> Tensor:
    """Add a linear combination to ``out`` in place, block by block in float64; returns ``out``."""
    for part in blocks(len(out)):
        total = wide(out[part])
        for coefficient, vector in zip(coefficients, vectors, strict=True):
            total.add_(vector[part], alpha=coefficient)
        out[part] = total
    return out
