"""Exact gradients and Hessian–vector products of any torch model, streamed over mini-batches.

A client of a second-order method needs no more than :func:`gradient_and_hvp`; it knows neither Flower nor transformers,
so a ClientApp with any network can call it. The product is Pearlmutter's (1994): differentiate the gradient's inner
product with the direction. Sums over batches are weighted, so any cut of the examples gives the full-batch values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.errors import NonFiniteLossError, TrainError

Batch = TypeVar("Batch")
HvpMethod = Literal["double-backward", "central-difference"]
NO_DOUBLE_BACKWARD = "the backward pass of this model cannot be differentiated"
_NOT_TWICE = (
    "is not implemented",
    "once_differentiable",
    "not have been used",
    "no autograd formula",
)
"""Parts of what torch says when a backward pass cannot itself be differentiated."""


@dataclass(frozen=True)
class Curvature:
    """What a client knows of its loss at one point.

    Attributes:
        loss: weighted mean loss.
        gradient: its gradient by parameter name, float32 at least.
        product: its Hessian times the direction by parameter name; None if no direction was given.
        weight: sum of the batches' weights.
    """

    loss: float
    gradient: dict[str, Tensor]
    product: dict[str, Tensor] | None
    weight: float


def gradient_and_hvp(
    loss: Callable[[Batch], Tensor],
    parameters: Mapping[str, Tensor],
    batches: Iterable[tuple[Batch, float]],
    direction: Mapping[str, Tensor] | None = None,
    *,
    method: HvpMethod = "double-backward",
    epsilon: float = 1e-2,
) -> Curvature:
    """Gradient of a mean loss at the current parameters, and its Hessian times a direction.

    The loss must be the same function in every call: no dropout, no batch normalisation in training mode.

    Args:
        loss: mean loss of a batch, a scalar of the parameters as they stand in memory.
        parameters: leaves that require gradients, by name; unchanged afterwards.
        batches: each with its weight in the mean, for example its number of examples; at least one.
        direction: u by parameter name; a parameter without one has zeros. None: no product.
        method: ``double-backward`` is exact and needs a backward pass that can be differentiated;
            ``central-difference`` takes [∇F(w + εu) − ∇F(w − εu)] / 2ε, two gradients more and no second derivative.
        epsilon: ε in units of 1/‖u‖, for the difference.

    Raises:
        NonFiniteLossError: a loss or gradient that is not finite; the server may take back the step that led here.
        TrainError: a direction that does not fit, or a model whose backward pass cannot be differentiated (fused
            attention, reentrant checkpointing).
        ValueError: there is no batch.
    """
    if direction is not None:
        _check_direction(parameters, direction)
    gradient = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in parameters.items()}
    product = None if direction is None else {name: torch.zeros_like(g) for name, g in gradient.items()}
    total = total_loss = 0.0
    for batch, weight in batches:
        exact = product is not None and method == "double-backward"
        with math_attention() if exact else _nothing():
            value = loss(batch)
        _refuse_reentrant_checkpoints(value)
        if not bool(torch.isfinite(value)):
            raise NonFiniteLossError(f"the loss is {value.item()}; the gradient at this point is of no use")
        first = _gradients(value, parameters, create_graph=exact)
        if product is not None and direction is not None:
            second = _double_backward(first, parameters, direction) if exact else None
            if second is None:
                second = _central_difference(loss, batch, parameters, direction, epsilon)
                if exact:
                    _refuse_hidden_graph(second)
            _accumulate(product, second, weight)
        _accumulate(gradient, [None if g is None else g.detach() for g in first], weight)
        total_loss += weight * value.item()
        total += weight
    if total <= 0:
        raise ValueError("no batch with a positive weight to take a gradient of")
    for sums in (gradient, product or {}):
        for tensor in sums.values():
            tensor.div_(total)
    for name, tensor in gradient.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteLossError(
                f"the gradient of {name!r} is not finite; the loss is {total_loss / total:g}"
            )
    return Curvature(total_loss / total, gradient, product, total)


@contextmanager
def math_attention() -> Iterator[None]:
    """Let ``scaled_dot_product_attention`` choose the kernel whose backward pass can be differentiated.

    The choice is made in the forward pass; fused kernels raise in the second backward pass.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _check_direction(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    for name, tensor in direction.items():
        if name not in parameters:
            raise TrainError(f"the direction has {name!r}, which is no parameter of this model")
        if tensor.shape != parameters[name].shape:
            raise TrainError(
                f"the direction's {name!r} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(parameters[name].shape)}"
            )


def _gradients(value: Tensor, parameters: Mapping[str, Tensor], create_graph: bool) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    )


def _double_backward(
    first: list[Tensor | None], parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> list[Tensor | None] | None:
    """∇ ⟨∇F, u⟩ from a gradient that has its graph; None if it has none."""
    terms = [
        (g * direction[name].to(g)).sum()
        for name, g in zip(parameters, first, strict=True)
        if g is not None and name in direction
    ]
    if not terms:
        return [None] * len(first)
    total = torch.stack(terms).sum()
    if not total.requires_grad:
        return None
    try:
        _refuse_error_nodes(total)
        return list(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))
    except RuntimeError as error:
        if any(part in str(error) for part in _NOT_TWICE):
            reason = str(error).strip().partition("\n")[0][:200]
            raise TrainError(f"{NO_DOUBLE_BACKWARD}: {reason}") from error
        raise


def _refuse_hidden_graph(difference: Iterable[Tensor | None]) -> None:
    """Tell a linear loss, whose gradient is the same bits everywhere, from a backward pass that hides its graph.

    Raises:
        TrainError: gradients without a graph differ from point to point.
    """
    if any(term is not None and bool(term.any()) for term in difference):
        raise TrainError(f"{NO_DOUBLE_BACKWARD}: the gradient depends on the parameters, but has no graph")


def _refuse_error_nodes(value: Tensor) -> None:
    """Look for the nodes by which torch marks a backward pass that may be run only once.

    They raise when they are reached, but ``autograd.grad`` skips what does not lead to the parameters: the product
    would lack their part without a word.
    """
    if "Error" in _node_names(value):
        raise RuntimeError("a function of the model is marked with @once_differentiable")


def _refuse_reentrant_checkpoints(value: Tensor) -> None:
    """Their parameters get no gradient from ``autograd.grad``, and nothing says so.

    Raises:
        TrainError: the loss went through one.
    """
    if "CheckpointFunctionBackward" in _node_names(value):
        raise TrainError(
            "the model checkpoints activations in torch's reentrant form, whose gradients cannot be asked for: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def _node_names(value: Tensor) -> set[str]:
    """Types of all nodes of a graph."""
    seen, open_nodes = set[Any](), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes.extend(following for following, _ in node.next_functions)
    return {type(node).__name__ for node in seen}


def _central_difference(
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    epsilon: float,
) -> list[Tensor | None]:
    """[∇F(w + hu) − ∇F(w − hu)] / 2h with h = ε/‖u‖; the parameters come back bit for bit."""
    length = sum(tensor.double().square().sum().item() for tensor in direction.values()) ** 0.5
    if length == 0:
        return [None] * len(parameters)
    step = epsilon / length
    moved = {name: parameters[name] for name in direction}
    originals = {name: parameter.detach().clone() for name, parameter in moved.items()}
    ends: list[list[Tensor | None]] = []
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for name, parameter in moved.items():
                    parameter.copy_(originals[name]).add_(direction[name].to(parameter), alpha=sign * step)
            ends.append(_gradients(loss(batch), parameters, create_graph=False))
    finally:
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(originals[name])
    return [
        None
        if plus is None or minus is None
        else (plus.float() - minus.float()) / (2 * step)
        if plus.dtype != torch.float64
        else (plus - minus) / (2 * step)
        for plus, minus in zip(*ends, strict=True)
    ]


def _accumulate(sums: Mapping[str, Tensor], terms: Iterable[Tensor | None], weight: float) -> None:
    for total, term in zip(sums.values(), terms, strict=True):
        if term is not None:
            total.add_(term, alpha=weight)
