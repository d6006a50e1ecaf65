"""Hostile clients of a simulation: who attacks, from when on, and the order to do so.

Off unless asked for. A round is refused unless every node says that it is simulated, and a node that is not simulated
refuses the order as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from pydantic import Field

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.errors import PlanError
from fedllm.events import EventBus
from fedllm.records import ATTACK, ATTACK_PARAMETERS, SIMULATED, records_of
from fedllm.seeding import derive_seed
from fedllm.wrapper import StrategyWrapper


class HostileClients(StrategyWrapper):
    """Base: a fixed set of hostile clients, honest until a round.

    Args:
        inner: the strategy that is attacked, with its defence.
        fraction: share of the clients that is hostile.
        from_round: the first round in which they attack.
        seed: decides who is hostile.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        fraction: Annotated[float, Field(ge=0, le=1)] = 0.0,
        from_round: Annotated[int, Field(ge=1)] = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        self._fraction, self._from_round, self._seed = fraction, from_round, seed
        self._hostile: dict[str, bool] = {}

    def is_hostile(self, node_id: int) -> bool:
        """Whether a node of this round's cohort is one of the attackers."""
        return self._hostile[self.node_name(node_id)]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages.

        Raises:
            PlanError: a node does not say that it is simulated.
        """
        for node in self.nodes:
            if node.description is None or node.description.get(SIMULATED) is not True:
                raise PlanError(
                    f"node {node.name} is not simulated: attacks are for simulations only; set attack to none"
                )
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._assign({self.node_name(message.metadata.dst_node_id) for message in messages})
        return messages

    def _assign(self, asked: set[str]) -> None:
        """Choose exactly the share among the nodes that are there first; later ones are judged one by one."""
        names = sorted({node.name for node in self.nodes} | asked)
        drawn = {name: derive_seed(self._seed, "attacker", name) for name in names}
        if not self._hostile:
            count = math.floor(self._fraction * len(names) + 0.5)
            hostile = set(sorted(names, key=drawn.__getitem__)[:count])
            self._hostile = {name: name in hostile for name in names}
        for name in names:
            self._hostile.setdefault(name, drawn[name] < self._fraction * 2**63)

    def own_state(self) -> dict[str, Any]:
        """Who is hostile."""
        return {"hostile": self._hostile}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self._hostile = dict(state["hostile"])


class LoneAttack(HostileClients):
    """Tells hostile clients what to do; each attacks alone, on its own machine.

    Args:
        inner: the strategy that is attacked.
        attack: a :class:`fedllm.update.Attack` in the group ``fedllm.attacks``.
        parameters: JSON object of its parameters.
        kwargs: keywords of :class:`HostileClients`.
    """

    def __init__(self, inner: Strategy, *, attack: str, parameters: str = "{}", **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self._attack, self._parameters = attack, parameters

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Let the attack look at the task's labels, lest every hostile client fail in every round."""
        super().prepare(config, bundle, events)
        attack = registry.build("attacks", self._attack, json.loads(self._parameters))
        if (check := getattr(attack, "check_labels", None)) is not None:
            check(bundle.labels)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages, with the order to attack in those to hostile clients."""
        messages = super().configure_train(server_round, arrays, config, grid)
        if server_round < self._from_round:
            return messages
        return [
            self._ordered(message) if self.is_hostile(message.metadata.dst_node_id) else message
            for message in messages
        ]

    def _ordered(self, message: Message) -> Message:
        order = {ATTACK: self._attack, ATTACK_PARAMETERS: self._parameters}
        configs = {
            name: ConfigRecord({**record, **order})
            for name, record in records_of(message, ConfigRecord).items()
        }
        return Message(
            RecordDict({**message.content, **configs}),
            dst_node_id=message.metadata.dst_node_id,
            message_type=message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
