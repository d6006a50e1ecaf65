"""What the scalars of a client mean, read off the message that it was sent (Spry, §3.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from fedllm.strategies.spry.dealing import Units
from flwr.app import ConfigRecord

from fedllm.config import Scalar
from fedllm.records import CLIENT_PARAMETERS, OWNED
from fedllm.tangents import from_scalars


@dataclass(frozen=True)
class Projection:
    """What the scalars of a client mean: which tensors were perturbed, and how."""

    adapter: tuple[str, ...]
    heads: tuple[str, ...]
    tangents: int
    head_tangents: int
    distribution: Literal["rademacher", "gaussian"]

    @classmethod
    def of(cls, config: ConfigRecord, units: Units) -> Projection:
        """Read it off the message of a client, as the client does."""
        parameters: dict[str, Scalar] = json.loads(str(config[CLIENT_PARAMETERS]))
        shared = frozenset(units.shared)
        heads = tuple(name for name in owned_names(config) if name in shared)
        factors = tuple(name for name in owned_names(config) if name not in shared)
        exact = bool(parameters["exact-heads"])
        projected = heads if exact and int(parameters["head-tangents"]) else ()  # without tangents heads stay
        return cls(
            factors if exact else factors + heads,
            projected,
            int(parameters["tangents"]),
            int(parameters["head-tangents"]) if projected else 0,
            parameters["distribution"],  # type: ignore[arg-type]
        )

    @property
    def count(self) -> int:
        """Scalars in a reply."""
        return self.tangents + self.head_tangents

    def gradient(
        self, seed: int, scalars: torch.Tensor, like: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The gradient that the client meant, bit for bit."""
        adapter = {name: tuple(like[name].shape) for name in self.adapter}
        heads = {name: tuple(like[name].shape) for name in self.heads}
        return from_scalars(seed, 1, scalars, adapter, heads, self.tangents, self.distribution)


def owned_names(config: ConfigRecord) -> list[str]:
    """The tensors that a training message deals to its client."""
    return [str(name) for name in config[OWNED]]  # type: ignore[union-attr]
