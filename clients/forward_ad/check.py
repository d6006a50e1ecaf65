"""The start-up check: is what forward mode computes the loss, and its derivative?

Kernels that lose a tangent do so silently, and a forward gradient that is wrong looks like one that is noisy. So the
first job of a process compares both with what needs no derivative: the loss of the untouched model, and a central
difference.
"""

from __future__ import annotations

import logging
import math

import torch
from fedllm.clients.forward_ad.jvp import LossOf, Objective, Tensors, dual_pass
from torch import Tensor

from fedllm.errors import ModelError
from fedllm.seeding import derive_seed
from fedllm.tangents import draw

logger = logging.getLogger(__name__)

_OFFSET = 0.01  # away from B = 0, where the loss does not depend on A
_STEPS = [2.0**exponent for exponent in range(-20, 0)]
_TRIES = 10
_TOKENS = 32


def short_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last tokens of the first example of a batch: few enough for a backward pass anywhere."""
    length = int(batch["attention_mask"][0].sum())
    kept = slice(max(length - _TOKENS, 0), length)
    return {name: value[:1, kept] if value.ndim == 2 else value[:1] for name, value in batch.items()}


def check_loss_agrees(found: float, stock: float, tolerance: float, model: str) -> None:
    """Compare the loss that forward mode differentiates with that of the model as it came.

    Raises:
        ModelError: they differ by more than the tolerance, relative to the larger of the loss and 0.1.
    """
    if not abs(found - stock) <= tolerance * max(abs(stock), 0.1):
        raise ModelError(
            f"{model}: the loss in forward mode is {found:.6g}, but that of the model is {stock:.6g} "
            f"(tolerance {tolerance:g}); its attention or its output is of a kind that forward mode does not know, "
            "choose another gradient mode"
        )


def check_derivative(
    loss: LossOf, batch: dict[str, Tensor], start: Tensors, dtype: torch.dtype, model: str
) -> None:
    """Compare a jvp with the central difference of the loss, near the start.

    The direction is the sign of the gradient: along a random one the loss of a model in half precision moves less than
    its rounding.

    Args:
        loss: of the model in forward mode, without dropout.
        batch: see :func:`short_batch`.
        start: the tensors to perturb.
        dtype: in which the model computes; it decides how exact a difference can be.
        model: its name, for the message.

    Raises:
        ModelError: the two differ; both numbers are named.
    """
    objective, resolution = loss.at(batch), torch.finfo(dtype).eps
    tolerance, least = (0.02, 8) if dtype == torch.float32 else (0.2, 1)
    point = {name: value + _OFFSET * _offset(name, value) for name, value in start.items()}
    direction = _ascent(objective, point)
    result = dual_pass(objective, point, [direction])
    slope, needed = float(result.jvps[0]), least * resolution * abs(result.loss)
    compared: list[str] = []
    with torch.no_grad():
        for step in _STEPS:
            ends = [
                float(
                    objective({name: value + sign * step * direction[name] for name, value in point.items()})
                )
                for sign in (1, -1)
            ]
            if abs(ends[0] - ends[1]) < needed:  # lost in rounding
                continue
            difference = (ends[0] - ends[1]) / (2 * step)
            if math.isclose(difference, slope, rel_tol=tolerance):
                return
            compared.append(f"{difference:.6g} (step {step:.2g})")
            if len(compared) == _TRIES:
                break
    if not compared:
        logger.warning(
            "%s: the loss moves too little to check its forward-mode derivative (%.3g)", model, slope
        )
        return
    raise ModelError(
        f"{model}: the forward-mode derivative of the loss is {slope:.6g}, but central differences say "
        f"{', '.join(compared)}; a layer of the model has no correct forward-mode derivative: "
        "choose another gradient mode"
    )


def _ascent(objective: Objective, point: Tensors) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(objective(leaves), list(leaves.values()))
    return {name: gradient.sign() for name, gradient in zip(leaves, gradients, strict=True)}


def _offset(name: str, like: Tensor) -> Tensor:
    return draw(derive_seed("jvp check"), 1, 1, name, like.shape, "rademacher").to(like)
