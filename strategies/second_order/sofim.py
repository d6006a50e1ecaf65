"""SOFIM's directions (arXiv 2403.02833): a Fisher matrix made of the mean gradient, F = M Mᵀ + ρI, solved in O(d).

Sources disagree on what F⁻¹ is applied to; both readings are here. With the momentum, the two terms of
Sherman–Morrison collapse to a scalar: the direction is the momentum's, only its length is set.
"""

from __future__ import annotations

import torch
from fedllm.strategies.second_order.rank_one import rank_one_direction
from fedllm.strategies.second_order.vectors import norm
from torch import Tensor


def momentum_direction(momentum: Tensor, rho: float, *, out: Tensor | None = None) -> Tensor:
    """(M Mᵀ + ρI)⁻¹ M = M / (ρ + ‖M‖²), without the cancellation of the two-term formula.

    Args:
        momentum: M ``[d]``, float32 or float64.
        rho: ρ > 0.
        out: where to write the direction; may be ``momentum`` itself.

    Returns:
        p ``[d]`` with ‖p‖ ≤ 1/(2√ρ), reached at ‖M‖ = √ρ.

    Raises:
        ValueError: ρ is not positive.
    """
    if not rho > 0:
        raise ValueError(f"rho is {rho:g}, expected a positive number")
    length = norm(momentum)
    if length == 0:
        return torch.div(momentum, float("inf"), out=out)
    # M / (ρ + ‖M‖²) with the square kept in range: divide by ‖M‖, then by ‖M‖ + ρ/‖M‖.
    return torch.div(momentum, length, out=out).div_(length + rho / length)


def gradient_direction(
    gradient: Tensor, momentum: Tensor, rho: float, *, out: Tensor | None = None
) -> Tensor:
    """(M Mᵀ + ρI)⁻¹ g = (1/ρ) [ g − M (M·g) / (ρ + ‖M‖²) ].

    Args:
        gradient: g ``[d]``, float32 or float64.
        momentum: M ``[d]`` of the same dtype.
        rho: ρ > 0.
        out: where to write the direction; may be ``gradient`` itself.

    Raises:
        ValueError: ρ is not positive.
    """
    return rank_one_direction(gradient, momentum, 1.0, rho, out=out).vector
