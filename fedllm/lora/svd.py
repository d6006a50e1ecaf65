"""Singular value decomposition of a low-rank product without the d×k matrix, and what is cut from it.

``left = Q_l R_l`` and ``rightᵀ = Q_r R_r`` give ``left @ right = Q_l (R_l R_rᵀ) Q_rᵀ``, whose core is only r×r:
O(r²(d+k)) instead of O(d k min(d, k)). One decomposition serves all clients: their adapters are prefixes of it, and
what a prefix of length r leaves out has the Frobenius norm √(Σ_{j>r} σ_j²) exactly (Eckart & Young, 1936).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedllm.lora.factors import Factors


@dataclass(frozen=True)
class ProductSVD:
    """``left @ diag(values) @ right``.

    Attributes:
        left: [d, r], orthonormal columns; the largest entry of each is positive.
        values: [r], positive and falling.
        right: [r, k], orthonormal rows.
        discarded: Frobenius norm of what was cut off on the way here; an upper bound where several cuts add up.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    discarded: float = 0.0

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return self.values.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k) of the product."""
        return self.left.shape[0], self.right.shape[1]

    def tail(self, rank: int) -> float:
        """Frobenius norm of what the leading ``rank`` triplets leave out of this decomposition."""
        return float(torch.linalg.vector_norm(self.values[rank:]))

    def energy_rank(self, energy: float) -> int:
        """The smallest rank that keeps a share of the squared Frobenius norm.

        Raises:
            ValueError: ``energy`` is not in (0, 1].
        """
        if not 0 < energy <= 1:
            raise ValueError(f"the energy to keep must be above 0 and at most 1, found {energy}")
        squares = self.values.double().square()
        # Summed from the small end: a share of 1 is then reached at the last value only.
        left_out = squares.flip(0).cumsum(0).flip(0)
        return int((left_out > (1 - energy) * squares.sum()).sum())

    def truncate(self, rank: int) -> ProductSVD:
        """The leading ``rank`` triplets; :attr:`discarded` grows by the rest."""
        return ProductSVD(
            self.left[:, :rank],
            self.values[:rank],
            self.right[:rank],
            math.hypot(self.discarded, self.tail(rank)),
        )

    def scaled(self, factor: float) -> ProductSVD:
        """The decomposition of ``factor`` times the product, for a positive factor."""
        return ProductSVD(self.left, self.values * factor, self.right, self.discarded * factor)

    def factors(self) -> Factors:
        """The product as factors, the singular values on the left."""
        return Factors(self.left * self.values, self.right)


def product_svd(factors: Factors) -> ProductSVD:
    """Decompose a product in the dtype of its factors; singular values that are zero to precision are left out.

    A product whose inner side exceeds min(d, k) is formed: that is smaller than its factors then.
    """
    left, right = factors.left, factors.right
    if factors.rank > min(factors.shape):
        return dense_svd(left @ right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _tidy(q_left @ u, values, vh @ q_right.T)


def dense_svd(matrix: torch.Tensor) -> ProductSVD:
    """Decompose a d×k matrix in its own dtype; singular values that are zero to precision are left out."""
    return _tidy(*torch.linalg.svd(matrix, full_matrices=False))


def compress(factors: Factors, rank: int | None = None, energy: float | None = None) -> ProductSVD:
    """The nearest product of a lower rank.

    Args:
        factors: the product.
        rank: keep at most so many triplets.
        energy: keep as many triplets as hold this share of the squared Frobenius norm (FLoRIST, arXiv 2506.09199).

    Returns:
        The kept triplets; ``discarded`` is the exact Frobenius norm of the error.

    Raises:
        ValueError: a negative rank, or an energy outside (0, 1].
    """
    if rank is not None and rank < 0:
        raise ValueError(f"a rank is at least 0, found {rank}")
    svd = product_svd(factors)
    kept = svd.rank if energy is None else svd.energy_rank(energy)
    return svd.truncate(kept if rank is None else min(kept, rank))


def split(
    svd: ProductSVD, rank: int, scale: float = 1.0, fill: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading triplets as a balanced LoRA pair: ``scale · lora_B @ lora_A`` is the truncated product.

    Both factors get √σ: with all of σ on one side, Adam's equal steps would move the two sides unequally.

    Args:
        svd: the product.
        rank: rank of the pair; adapters of several clients at one scale are prefixes of one another.
        scale: α/r of the client that gets the pair; positive.
        fill: [≥ rank, k], rows for ``lora_A`` where the product has fewer than ``rank`` directions. The matching
            columns of ``lora_B`` are zero, so the product does not change; with zeros on both sides (the default)
            these directions would have no gradient and could never be learned.

    Returns:
        ``lora_A`` [rank, k] and ``lora_B`` [d, rank] in the dtype of the decomposition.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"the scale alpha/r must be positive, found {scale}")
    (d, k), kept = svd.shape, min(rank, svd.rank)
    root = (svd.values[:kept] / scale).sqrt()
    lora_a, lora_b = svd.right.new_zeros(rank, k), svd.left.new_zeros(d, rank)
    lora_a[:kept] = root[:, None] * svd.right[:kept]
    lora_b[:, :kept] = svd.left[:, :kept] * root
    if fill is not None:
        lora_a[kept:] = fill[kept:rank].to(lora_a)
    return lora_a, lora_b


def _tidy(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> ProductSVD:
    """Drop what is zero to precision and fix the signs, which LAPACK leaves to chance."""
    precision = max(left.shape[0], right.shape[1]) * torch.finfo(values.dtype).eps
    kept = int((values > precision * values[:1]).sum())
    left, values, right = left[:, :kept], values[:kept], right[:kept]
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True)) if kept else left.new_ones(1, 0)
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return ProductSVD(left * signs, values, right * signs.T)
