"""The Spry strategy: deal units, send the whole adapter, take back what was dealt, step unit by unit."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from fedllm.strategies.spry.dealing import Dealing, Units, deal
from fedllm.strategies.spry.ladder import Ladder, Modes
from fedllm.strategies.spry.merging import OwnersMean, UnitSgd, UnitYogi
from fedllm.strategies.spry.presets import FLOWERS, PRESETS, PresetName
from fedllm.strategies.spry.projection import Projection, owned_names
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field

from fedllm.accumulate import Accumulator, Reply
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, PlanError
from fedllm.events import EventBus
from fedllm.lora.modes import Mode
from fedllm.nodes import NodeInfo
from fedllm.records import (
    CLIENT,
    CLIENT_PARAMETERS,
    DIRECTION,
    OWNED,
    SCALARS,
    SEED,
    UPLOAD_CODEC,
    ArraySpec,
    ReplySpec,
    decode,
    encode,
    records_of,
)
from fedllm.seeding import derive_seed
from fedllm.strategy import BaseStrategy
from fedllm.tangents import is_second_factor

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

logger = logging.getLogger(__name__)

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
FORWARD_AD = "forward-ad"


class Spry(BaseStrategy):
    """Every client trains only the units that it is dealt (Spry, NeurIPS 2024, arXiv 2405.15551).

    A unit is the pair of low-rank factors of one module; heads are trained by all clients. The whole adapter goes down,
    since a correct forward pass needs it; only owned tensors come up. Every tensor becomes the mean over its owners and
    takes a server step of its own; one whose owners all failed stays as it is, moments included.

    Per iteration, a client of the update ``forward-ad`` sends K projections of the gradient of one batch instead of
    tensors, and the server rebuilds the gradient from the client's seed (§3.2). Per epoch any client update works.

    Args:
        preset: ``ours``, or ``paper`` for the published choices; it also sets those parameters of ``forward-ad``
            that the configuration leaves out.
        dealing: ``contiguous``, ``cyclic``, or ``all`` (no split); None: the preset's.
        communication: ``per-epoch`` or ``per-iteration``.
        server: ``yogi``, or ``sgd`` for a plain step to the mean.
        eta: step size of the server; None: for Yogi the preset's, and 0.01 per iteration; 1 for SGD.
        beta_1: decay of Yogi's first moment.
        beta_2: decay of Yogi's second moment.
        tau: Yogi's adaptivity; larger is closer to plain averaging. None: the preset's, and 0.001 per iteration.
        modes: client updates in order of preference, for example
            ``backprop-checkpointed,forward-ad,zeroth-order``; each node gets the first whose predicted memory is within
            what the node described. Empty: ``client`` decides for all. A node whose ``gradient-mode`` is set in its own
            configuration gets that in both cases; per iteration all use ``forward-ad``.
        send_direction: send the server's last step along, for clients that sample around it or use it as a control
            variate; doubles what goes down.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self,
        *,
        preset: PresetName = "ours",
        dealing: Dealing | None = None,
        communication: Literal["per-epoch", "per-iteration"] = "per-epoch",
        server: Literal["yogi", "sgd"] = "yogi",
        eta: Positive | None = None,
        beta_1: Decay = 0.9,
        beta_2: Decay = 0.99,
        tau: Positive | None = None,
        modes: Modes = (),
        send_direction: bool = False,
        **kwargs: Any,
    ) -> None:
        if modes and communication == "per-iteration":
            raise ConfigError(
                f"spry.modes is {', '.join(modes)}, but spry.communication per-iteration goes with forward-ad only; "
                "leave one of them out"
            )
        self.ladder = Ladder(modes)
        self.preset = PRESETS[preset]
        self.dealing: Dealing = dealing or self.preset.dealing
        self.communication = communication
        self.send_direction = send_direction
        yogi = self.preset.yogi if communication == "per-epoch" else FLOWERS
        optimizer: UnitYogi | UnitSgd = (
            UnitYogi(eta or yogi.eta, beta_1, beta_2, tau or yogi.tau)
            if server == "yogi"
            else UnitSgd(eta or 1.0)
        )
        super().__init__(**{"server_optimizer": optimizer} | kwargs)
        self._round = 0
        self._units = Units((), ())
        self._plans: dict[int, _Plan] = {}
        self._configs: dict[_Plan, ConfigRecord] = {}
        self._direction: dict[str, torch.Tensor] = {}
        self._shared_as: tuple[int, int] | None = None

    @staticmethod
    def check_config(config: RunConfig) -> None:
        """Refuse what clients or server would stumble over in the first round.

        Raises:
            ConfigError: client, communication and the client's parameters do not go together.
        """
        own, client = (config.plugins.get(table, {}) for table in ("spry", FORWARD_AD))
        if own.get("communication") == "per-iteration":
            if config.client != FORWARD_AD:
                raise ConfigError(
                    f'spry.communication per-iteration rebuilds forward gradients: set client = "{FORWARD_AD}", '
                    f"found {config.client!r}"
                )
            if client.get("control-variate"):
                raise ConfigError(
                    "forward-ad.control-variate is for spry.communication per-epoch: from scalars alone the server "
                    "would rebuild another gradient; leave it out"
                )
        elif client.get("control-variate") and config.client == FORWARD_AD and not own.get("send-direction"):
            raise ConfigError(
                "forward-ad.control-variate needs the server's last step: set spry.send-direction = true"
            )

    def prepare(self, config: RunConfig, bundle: ModelBundle, events: EventBus) -> None:
        """Learn the model's sizes, by which nodes get their gradient modes."""
        super().prepare(config, bundle, events)
        self.ladder.prepare(config, bundle)

    # ------------------------------------------------------------------ plan

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the whole adapter, each with the names that its client owns."""
        self._round = server_round
        self._units = Units.of(list(arrays))
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self.send_direction and self._direction:
            direction = encode(self._direction)
            for message in messages:
                message.content[DIRECTION] = direction
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the adapter; nothing is dealt for an evaluation."""
        self._plans = {}
        return super().configure_evaluate(server_round, arrays, config, grid)

    def select(
        self, server_round: int, nodes: Sequence[NodeInfo], count: int, purpose: str
    ) -> list[NodeInfo]:
        """Choose nodes as the base does; those that train are dealt their units."""
        chosen = super().select(server_round, nodes, count, purpose)
        if purpose == MessageType.TRAIN:
            self._plans, self._configs = self._deal(server_round, chosen), {}
        return chosen

    def config_for(self, node: NodeInfo, config: ConfigRecord) -> ConfigRecord:
        """The configuration with what this node owns; nodes that own the same share one."""
        plan = self._plans.get(node.node_id)
        if plan is None:
            return config
        if plan not in self._configs:
            self._configs[plan] = self._planned(plan, config)
        return self._configs[plan]

    def _deal(self, server_round: int, chosen: Sequence[NodeInfo]) -> dict[int, _Plan]:
        units, clients = len(self._units.dealt), len(chosen)
        if units == 0:
            raise PlanError(
                "spry deals pairs of low-rank factors, and the adapter has none; give the model LoRA modules "
                "(lora.target-modules), or take another strategy"
            )
        hands = deal(units, clients, server_round, self.dealing)
        self._tell_sharing(units, clients, hands)
        return {
            node.node_id: _Plan(
                self._units.names(hand),
                self.ladder.mode_of(node) if self.communication == "per-epoch" else None,
            )
            for node, hand in zip(chosen, hands, strict=True)
        }

    def _tell_sharing(self, units: int, clients: int, hands: Sequence[Sequence[int]]) -> None:
        """Log how units are shared, when that changes."""
        if self.dealing == "all" or self._shared_as == (units, clients):
            return
        self._shared_as = (units, clients)
        if clients > units:
            owners = Counter(index for hand in hands for index in hand).values()
            logger.info(
                "spry: %d clients share %d units: each unit has %s owners, whose replies are averaged",
                clients, units, _span(owners),
            )  # fmt: skip
        else:
            sizes = [len(hand) for hand in hands]
            logger.info("spry: %d units for %d clients: each trains %s of them", units, clients, _span(sizes))

    def _planned(self, plan: _Plan, config: ConfigRecord) -> ConfigRecord:
        planned = ConfigRecord(dict(config))
        owned, shared = plan.owned, frozenset(self._units.shared)
        client = str(config.get(CLIENT, ""))
        parameters = json.loads(str(config.get(CLIENT_PARAMETERS, "{}")))
        if plan.mode is not None and plan.mode != client:
            client, parameters = plan.mode, self.ladder.parameters(plan.mode)
            planned[CLIENT] = client
        if client == FORWARD_AD:
            parameters = {**self.preset.forward_ad, **parameters}
            if parameters["b-only"]:
                owned = tuple(name for name in owned if name in shared or is_second_factor(name))
        planned[OWNED] = list(owned)
        if self.communication == "per-iteration":
            if client != FORWARD_AD:
                raise PlanError(f"spry.communication per-iteration goes with {FORWARD_AD}, found {client!r}")
            parameters["upload"] = "scalars"
            planned[UPLOAD_CODEC] = "raw"
        if client:
            planned[CLIENT_PARAMETERS] = json.dumps(parameters)
        return planned

    # --------------------------------------------------------------- replies

    def reply_spec(self, sent: Message) -> ReplySpec:
        """Exactly the tensors that the client was dealt, or its scalars."""
        config = records_of(sent, ConfigRecord)[self.configrecord_key]
        if self.communication == "per-iteration":
            projection = Projection.of(config, self._units)
            return {SCALARS: ArraySpec((projection.count,), frozenset({"float32"}))}
        spec = super().reply_spec(sent)
        return {name: spec[name] for name in owned_names(config)}

    def open_reply(self, message: Message) -> Reply:
        """Decode a reply; scalars become the adapter after one step of size 1 against the gradient that they mean."""
        reply = super().open_reply(message)
        if self.communication == "per-epoch":
            return reply
        plan = self._plans[message.metadata.src_node_id]
        config = self._configs[plan]
        seed = derive_seed(int(config[SEED]), self._round, reply.node)  # type: ignore[arg-type]
        projection = Projection.of(config, self._units)
        gradient = projection.gradient(seed, reply.arrays[SCALARS], self._current)
        arrays = {name: self._current[name].double() - value for name, value in gradient.items()}
        return replace(reply, arrays=arrays)

    def accumulator(self) -> Accumulator:
        """A mean over owners."""
        return OwnersMean()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, step, and remember the direction of the step if clients are to get it."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.send_direction:
            new = decode(arrays)
            self._direction = {name: new[name] - value for name, value in self._current.items()}
        return arrays, metrics

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The server optimiser's moments and the last direction."""
        return {**super().state_dict(), "direction": dict(self._direction)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._direction = {name: torch.as_tensor(value) for name, value in state["direction"].items()}

    def settings(self) -> dict[str, object]:
        """What :meth:`summary` prints, by name."""
        return {"dealing": self.dealing, "communication": self.communication, **super().settings()}


@dataclass(frozen=True)
class _Plan:
    """What one client is to do: the names of the tensors that it owns, and by which update, if that is planned."""

    owned: tuple[str, ...]
    mode: Mode | None


def _span(counts: Iterable[int]) -> str:
    values = sorted(set(counts))
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
