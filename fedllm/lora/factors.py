"""Low-rank products as pairs of factors: fold a LoRA adapter into one, and stack weighted ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

WORKING_DTYPE = torch.float64
"""What the algebra computes in unless told otherwise, whatever the adapters' dtype."""


@dataclass(frozen=True)
class Factors:
    """The d×k matrix ``left @ right``, never formed.

    Attributes:
        left: [d, r].
        right: [r, k].

    Raises:
        ValueError: no two matrices, or their inner sides differ.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"factors of shapes {tuple(self.left.shape)} and {tuple(self.right.shape)}, expected [d, r] and [r, k]"
            )

    @property
    def rank(self) -> int:
        """The inner side r: an upper bound of the product's rank."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k) of the product."""
        return self.left.shape[0], self.right.shape[1]

    def product(self) -> torch.Tensor:
        """The dense product [d, k]."""
        return self.left @ self.right

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype."""
        return Factors(self.left.to(dtype), self.right.to(dtype))


def fold(
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float = 1.0,
    dtype: torch.dtype = WORKING_DTYPE,
) -> Factors:
    """The update ``scale · lora_B @ lora_A`` of a LoRA layer; the one place where α/r enters.

    Args:
        lora_A: [r, k], any floating dtype.
        lora_B: [d, r], any floating dtype.
        scale: α/r of this very client.
        dtype: float32 or float64; products of half-precision adapters are never taken in half precision.

    Raises:
        ValueError: the ranks of the two differ, or ``dtype`` is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the algebra works in float32 or float64, found {dtype}")
    return Factors(lora_B.detach().to(dtype) * scale, lora_A.detach().to(dtype))


def stack(parts: Iterable[tuple[float, Factors]]) -> Factors:
    """The weighted sum ``Σ w · left @ right`` as one pair of factors of rank Σ r; exact (FLoRA, arXiv 2409.05976).

    Args:
        parts: weight (of any sign) and factors; all products have one shape.

    Raises:
        ValueError: no parts, or products of different shapes.
    """
    weighted = list(parts)
    if not weighted:
        raise ValueError("nothing to stack")
    shapes = {factors.shape for _, factors in weighted}
    if len(shapes) > 1:
        raise ValueError(f"products of different shapes cannot be added: {sorted(shapes)}")
    return Factors(
        torch.cat([weight * factors.left for weight, factors in weighted], dim=1),
        torch.cat([factors.right for _, factors in weighted], dim=0),
    )
