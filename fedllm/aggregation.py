"""One switch for how adapters are averaged, and which rank each node gets.

================== ==================================================== ======================= =====================
``lora.aggregation`` global adapter                                       mixed ranks             server optimiser
================== ==================================================== ======================= =====================
``factor-average`` mean of the factors (FedIT)                            each rank over holders  any
``zero-pad``       mean of the factors, missing ranks count as 0          yes                     any
``svd``            mean of the products, truncated (FlexLoRA)             yes, ranks collapse     none
``stack``          global product + mean of new products (FLoRA)          yes, exact              none
``exact``          global product + mean of the products' changes (ours)  yes, exact              none
``auto``           ``exact`` where ``lora.client-ranks`` is set, else the plain mean of equal ranks
================== ==================================================== ======================= =====================

A server optimiser keeps moments for every entry of the factors; the last three choose a new basis of the factors in
every round, in which those moments would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedllm.accumulate import Accumulator, WeightedMean
from fedllm.adapter_means import ColumnMean, ProductMean, ServerProducts
from fedllm.config import AggregationName
from fedllm.errors import ConfigError
from fedllm.lora.pairs import pair_names
from fedllm.nodes import NodeInfo
from fedllm.seeding import derive_seed

Tensors = Mapping[str, torch.Tensor]


class ClientRanks:
    """Which node gets which rank: nodes are numbered as they appear, and number k gets the (k mod n)-th rank.

    Nodes that appear together are numbered in the stable order of their names. A node keeps its number when others come
    and go.

    Args:
        ranks: of the clients in turn; empty: every client gets the ranks of the global adapter.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = tuple(ranks)
        self._numbers: dict[str, int] = {}

    def see(self, nodes: Sequence[NodeInfo]) -> None:
        """Number the nodes that are new."""
        for node in sorted(nodes, key=lambda node: node.order) if self._ranks else ():
            self._numbers.setdefault(node.name, len(self._numbers))

    def of(self, node: NodeInfo) -> int | None:
        """The rank of a node that has been seen; None: whatever the global adapter has."""
        return self._ranks[self._numbers[node.name] % len(self._ranks)] if self._ranks else None

    def state_dict(self) -> dict[str, int]:
        """The nodes' numbers."""
        return dict(self._numbers)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._numbers = dict(state)


class AdapterAggregation:
    """How a strategy folds adapters, and what it must remember for it.

    Args:
        name: see the table of this module.
        client_ranks: ranks of the clients in turn; empty: all equal.
        max_rank: largest rank of a product that the server keeps between rounds; 0: no limit.
        optimizer: the server optimiser, for messages; None: none.

    Raises:
        ConfigError: a server optimiser beside an aggregation that has no use for one.
    """

    def __init__(
        self, name: AggregationName, client_ranks: Sequence[int], max_rank: int, optimizer: object | None
    ) -> None:
        chosen = ("exact" if client_ranks else "plain") if name == "auto" else name
        if optimizer is not None and chosen in ("svd", "stack", "exact"):
            raise ConfigError(
                f"lora.aggregation is {name}{'' if name == chosen else f' (here {chosen})'}, which averages products, "
                f"but the server optimiser {optimizer!r} keeps moments of factors; set lora.aggregation to "
                "factor-average or zero-pad, or use a strategy without a server optimiser"
            )
        self.name = chosen
        self.ranks = ClientRanks(client_ranks)
        self._products = ServerProducts(max_rank)

    def accumulator(self, current: Tensors) -> Accumulator:
        """A fresh accumulator for a round that starts from the global adapter ``current``."""
        match self.name:
            case "plain":
                return WeightedMean()
            case "factor-average" | "zero-pad":
                return ColumnMean(current, pad=self.name == "zero-pad")
            case "svd":
                return ProductMean(current, "nothing", self._products)
            case "stack":
                return ProductMean(current, "global", self._products)
        return ProductMean(current, "global-less-sent", self._products)

    def fresh(self, current: Tensors, seed: int) -> dict[str, torch.Tensor]:
        """A new adapter of product zero for every module, as peft draws one; heads are those of ``current``."""
        generator = torch.Generator()
        arrays = dict(current)
        for module, pair in pair_names(current).modules.items():
            generator.manual_seed(derive_seed(seed, module))
            shape = current[pair.lora_A].shape
            bound = shape[1] ** -0.5
            arrays[pair.lora_A] = (2 * torch.rand(shape, generator=generator) - 1) * bound
            arrays[pair.lora_B] = torch.zeros_like(current[pair.lora_B])
        return arrays

    def frozen(self, current: Tensors) -> dict[str, torch.Tensor]:
        """The server's products at full rank, as factors under the names of the adapter's; those of rank 0 left out."""
        arrays: dict[str, torch.Tensor] = {}
        for module, pair in pair_names(current).modules.items():
            product = self._products.of(module, pair, current)
            if product.rank:
                arrays |= {pair.lora_A: product.right, pair.lora_B: product.left}
        return arrays

    def state_dict(self) -> dict[str, Any]:
        """The server's products and the nodes' numbers, where there are any."""
        parts = {"products": self._products.state_dict(), "client-numbers": self.ranks.state_dict()}
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._products.load_state_dict(state.get("products", {}))
        self.ranks.load_state_dict(state.get("client-numbers", {}))


def remainder(arrays: Tensors, held: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """What a client's share of an adapter leaves out of the modules that it holds; terms of product zero do not count.

    Args:
        arrays: the adapter, by PEFT state-dict name.
        held: shapes of the client's arrays, each the leading terms of the adapter's.
    """
    rest: dict[str, torch.Tensor] = {}
    for pair in pair_names(arrays).modules.values():
        if pair.lora_A not in held:
            continue
        rank = held[pair.lora_A][0]
        left, right = arrays[pair.lora_B][:, rank:], arrays[pair.lora_A][rank:]
        used = left.any(dim=0) & right.any(dim=1)
        if used.any():
            rest |= {pair.lora_A: right[used], pair.lora_B: left[:, used]}
    return rest


def leading(arrays: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """An adapter cut to the leading ``rank`` terms of every module; modules of a lower rank and heads stay whole."""
    cut = dict(arrays)
    for pair in pair_names(arrays).modules.values():
        cut[pair.lora_A] = arrays[pair.lora_A][:rank]
        cut[pair.lora_B] = arrays[pair.lora_B][:, :rank]
    return cut
