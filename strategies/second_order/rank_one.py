"""FAGH's Newton direction from one Hessian row (arXiv 2403.11041), in a form that never divides by the pivot.

The paper's curvature is H_a = v vᵀ / v₀, where v = H e₀ is the averaged first row of the Hessian and v₀ its first
entry: the rank-one Nyström approximation of H sketched with e₀. Sherman–Morrison gives (H_a + ρI)⁻¹ m with two
divisions by v₀, which fail for v₀ ≈ 0 and turn to ascent for −‖v‖²/ρ < v₀ < 0. Multiplied out, with the modulus of the
pivot (ours; the saddle-free choice |H_a| of Dauphin et al., 2014), this is

    p = (1/ρ) [ m − v (v·m) / (ρ |v₀| + ‖v‖²) ].

It equals the paper's for v₀ > 0, is (|H_a| + ρI)⁻¹ m otherwise, has ‖p‖ ≤ ‖m‖/ρ, and by Cauchy–Schwarz
p·m ≥ ‖m‖² |v₀| / (ρ|v₀| + ‖v‖²). A floor on ρ|v₀| relative to ‖v‖² keeps p·m above the rounding error for v ∥ m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from fedllm.strategies.second_order.vectors import blocks, scale_of, wide
from torch import Tensor

_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Smallest ρ|v₀| / ‖v‖² by dtype: the eigenvalue λ = ‖v‖²/|v₀| counts as at most ρ divided by it."""


@dataclass(frozen=True)
class RankOne:
    """A direction and the curvature that it was damped with.

    Attributes:
        vector: p ``[d]``.
        eigenvalue: λ = ‖v‖²/v₀, the only one of v vᵀ/v₀, signed; infinite for a pivot of zero.
    """

    vector: Tensor
    eigenvalue: float


def rank_one_direction(
    momentum: Tensor, row: Tensor, pivot: float, rho: float, *, factor: float = 1.0, out: Tensor | None = None
) -> RankOne:
    """(|v vᵀ/v₀| + ρI)⁻¹ m in O(d): two passes over both vectors.

    Args:
        momentum: m ``[d]``, float32 or float64.
        row: v = H u ``[d]`` for a direction u; of the same dtype.
        pivot: v₀ = u·v; for the paper's u = e₀ the first entry of the row. Any sign.
        rho: ρ > 0, the damping.
        factor: p is multiplied by this on its way out.
        out: where to write p; may be ``momentum`` itself.

    Returns:
        p, finite and with p·m > 0 for every finite v and m ≠ 0 whose m/ρ is finite (and a positive factor).

    Raises:
        ValueError: ρ is not positive.
    """
    if not rho > 0:
        raise ValueError(f"rho is {rho:g}, expected a positive number")
    out = torch.empty_like(momentum) if out is None else out
    scale, momentum_scale = scale_of(row), scale_of(momentum)
    squares = product = 0.0
    for part in blocks(len(row)):
        v = wide(row[part], scale)
        squares += torch.dot(v, v).item()
        product += torch.dot(v, wide(momentum[part], momentum_scale)).item()
    # In units of the row's scale s: ρ|v₀|/s² beside ‖v/s‖².
    damping = max(rho * (abs(pivot) / scale / scale), _FLOOR[momentum.dtype] * squares)
    coefficient = product / (damping + squares) if squares else 0.0
    for part in blocks(len(row)):
        left = wide(momentum[part], momentum_scale)
        left.sub_(row[part] if scale == 1 else wide(row[part], scale), alpha=coefficient)
        out[part] = left.div_(rho).mul_(momentum_scale * factor)
    eigenvalue = scale * (squares * scale / pivot) if pivot else math.inf
    return RankOne(out, eigenvalue if squares else 0.0)
