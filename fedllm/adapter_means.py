"""Means of adapters of mixed ranks: by columns of the factors, or exactly, of the products.

Every array of a run carries one common α/r (see :mod:`fedllm.lora_targets`), so that ``lora_B @ lora_A`` is a client's
update up to that constant and nothing has to be folded in here. A client may hold only some of the modules: each is
averaged over those who returned it, and keeps its value if nobody did. Whatever is no pair of factors (heads) is
averaged as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch

from fedllm.accumulate import Reply
from fedllm.errors import ReplyError
from fedllm.lora.factors import Factors, fold, stack
from fedllm.lora.pairs import AdapterNames, Pair, pair_names
from fedllm.lora.stream import ProductSum
from fedllm.lora.svd import split
from fedllm.records import decode

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
Starting = Literal["nothing", "global", "global-less-sent"]
"""What the mean of the returned products is added to; see :class:`ProductMean`."""


class ColumnMean:
    """Mean of the factors themselves, rank by rank; column j of ``lora_B`` belongs to row j of ``lora_A``.

    Args:
        current: the global adapter, whose ranks the result has; a rank that no reply holds keeps its value.
        pad: True: a rank that a client lacks counts as zeros (zero-padding, as in HetLoRA, arXiv 2401.06432, but with
            the replies' own weights instead of its norms), up to the largest rank among the replies. False: it does not
            count, so that a rank is averaged over those who hold it (the rule of raFLoRA, arXiv 2602.13486, applied to
            factors; ours). With equal ranks both are the plain mean of FedIT (arXiv 2305.05644).
    """

    def __init__(self, current: Tensors, *, pad: bool) -> None:
        self._current = current
        self._names = pair_names(current)
        self._pad = pad
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in current.items()}
        self._weights = {
            name: torch.zeros(current[pair.lora_A].shape[0], dtype=torch.float64)
            for name, pair in self._names.modules.items()
        }
        self._holders = dict.fromkeys(self._names.modules, 0.0)
        self._heads = _HeadMean(current, self._names.heads)

    def add(self, reply: Reply) -> None:
        """Add a reply.

        Raises:
            ReplyError: an array that the global adapter lacks, half a pair, or a shape that does not fit it.
        """
        for name, pair in _held(reply, self._current, self._names).items():
            rank, limit = reply.arrays[pair.lora_A].shape[0], self._weights[name].numel()
            if rank > limit:
                raise ReplyError(
                    f"node {reply.node}: {name!r} has rank {rank}, the global adapter only {limit}"
                )
            self._sums[pair.lora_A][:rank].add_(reply.arrays[pair.lora_A], alpha=reply.weight)
            self._sums[pair.lora_B][:, :rank].add_(reply.arrays[pair.lora_B], alpha=reply.weight)
            self._weights[name][:rank] += reply.weight
            self._holders[name] += reply.weight
        self._heads.add(reply)

    def result(self) -> dict[str, torch.Tensor]:
        """The next global adapter as float64."""
        means = self._heads.result()
        for name, pair in self._names.modules.items():
            held = self._weights[name] > 0
            weights = torch.where(held, self._holders[name] if self._pad else self._weights[name], 1.0)
            for part, axis in ((pair.lora_A, (-1, 1)), (pair.lora_B, (1, -1))):
                mean = self._sums[part] / weights.view(axis)
                means[part] = torch.where(held.view(axis), mean, self._current[part].double())
        return {name: means[name] for name in self._current}


class ServerProducts:
    """The global product of every module at its full rank, of which the global adapter is only the leading part.

    Args:
        max_rank: largest rank that is kept of a module; 0: whatever the products have, at most min(d, k).
    """

    def __init__(self, max_rank: int = 0) -> None:
        self.max_rank = max_rank
        self.modules: dict[str, Factors] = {}

    def of(self, module: str, pair: Pair, current: Tensors) -> Factors:
        """The product of a module; before the first round it is what the global adapter holds."""
        known = self.modules.get(module)
        return fold(current[pair.lora_A], current[pair.lora_B]) if known is None else known.to(torch.float64)

    def keep(self, products: Mapping[str, Factors]) -> None:
        """Take over products, rounded to float32: what a checkpoint holds is then all there is."""
        self.modules |= {module: factors.to(torch.float32) for module, factors in products.items()}

    def state_dict(self) -> dict[str, Any]:
        """The factors by module."""
        return {module: {"left": f.left, "right": f.right} for module, f in self.modules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.modules = {
            module: Factors(torch.as_tensor(part["left"]), torch.as_tensor(part["right"]))
            for module, part in state.items()
        }


class ProductMean:
    """Mean of the clients' products ``lora_B @ lora_A``, whatever their ranks; exact up to the final truncation.

    ``starting`` says what the mean P⁻¹ Σ p (…) over the holders of a module is added to:

    * ``nothing``: the products replace the global one (FlexLoRA, arXiv 2402.11505). What was truncated for a client is
      lost if it does not learn it again: direction j decays by the share of the clients whose rank reaches j.
    * ``global``: the clients trained new adapters beside a frozen global product (FLoRA, arXiv 2409.05976).
    * ``global-less-sent``: each client counts with the difference between what it returned and what it was sent (ours).
      The truncation cancels, and a client that returns what it got changes nothing.

    The sum is a :class:`fedllm.lora.stream.ProductSum` in float64: memory does not grow with the cohort.

    Args:
        current: the global adapter, whose ranks the result has.
        starting: see above.
        products: the server's products at full rank, which :meth:`result` updates; not used with ``nothing``.
    """

    def __init__(self, current: Tensors, starting: Starting, products: ServerProducts) -> None:
        self._current = current
        self._names = pair_names(current)
        self._starting = starting
        self._products = products
        self._sums: dict[str, ProductSum] = {}
        self._holders: dict[str, float] = {}
        self._heads = _HeadMean(current, self._names.heads)

    def add(self, reply: Reply) -> None:
        """Add a reply.

        Raises:
            ReplyError: an array that the global adapter lacks, half a pair, or a shape that does not fit it.
        """
        sent = decode(reply.sent) if self._starting == "global-less-sent" else {}
        for name, pair in _held(reply, self._current, self._names).items():
            if name not in self._sums:
                self._sums[name] = ProductSum(self._products.max_rank or None)
            returned = fold(reply.arrays[pair.lora_A], reply.arrays[pair.lora_B])
            if self._starting == "global-less-sent":
                if pair.lora_A not in sent:
                    raise ReplyError(f"node {reply.node} returned {name!r}, which it was not sent")
                returned = stack([(1.0, returned), (-1.0, fold(sent[pair.lora_A], sent[pair.lora_B]))])
            self._sums[name].add(returned, reply.weight)
            self._holders[name] = self._holders.get(name, 0.0) + reply.weight
        self._heads.add(reply)

    def result(self) -> dict[str, torch.Tensor]:
        """The next global adapter as float64: the leading triplets of the new products, balanced.

        The server's products are updated.
        """
        means, new = self._heads.result(), dict[str, Factors]()
        for name, pair in self._names.modules.items():
            factor_a, factor_b = self._current[pair.lora_A], self._current[pair.lora_B]
            if name not in self._sums:
                means[pair.lora_A], means[pair.lora_B] = factor_a.double(), factor_b.double()
                continue
            total, weight = self._sums[name], self._holders[name]
            if self._starting != "nothing":
                total.add(self._products.of(name, pair, self._current), weight)
            svd = total.svd().scaled(1 / weight)
            if svd.discarded:
                norm = float(torch.linalg.vector_norm(svd.values))
                logger.info("%s: the rank limit cut at most %.3g of %.3g", name, svd.discarded, norm)
            if self._starting != "nothing":
                new[name] = svd.factors()
            means[pair.lora_A], means[pair.lora_B] = split(svd, factor_a.shape[0], fill=factor_a)
        self._products.keep(new)
        return {name: means[name] for name in self._current}


class _HeadMean:
    """Weighted mean of arrays that are no factors, each over the replies that hold it."""

    def __init__(self, current: Tensors, names: tuple[str, ...]) -> None:
        self._current = {name: current[name] for name in names}
        self._sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._current.items()}
        self._weights = dict.fromkeys(names, 0.0)

    def add(self, reply: Reply) -> None:
        for name in self._sums.keys() & reply.arrays.keys():
            self._sums[name].add_(reply.arrays[name], alpha=reply.weight)
            self._weights[name] += reply.weight

    def result(self) -> dict[str, torch.Tensor]:
        return {
            name: total / self._weights[name] if self._weights[name] else self._current[name].double()
            for name, total in self._sums.items()
        }


def _held(reply: Reply, current: Tensors, names: AdapterNames) -> dict[str, Pair]:
    """The modules that a reply holds, once all its arrays are known to fit the global adapter."""
    if extra := [name for name in reply.arrays if name not in current]:
        raise ReplyError(f"node {reply.node}: {extra[0]!r} is no array of the global adapter")
    for name in names.heads:
        if name in reply.arrays and reply.arrays[name].shape != current[name].shape:
            raise ReplyError(_misfit(reply, name, tuple(current[name].shape)))
    held = {}
    for module, pair in names.modules.items():
        if (pair.lora_A in reply.arrays) != (pair.lora_B in reply.arrays):
            raise ReplyError(f"node {reply.node}: only one of the two factors of {module!r}")
        if pair.lora_A not in reply.arrays:
            continue
        rank = reply.arrays[pair.lora_A].shape[0]
        for name, shape in (
            (pair.lora_A, (rank, current[pair.lora_A].shape[1])),
            (pair.lora_B, (current[pair.lora_B].shape[0], rank)),
        ):
            if tuple(reply.arrays[name].shape) != shape:
                raise ReplyError(_misfit(reply, name, shape))
        held[module] = pair
    return held


def _misfit(reply: Reply, name: str, expected: tuple[int, ...]) -> str:
    return f"node {reply.node}: {name!r} has shape {tuple(reply.arrays[name].shape)}, expected {expected}"
