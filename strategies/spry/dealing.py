"""Who owns which trainable units in a round: pure functions of the round and two counts (Spry, §3.1, App. E)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Dealing = Literal["contiguous", "cyclic", "all"]
_FACTOR = re.compile(r"^(?P<module>.*?)\.?lora_(?:embedding_)?[AB](?:\.|$)")


@dataclass(frozen=True)
class Units:
    """The tensors of an adapter as units to deal.

    Attributes:
        dealt: names of each unit, a pair of low-rank factors of one module, in the model's order.
        shared: everything else, normally the heads: every client trains it.
    """

    dealt: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Units:
        """Group tensor names in the model's order."""
        pairs: dict[str, list[str]] = {}
        shared = []
        for name in names:
            if match := _FACTOR.match(name):
                pairs.setdefault(match["module"], []).append(name)
            else:
                shared.append(name)
        return cls(tuple(tuple(pair) for pair in pairs.values()), tuple(shared))

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Tensor names of the units at the indices, and the shared ones after them."""
        return (*(name for index in indices for name in self.dealt[index]), *self.shared)


def deal(units: int, clients: int, server_round: int, how: Dealing) -> list[list[int]]:
    """Deal units to clients so that every unit has an owner and every client a unit.

    With fewer clients than units each client gets ⌊units/clients⌋ or one more: neighbours in the model (contiguous), or
    every clients-th (cyclic, as the paper has it). Tangents exist only above the lowest owned unit, so that with
    neighbours the average client computes two thirds as much. With more clients than units each unit gets
    ⌊clients/units⌋ owners or one more. The deal moves on by one client every round: shards of unequal size do not
    always meet the same units, and a unit whose owner fails has another one in the next round.

    Args:
        units: how many, at least 1.
        clients: how many, at least 1.
        server_round: from 1.
        how: ``contiguous``, ``cyclic``, or ``all``: no split, every client owns every unit.

    Returns:
        For each client the indices of its units, rising.
    """
    if how == "all":
        return [list(range(units)) for _ in range(clients)]
    if clients >= units:
        return [[(client + server_round) % units] for client in range(clients)]
    slots = [(client + server_round) % clients for client in range(clients)]
    if how == "cyclic":
        return [list(range(slot, units, clients)) for slot in slots]
    bounds = [units * slot // clients for slot in range(clients + 1)]
    return [list(range(bounds[slot], bounds[slot + 1])) for slot in slots]
