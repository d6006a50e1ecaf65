"""Random tangents from counters, and the gradient that they and a few scalars determine.

A forward gradient is g = (1/K) Σ_k s_k v_k with s_k = ⟨∇loss, v_k⟩ (Spry, arXiv 2405.15551 §3; Baydin et al., arXiv
2202.08587). A server that knows the seeds therefore rebuilds it from the K scalars alone. For that, both sides must
have the same bits whatever their processor: the values come from Philox counters (Salmon et al., SC'11), whose words
are integers, are turned into tangents by bit tests or one table look-up, and are summed on the CPU in one order.

Every tensor has a stream of its own, keyed by (job seed, step, tangent, tensor name), so that a server regenerates one
unit without the others. The job seed is that of (run, round, client): one seed for all clients, as the paper's appendix
G words it, would give clients that own the same unit the same noise and so undo the averaging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch

from fedllm.seeding import derive_seed

Distribution = Literal["rademacher", "gaussian"]
Shapes = Mapping[str, Sequence[int]]

_TABLE_BITS = 16


def draw(
    seed: int, step: int, tangent: int, name: str, shape: Sequence[int], distribution: Distribution
) -> torch.Tensor:
    """One tensor of one tangent, with mean 0, variance 1 and independent entries.

    Args:
        seed: of the (run, round, client), as in a job.
        step: of the client's round, from 1.
        tangent: from 1.
        name: of the tensor.
        shape: of the tensor.
        distribution: ``rademacher`` (±1) or ``gaussian`` (see :func:`_normal_quantiles`).

    Returns:
        float32 on the CPU.
    """
    count = math.prod(shape)
    words = np.random.Philox(key=derive_seed(seed, "tangent", step, tangent, name))
    bits = 1 if distribution == "rademacher" else _TABLE_BITS
    raw = words.random_raw(math.ceil(count * bits / 64)).astype("<u8", copy=False)
    if distribution == "rademacher":
        signs = np.unpackbits(raw.view(np.uint8), count=count, bitorder="little")
        values = signs.astype(np.float32) * 2 - 1
    else:
        values = _normal_quantiles()[raw.view("<u2")[:count]]
    return torch.from_numpy(values).reshape(tuple(shape))


def regenerate(
    seed: int, step: int, scalars: torch.Tensor, shapes: Shapes, distribution: Distribution
) -> dict[str, torch.Tensor]:
    """The forward gradient (1/K) Σ_k s_k v_k, bit for bit the same on every machine.

    Args:
        seed: of the (run, round, client), as in a job.
        step: of the client's round, from 1.
        scalars: s ``[K]``, float32.
        shapes: shapes of the tensors wanted, by name; any subset of those that were perturbed.
        distribution: of the tangents.

    Returns:
        float32 tensors on the CPU, under the names and in the order of ``shapes``.
    """
    weights = scalars.detach().to("cpu", torch.float32) / len(scalars)
    gradient = {}
    for name, shape in shapes.items():
        total = torch.zeros(tuple(shape))
        for tangent, weight in enumerate(weights, start=1):
            # Product and sum apart: a fused multiply-add, which not every machine has, rounds once instead of twice.
            total += draw(seed, step, tangent, name, shape, distribution) * weight
        gradient[name] = total
    return gradient


def from_scalars(
    seed: int,
    step: int,
    scalars: torch.Tensor,
    adapter: Shapes,
    heads: Shapes,
    tangents: int,
    distribution: Distribution,
) -> dict[str, torch.Tensor]:
    """The gradient that a client of the per-iteration mode means by its scalars.

    Args:
        seed: of the (run, round, client), as in a job.
        step: of the client's round, from 1.
        scalars: ``[K + H]``: K of the adapter, then H projections of the exact gradient of the heads.
        adapter: shapes of the tensors that were perturbed together.
        heads: shapes of the heads that the client projected; empty exactly if H is 0.
        tangents: K.
        distribution: of the tangents.

    Raises:
        ValueError: the number of scalars fits neither; names what was expected.
    """
    spare = scalars.numel() - tangents
    if scalars.ndim != 1 or spare < 0 or bool(heads) != bool(spare):
        wanted = f"{tangents} and those of the heads" if heads else f"{tangents}"
        raise ValueError(f"found scalars of shape {tuple(scalars.shape)}, expected {wanted}")
    gradient = regenerate(seed, step, scalars[:tangents], adapter, distribution)
    if heads:
        gradient |= regenerate(head_seed(seed), step, scalars[tangents:], heads, distribution)
    return gradient


def project(
    seed: int, step: int, count: int, gradient: Mapping[str, torch.Tensor], distribution: Distribution
) -> torch.Tensor:
    """⟨gradient, v_k⟩ for ``count`` tangents, ``[count]`` in float32; :func:`regenerate` is its unbiased inverse."""
    products = []
    for tangent in range(1, count + 1):
        parts = (
            draw(seed, step, tangent, name, value.shape, distribution).double()
            * value.detach().cpu().double()
            for name, value in gradient.items()
        )
        products.append(sum(float(part.sum()) for part in parts))
    return torch.tensor(products, dtype=torch.float32)


def head_seed(seed: int) -> int:
    """The seed of the tangents of heads, which are projected apart from the adapter."""
    return derive_seed(seed, "heads")


def is_second_factor(name: str) -> bool:
    """Whether a tensor is B of a low-rank product B A, by its PEFT state-dict name.

    B starts at zero, so that the gradient of A is zero at first and a perturbation of A is noise and nothing else.
    """
    return ".lora_B." in name


@cache
def _normal_quantiles() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A standard normal variable in 65,536 equally likely values, with mean 0 and variance 1.

    They are the quantiles at the centres of equal shares, scaled to variance 1; the largest is 4.3. A forward gradient
    needs only E[v vᵀ] = I, and a table has the same bits everywhere, where logarithms and cosines have not.
    """
    size = 2**_TABLE_BITS
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((index + 0.5) / size) for index in range(size // 2, size)])
    upper /= math.sqrt(math.fsum(upper**2) / len(upper))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)
