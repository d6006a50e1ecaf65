"""Rank-k FAGH (ours): the last k Hessian–vector products as a limited-memory model of the curvature.

FAGH's v vᵀ/v₀ is the Nyström approximation of H from one product, v = H e₀, and deflates one direction only. From k
products Y = HU it is H_a = Y (UᵀY)⁺ Yᵀ (Drineas & Mahoney, 2005), and k = 1 with U = e₀ is the paper's. The pairs come
from different rounds, so UᵀY is symmetrised, its small eigenvalues are left out, and the modulus of the eigenvalues of
H_a is taken (saddle-free): with H_a = Q Λ Qᵀ and a metric D (the identity unless given),

    p = (|H_a| + ρD)⁻¹ m = D⁻¹ [ m − Y A diag(|λ|/(|λ| + ρ)) Aᵀ Yᵀ D⁻¹ m ] / ρ,

where Y A spans the eigenvectors of H_a in the metric. One pass over the k pairs gives two k×k matrices, everything else
is small: O(d k) memory; a direction takes one pass of O(d k²) multiplications and one of O(d k). Taking in a pair and
choosing what to ask for are passes of O(d k) too, for which the inner products of the directions are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from fedllm.strategies.second_order.moments import Moment
from fedllm.strategies.second_order.vectors import (
    BLOCK,
    blocks,
    combine,
    dots,
    norm,
    scale_of,
    wide,
    working_dtype,
)
from torch import Tensor

_CORE_CUTOFF = 1e-3
"""Eigenvalues of UᵀY below this share of the largest are noise of old pairs, which (UᵀY)⁺ would blow up."""
_GRAM_CUTOFF = 1e-10
_LARGEST_CURVATURE = {torch.float32: 1e6, torch.float64: 1e12}
"""|λ|/ρ counts as at most this by dtype, so that p·m > 0 beyond rounding; see :mod:`.rank_one`."""
_SAME_SPAN = 1e-3


class Metric(Protocol):
    """A positive diagonal matrix D."""

    def block(self, part: slice) -> Tensor:
        """D of a block, float64 and positive."""
        ...


@dataclass
class _Pair:
    direction: Tensor
    product: Moment
    age: int = 0

    @property
    def row(self) -> Tensor:
        assert self.product.value is not None
        return self.product.value


@dataclass(frozen=True)
class Direction:
    """A Newton direction and what is known of it.

    Attributes:
        vector: p ``[d]``.
        eigenvalues: λ of the curvature model in the metric, ascending, signed ``[r]``.
        curvature: pᵀ |H_a| p.
    """

    vector: Tensor
    eigenvalues: Tensor
    curvature: float


class CurvatureMemory:
    """Pairs (u, Hu), the newest last.

    Args:
        capacity: k ≥ 1; the oldest pair makes room for a new one.
        beta: decay of the bias-corrected mean of products whose direction is asked for again, 0 ≤ β < 1.
        max_age: rounds after which a pair is forgotten.
        max_asymmetry: a pair (u', y') is forgotten when a new one (u, y) contradicts it: of one Hessian u·y' = u'·y,
            and they may differ by this share of √|u·y u'·y'| at most.

    Raises:
        ValueError: a capacity below 1, or β outside [0, 1).
    """

    def __init__(
        self, capacity: int, *, beta: float = 0.9, max_age: int = 50, max_asymmetry: float = 2.0
    ) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity is {capacity}, expected at least 1")
        self.capacity = capacity
        self.beta = beta
        self.max_age = max_age
        self.max_asymmetry = max_asymmetry
        self._pairs: list[_Pair] = []
        self._overlaps = torch.zeros(0, 0, dtype=torch.float64)
        Moment(beta)  # checks β now rather than with the first pair

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, direction: Tensor, product: Tensor) -> None:
        """Take in u and Hu ``[d]``; both are copied. A direction of zero is ignored."""
        if norm(direction) == 0:
            return
        for pair in self._pairs:
            if torch.equal(pair.direction, direction.to(pair.direction)):
                pair.product.update(product)
                pair.age = 0
                return
        self._forget_contradicted(direction, product)
        # Whoever makes room goes first: two vectors less at the peak.
        self._keep([index > len(self) - self.capacity for index in range(len(self))])
        pair = _Pair(direction.to(working_dtype(direction.dtype), copy=True), Moment(self.beta))
        pair.product.update(product)
        self._append(pair)

    def grow_old(self) -> None:
        """Let a round pass: pairs beyond their age are forgotten."""
        for pair in self._pairs:
            pair.age += 1
        self._keep([pair.age <= self.max_age for pair in self._pairs])

    def _append(self, pair: _Pair) -> None:
        self._pairs.append(pair)
        new = dots([each.direction for each in self._pairs], pair.direction)
        self._overlaps = torch.cat([torch.cat([self._overlaps, new[None, :-1]]), new[:, None]], 1)

    def _keep(self, kept: Sequence[bool]) -> None:
        chosen = torch.tensor(kept, dtype=torch.bool)
        self._pairs = [pair for pair, keep in zip(self._pairs, kept, strict=True) if keep]
        self._overlaps = self._overlaps[chosen][:, chosen]

    def newest_product(self, metric: Metric | None = None) -> Tensor | None:
        """D⁻¹ H u of the newest pair ``[d]``, by which power iteration goes on; None without a pair."""
        if not self._pairs:
            return None
        row = self._pairs[-1].row
        out = row.clone()
        if metric is not None:
            for part in blocks(len(out)):
                out[part] = row[part].double().div_(metric.block(part))
        return out

    def _forget_contradicted(self, direction: Tensor, product: Tensor) -> None:
        """Of one H, uᵀHu' is symmetric, and for a positive H below √(uᵀHu u'ᵀHu'): the yardstick here."""
        if not self._pairs or self.max_asymmetry == float("inf"):
            return
        factors = torch.tensor([pair.product.correction for pair in self._pairs], dtype=torch.float64)
        rows = [pair.row for pair in self._pairs]
        directions = [pair.direction for pair in self._pairs]
        own = float(dots([direction], product))
        others = torch.cat([dots([u], y) for u, y in zip(directions, rows, strict=True)]) * factors
        difference = dots(rows, direction) * factors - dots(directions, product)
        self._keep((difference.abs() <= self.max_asymmetry * (others * own).abs().sqrt()).tolist())

    def orthogonal(self, candidate: Tensor) -> Tensor | None:
        """The unit vector along ``candidate`` orthogonalised against the directions that will stay beside it.

        Returns:
            The direction ``[d]`` to ask for next; the candidate itself, normalised, if it lies in their span already;
            None for a candidate of zero.
        """
        length = norm(candidate)
        if length == 0:
            return None
        stay = [pair.direction for pair in self._pairs[-(self.capacity - 1) :]] if self.capacity > 1 else []
        rest = candidate.clone()
        if stay:
            inverse = torch.linalg.pinv(self._overlaps[-len(stay) :, -len(stay) :], hermitian=True)
            for _ in range(2):  # twice is enough (Giraud et al., 2005)
                combine(rest, (-(inverse @ dots(stay, rest))).tolist(), stay)
        left = norm(rest)
        if left < _SAME_SPAN * length:
            return candidate / length
        return rest.div_(left)

    def direction(self, momentum: Tensor, rho: float, metric: Metric | None = None) -> Direction:
        """(|H_a| + ρD)⁻¹ m; m/(ρD) without any pair.

        Args:
            momentum: m ``[d]``, float32 or float64.
            rho: ρ > 0.
            metric: D; None for the identity.

        Returns:
            p, finite and with p·m > 0 for m ≠ 0.

        Raises:
            ValueError: ρ is not positive.
        """
        if not rho > 0:
            raise ValueError(f"rho is {rho:g}, expected a positive number")
        scale = scale_of(momentum)
        basis, eigenvalues, projected = self._eigenpairs(momentum, rho, metric, scale)
        cap = _LARGEST_CURVATURE[momentum.dtype]
        modulus = eigenvalues.abs().clamp(max=cap * rho)
        share = modulus / (modulus + rho)
        along = basis.T @ projected
        coefficients = basis @ (share * along)
        out = torch.empty_like(momentum)
        for part, rows in self._rows(len(momentum)):
            left = wide(momentum[part], scale)
            if len(self):
                left.sub_(rows.T @ coefficients.to(left.device))
            if metric is not None:
                left.div_(metric.block(part))
            out[part] = left.mul_(scale).div_(rho)
        bend = float((modulus * (along * (1 - share) / rho).square()).sum()) * scale * scale
        return Direction(out, eigenvalues, bend)

    def _rows(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of Y as float64 ``[k, block]``, bias-corrected; a block's memory is that of the one before."""
        rows_of = [pair.row for pair in self._pairs]
        device = rows_of[0].device if rows_of else None
        corrections = [pair.product.correction for pair in self._pairs]
        factors = torch.tensor(corrections, dtype=torch.float64, device=device)[:, None]
        for part, rows in _stacked(rows_of, size):
            yield part, rows.mul_(factors)

    def _eigenpairs(
        self, momentum: Tensor, rho: float, metric: Metric | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[k, r]`` and λ ``[r]`` such that Y A are the eigenvectors of H_a, and Yᵀ D⁻¹ m ``[k]``."""
        count = len(self)
        gram, core = torch.zeros(2, count, count, dtype=torch.float64)
        projected = torch.zeros(count, dtype=torch.float64)
        if count == 0:
            return torch.empty(0, 0, dtype=torch.float64), torch.empty(0, dtype=torch.float64), projected
        size = len(momentum)
        directions_of = _stacked([pair.direction for pair in self._pairs], size)
        for (part, rows), (_, directions) in zip(self._rows(size), directions_of, strict=True):
            core += (directions @ rows.T).cpu()
            weighted = rows if metric is None else torch.div(rows, metric.block(part), out=directions)
            gram += (weighted @ rows.T).cpu()
            projected += (weighted @ wide(momentum[part], scale)).cpu()
        return *nystrom_eigenpairs(gram, core, rho), projected

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The pairs in order."""
        return {
            "pairs": [
                {"direction": pair.direction, "product": pair.product.state_dict(), "age": pair.age}
                for pair in self._pairs
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._pairs, self._overlaps = [], torch.zeros(0, 0, dtype=torch.float64)
        for stored in state["pairs"]:
            product = Moment(self.beta)
            product.load_state_dict(stored["product"])
            self._append(_Pair(stored["direction"].clone(), product, int(stored["age"])))


def _stacked(vectors: Sequence[Tensor], size: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of vectors of one size as float64 ``[k, block]``, each in the memory of the one before."""
    device = vectors[0].device if vectors else None
    memory = torch.empty(len(vectors) * min(size, BLOCK), dtype=torch.float64, device=device)
    for part in blocks(size):
        length = part.stop - part.start
        block = memory[: len(vectors) * length].view(len(vectors), length)
        for row, vector in zip(block, vectors, strict=True):
            row.copy_(vector[part])
        yield part, block


def nystrom_eigenpairs(gram: Tensor, core: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues λ ``[r]`` of Y (UᵀY)⁺ Yᵀ, and A ``[k, r]`` with orthonormal Y A as its eigenvectors.

    Args:
        gram: YᵀY ``[k, k]`` (YᵀD⁻¹Y in a metric), float64.
        core: UᵀY ``[k, k]``, float64; need not be symmetric.
        rho: what curvature is compared with: eigenvalues far beyond ρ are all the same.
    """
    # Products of 1e±30 in float32 leave a Gram matrix of 1e±60: its square roots stay in range, its squares too.
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    moduli = values.abs()
    kept = moduli >= _CORE_CUTOFF * moduli.max()
    vectors, values = vectors[:, kept], values[kept]
    # A pivot of zero stands for a curvature beyond all bounds, not for a division by zero.
    least = gram.diagonal().max() / (rho * _LARGEST_CURVATURE[torch.float64])
    signs = torch.where(values < 0, -1.0, 1.0).double()
    values = signs * values.abs().clamp(min=max(float(least), 1e-290))
    lengths, basis = torch.linalg.eigh(vectors.T @ gram @ vectors)
    kept = lengths > _GRAM_CUTOFF * lengths.max().clamp(min=0)
    lengths, basis = lengths[kept].sqrt(), basis[:, kept]
    root = lengths[:, None] * basis.T
    eigenvalues, rotation = torch.linalg.eigh((root / values) @ root.T)
    return vectors @ (basis / lengths) @ rotation, eigenvalues
