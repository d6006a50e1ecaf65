"""Weighted sum of products that arrive one by one, in memory that does not grow with their number."""

from __future__ import annotations

import torch

from fedllm.lora.factors import WORKING_DTYPE, Factors, stack
from fedllm.lora.svd import ProductSVD, compress, dense_svd, product_svd


class ProductSum:
    """``Σ w · left @ right`` over a stream.

    Without ``max_rank`` the sum is exact: parts are stacked, and once the stack would be larger than the d×k matrix,
    the matrix is kept instead. With ``max_rank`` the stack is compressed to that rank whenever it has grown to twice as
    much; the sum stays exact while the true rank is within ``max_rank``, and :attr:`error_bound` certifies the cuts.

    Args:
        max_rank: largest rank that is kept; None: exact.
        dtype: float32 or float64.

    Raises:
        ValueError: ``max_rank`` is below 1.
    """

    def __init__(self, max_rank: int | None = None, dtype: torch.dtype = WORKING_DTYPE) -> None:
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank is at least 1, found {max_rank}")
        self._max_rank = max_rank
        self._dtype = dtype
        self._stacked: Factors | None = None
        self._dense: torch.Tensor | None = None
        self._cut = 0.0

    @property
    def error_bound(self) -> float:
        """Frobenius norm of the sum of all cuts so far, at most; 0 for an exact sum."""
        return self._cut

    def add(self, factors: Factors, weight: float = 1.0) -> None:
        """Add a part; it may be freed afterwards.

        Raises:
            ValueError: its shape differs from that of the parts before it.
        """
        part = factors.to(self._dtype)
        if self._dense is not None:
            if factors.shape != self._dense.shape:
                raise ValueError(
                    f"a product of shape {factors.shape} cannot be added to one of {tuple(self._dense.shape)}"
                )
            self._dense.addmm_(part.left, part.right, alpha=weight)
            return
        before = [] if self._stacked is None else [(1.0, self._stacked)]
        self._stacked = stack([*before, (weight, part)])
        self._bound(self._stacked)

    def svd(self) -> ProductSVD:
        """The sum decomposed, at most of rank ``max_rank``; ``discarded`` bounds its error.

        Raises:
            ValueError: nothing was added.
        """
        if self._dense is not None:
            return dense_svd(self._dense)
        if self._stacked is None:
            raise ValueError("the sum of no products has no shape")
        svd = product_svd(self._stacked)
        kept = svd if self._max_rank is None else svd.truncate(self._max_rank)
        return ProductSVD(kept.left, kept.values, kept.right, self._cut + kept.discarded)

    def _bound(self, stacked: Factors) -> None:
        """Keep the stack within its bound: as a matrix where the sum is exact, else compressed."""
        d, k = stacked.shape
        if self._max_rank is None:
            if stacked.rank * (d + k) > d * k:
                self._dense, self._stacked = stacked.product(), None
        elif stacked.rank >= 2 * self._max_rank:
            svd = compress(stacked, self._max_rank)
            self._cut += svd.discarded
            self._stacked = svd.factors()
