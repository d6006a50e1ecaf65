"""What a cohort does in a round: every node's plan, those left out, and a node's share of the adapter. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fedllm.lora.pairs import pair_names
from fedllm.lora.plans import NodePlan

Phase = Literal["warm-up", "plan"]

_PEFT = "base_model.model."
"""What PEFT state-dict names have before the module's name in the base model."""


@dataclass(frozen=True)
class RoundPlan:
    """The plans of a cohort, which hold until another one is made.

    Attributes:
        phase: ``warm-up``: one low rank on as many candidates as fit, to learn what matters; ``plan``: by importance.
        nodes: plan of every node that can take part, by name.
        refused: why the others cannot.
        budgets: bytes of memory that each node had when the plan was made.
    """

    phase: Phase
    nodes: Mapping[str, NodePlan]
    refused: Mapping[str, str]
    budgets: Mapping[str, float]

    def covers(self, node: str, weights: Sequence[str]) -> bool:
        """Whether a node adapts all these weights."""
        return node in self.nodes and all(self.nodes[node].ranks.get(name, 0) > 0 for name in weights)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundPlan:
        """Read what :meth:`to_json` returned."""
        nodes = {name: NodePlan(**plan) for name, plan in values["nodes"].items()}
        return cls(values["phase"], nodes, values["refused"], values["budgets"])


def share_of(arrays: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The part of a global adapter that a node holds: its weights' leading ranks, and all heads.

    Args:
        arrays: by PEFT state-dict name.
        ranks: by module name in the base model; a module that is not there, or of rank 0, does not travel.
    """
    names = pair_names(arrays)
    kept: dict[str, torch.Tensor] = {}
    for module, (name_a, name_b) in names.modules.items():
        if rank := ranks.get(module.removeprefix(_PEFT), 0):
            kept[name_a], kept[name_b] = arrays[name_a][:rank], arrays[name_b][:, :rank]
    kept |= {name: arrays[name] for name in names.heads}
    return {name: kept[name] for name in arrays if name in kept}


def modules_of(arrays: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Rank of every module of an adapter, by its name in the base model."""
    names = pair_names(arrays)
    return {
        module.removeprefix(_PEFT): arrays[pair.lora_A].shape[0] for module, pair in names.modules.items()
    }
