"""Colluders who see all honest updates: wrappers that rewrite replies before the defence sees them.

They need the server's view, so they exist in simulations only (:mod:`fedllm.hostile`). Whole updates are held in
memory. What an attacker does alone runs on the client (:mod:`fedllm.clients.attacks`).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.flat_updates import flat_update, set_update
from fedllm.strategies.one_form import check_one_form
from fedllm.strategies.robust import rules
from fedllm.strategies.vert.sketch import Sketch
from fedllm.strategies.vert.strategy import VERT
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from pydantic import Field, PlainValidator
from torch import Tensor

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, PlanError
from fedllm.events import EventBus
from fedllm.hostile import HostileClients
from fedllm.records import decode, only_arrays
from fedllm.wrapper import StrategyWrapper, layers_of

TUNED, PAPER = "tuned", "paper"
"""Strengths of ALIE that are found in every round."""


class ColludingAttack(HostileClients):
    """Base of the attacks that need all updates; :meth:`craft` says what the colluders send.

    Args:
        inner: the strategy that is attacked.
        kwargs: keywords of :class:`HostileClients`.

    Attributes:
        others: names of the round's honest clients, in the order of their updates.
    """

    needs_honest: ClassVar[bool] = True
    """Whether there is nothing to craft in a round that asks hostile clients only."""

    def __init__(self, inner: Strategy, **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self.others: list[str] = []
        self._current: dict[int, Mapping[str, Tensor]] = {}
        self._events: EventBus | None = None

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Refuse clients of several ranks.

        Raises:
            ConfigError: ``lora.client-ranks`` names more than one.
        """
        alone = ", ".join(
            name
            for name in registry.available("attacks")
            if not issubclass(registry.load("attacks", name), HostileClients)
        )
        check_one_form(config, "attack", config.attack, f"set attack to one of {alone}")

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Take the run's events."""
        super().prepare(config, bundle, events)
        self._events = events

    @abstractmethod
    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """The colluders' updates ``[f, d]``.

        Args:
            server_round: the round.
            honest: updates of the others, ``[m, d]``, with m > 0 if ``needs_honest``.
            own: what the colluders would send if they were honest, ``[f, d]``.
            names: of the colluders.
        """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages; what each client was sent is remembered."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._current = {m.metadata.dst_node_id: decode(only_arrays(m)) for m in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Rewrite the colluders' replies, then let the inner strategy aggregate."""
        messages = [message for message in replies if not message.has_error()]
        vectors = [self._update_of(message) for message in messages]
        hostile = [self.is_hostile(message.metadata.src_node_id) for message in messages]
        if len({len(vector) for vector in vectors}) > 1:
            raise PlanError(f"{type(self).__name__} needs updates of one size: it cannot attack mixed ranks")
        if any(hostile):
            mask = torch.tensor(hostile)
            stacked = torch.stack(vectors)
            all_names = [self.node_name(message.metadata.src_node_id) for message in messages]
            names = [name for name, is_hostile in zip(all_names, hostile, strict=True) if is_hostile]
            self.others = [
                name for name, is_hostile in zip(all_names, hostile, strict=True) if not is_hostile
            ]
            self.watch(server_round, stacked[mask], names)
            if server_round >= self._from_round and self._can_craft(server_round):
                crafted = self.craft(server_round, stacked[~mask], stacked[mask], names)
                rewritten = (m for m, is_hostile in zip(messages, hostile, strict=True) if is_hostile)
                for message, update in zip(rewritten, crafted, strict=True):
                    set_update(only_arrays(message), self._base(message), update)
        return self.inner.aggregate_train(server_round, iter(messages))

    def _can_craft(self, server_round: int) -> bool:
        """Whether there is what the attack starts from; the run is told if not."""
        if self.others or not self.needs_honest:
            return True
        if self._events is not None:
            self._events.emit(
                "warning",
                message=f"round {server_round}: only hostile clients replied, but {type(self).__name__} needs honest "
                "updates to start from: they sent their own as if they were honest",
            )
        return False

    def watch(self, server_round: int, own: Tensor, names: list[str]) -> None:
        """See the colluders' honest updates, before the attack begins, too."""

    def _update_of(self, message: Message) -> Tensor:
        new = decode(only_arrays(message), self._current[message.metadata.src_node_id])
        return flat_update(self._base(message), new)

    def _base(self, message: Message) -> Mapping[str, Tensor]:
        return self._current[message.metadata.src_node_id] if self.replies_are_adapters else {}


class InnerProductManipulation(ColludingAttack):
    """IPM: −scale times the honest mean (arXiv 1903.03936).

    Args:
        inner: the strategy that is attacked.
        scale: strength.
        kwargs: keywords of :class:`HostileClients`.
    """

    def __init__(self, inner: Strategy, *, scale: Annotated[float, Field(gt=0)] = 0.5, **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self._scale = scale

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.inner_product_manipulation`."""
        return colluding.inner_product_manipulation(honest, self._scale).expand_as(own)


def _strength(z: Any) -> float | str:
    if z in (TUNED, PAPER):
        return str(z)
    try:
        number = math.nan if isinstance(z, bool) else float(z)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"alie.z: expected a number, {TUNED} or {PAPER}, found {z!r}")
    return number


class LittleIsEnough(ColludingAttack):
    """ALIE: honest mean − z · deviation (arXiv 1902.06156).

    ``tuned`` takes, in every round, the z of a grid that moves the aggregate furthest (Shejwalkar and Houmansadr, NDSS
    2021). Whatever the defence is, the aggregate that is tried is that of Multi-Krum, told that almost half of the
    replies are hostile; without a defence it is the mean. ``paper`` takes the publication's quantile, from how many
    clients and colluders replied; where the colluders are a round's majority it has no answer, and z is 0.

    Args:
        inner: the strategy that is attacked.
        z: strength, a number, may be negative; or ``tuned`` against the defence, or ``paper`` for the publication's.
        kwargs: keywords of :class:`HostileClients`.

    Raises:
        ConfigError: ``z`` is none of these.
    """

    def __init__(
        self, inner: Strategy, *, z: Annotated[float | str, PlainValidator(_strength)] = 1.5, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._z = _strength(z)

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Refuse the publication's strength for a majority, and clients of several ranks.

        Raises:
            ConfigError: there is no such strength, or ``lora.client-ranks`` names more than one rank.
        """
        super().check_config(config)
        table = registry.parameter_table(config.attack)
        if config.plugins.get(table, {}).get("z") == PAPER and config.attack_fraction > 0.5:
            raise ConfigError(
                f"{table}.z is {PAPER!r}, which has an answer for at most half of the clients, but attack-fraction is "
                f"{config.attack_fraction:g}: set {table}.z to a number or to {TUNED!r}, or lower attack-fraction"
            )

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.little_is_enough`, and ``tuned_little_is_enough`` there."""
        if self._z == TUNED:
            guarded = isinstance(self.inner, StrategyWrapper)
            rule = _almost_half_krum if guarded else _mean
            return colluding.tuned_little_is_enough(honest, len(own), rule).expand_as(own)
        paper = self._z == PAPER
        z = colluding.little_is_enough_z(len(honest) + len(own), len(own)) if paper else float(self._z)
        return colluding.little_is_enough(honest, z).expand_as(own)


def _mean(updates: Tensor) -> Tensor:
    return updates.mean(0)


def _almost_half_krum(updates: Tensor) -> Tensor:
    """Multi-Krum of ``[n, d]`` that allows for almost half of them to be hostile; what ALIE is tuned against."""
    return rules.multi_krum_weights(updates, max(0, len(updates) // 2 - 1)) @ updates


class MinMax(ColludingAttack):
    """Min-Max: as far from the honest mean as two honest updates are from each other (NDSS 2021).

    Args:
        inner: the strategy that is attacked.
        direction: unit, std or sign.
        kwargs: keywords of :class:`HostileClients`.
    """

    def __init__(self, inner: Strategy, *, direction: colluding.Direction = "unit", **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self._direction: colluding.Direction = direction

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.min_max`."""
        return colluding.min_max(honest, self._direction).expand_as(own)


class MinSum(MinMax):
    """Min-Sum: the summed squared distances stay within those of an honest update (NDSS 2021)."""

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.min_sum`."""
        return colluding.min_sum(honest, self._direction).expand_as(own)


class Mimic(ColludingAttack):
    """Mimic: all colluders send the update of the first honest client (arXiv 2006.09365)."""

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.mimic`."""
        return colluding.mimic(honest).expand_as(own)


class Replay(ColludingAttack):
    """Replay: every attacker sends again the update of its last honest round; without one, that of its first."""

    needs_honest = False

    def __init__(self, inner: Strategy, **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self._kept: dict[str, Tensor] = {}

    def watch(self, server_round: int, own: Tensor, names: list[str]) -> None:
        """Keep the newest honest update of each."""
        for name, update in zip(names, own, strict=True):
            if server_round < self._from_round or name not in self._kept:
                self._kept[name] = update.clone()

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """What was kept."""
        return torch.stack([self._kept[name] for name in names])

    def own_state(self) -> dict[str, Any]:
        """Who is hostile, and what each keeps sending."""
        return {**super().own_state(), "kept": self._kept}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        super().load_own_state(state)
        self._kept = dict(state["kept"])


class Adaptive(ColludingAttack):
    """Colluders that know VERT and its history: own honest updates, pushed as far as a copy of it accepts (ours)."""

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Refuse a run that VERT does not guard, and clients of several ranks.

        Raises:
            ConfigError: ``defence`` is not VERT, or ``lora.client-ranks`` names more than one rank.
        """
        super().check_config(config)
        if config.defence == "none" or not issubclass(registry.load("defences", config.defence), VERT):
            raise ConfigError(
                f"attack is {config.attack!r}, which tries its updates on a copy of VERT, but defence is "
                f'{config.defence!r}: set defence = "vert", or another attack'
            )

    def craft(self, server_round: int, honest: Tensor, own: Tensor, names: list[str]) -> Tensor:
        """See :func:`fedllm.strategies.attacks.colluding.adaptive`.

        Raises:
            PlanError: the strategy is not guarded by VERT.
        """
        guard = next((layer for layer in layers_of(self) if isinstance(layer, VERT)), None)
        if guard is None:
            raise PlanError("the adaptive attack needs defence = vert: it tries its updates on a copy of it")
        seen = [self._sketch(guard, update) for update in honest]

        def judged(candidates: Tensor) -> Tensor:
            sketches = [self._sketch(guard, update) for update in candidates] + seen
            vectors = torch.stack([sketch.vector for sketch in sketches])
            norms = torch.tensor([sketch.norm for sketch in sketches])
            found = copy.deepcopy(guard.detector).judge(
                server_round, names + self.others, vectors, norms, guard.root_sketch
            )
            return guard.weigh(found.factors, vectors)

        return colluding.adaptive(honest, own, judged)

    def _sketch(self, guard: VERT, update: Tensor) -> Sketch:
        """What the guard will make of an update."""
        sent = next(iter(self._current.values()))
        pieces = torch.split(update, [tensor.numel() for tensor in sent.values()])
        parts = {
            name: piece.view_as(tensor) for (name, tensor), piece in zip(sent.items(), pieces, strict=True)
        }
        if not self.replies_are_adapters:
            return guard.sketcher.update({}, parts)
        return guard.sketcher.update(sent, {name: tensor + parts[name] for name, tensor in sent.items()})
