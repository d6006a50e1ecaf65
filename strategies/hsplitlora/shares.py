"""What each node holds: fixed cuts in turn, or cuts and ranks planned by budget and importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from fedllm.strategies.hsplitlora.cuts import CutPlan, ServerSide, plan_cuts
from fedllm.strategies.hsplitlora.history import ImportanceHistory, largest_change, pooled

from fedllm.errors import PlanError
from fedllm.lora.importance import Importance
from fedllm.lora.plans import NodeBudget, NodePlan, PlanOptions
from fedllm.lora.spec import ModelSpec
from fedllm.nodes import NodeInfo
from fedllm.planned import Bits, Planned

Reports = Mapping[str, tuple[float, Mapping[str, float]]]
"""Weight of a party and its importance scores by weight name, by party."""


@dataclass(frozen=True)
class Share:
    """What one node holds and how it trains.

    Attributes:
        cut: blocks on the client.
        ranks: by module name, of the client's modules.
        planned: bits, batch size, steps and blocks, as the client is told.
        seconds: predicted time of a step; 0: not predicted.
    """

    cut: int
    ranks: Mapping[str, int]
    planned: Planned
    seconds: float = 0.0


class Dealer(Protocol):
    """Deals shares to nodes, and learns what matters."""

    refused: Mapping[str, str]

    def deal(self, nodes: Sequence[NodeInfo]) -> dict[str, Share]:
        """The shares of the nodes that can take part, by name; the others are in ``refused`` with the reason."""
        ...

    def learn(self, server_round: int, reports: Reports) -> None:
        """Take in a round's importance scores."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that later shares depend on, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        ...


class FixedCuts:
    """Cuts and ranks in turn, whatever the nodes have.

    Args:
        cuts: at least one.
        ranks: in turn; empty: ``full``.
        full: rank of every module of the global adapter.
        blocks: block of every module.
        bits: width of the base.
        batch_size: examples in a step.
    """

    def __init__(
        self,
        cuts: Sequence[int],
        ranks: Sequence[int],
        full: Mapping[str, int],
        blocks: Mapping[str, int],
        bits: Bits,
        batch_size: int,
    ) -> None:
        self._cuts, self._ranks, self._full, self._blocks = tuple(cuts), tuple(ranks), full, blocks
        self._bits, self._batch_size = bits, batch_size
        self._numbers: dict[str, int] = {}
        self.refused: Mapping[str, str] = {}

    def deal(self, nodes: Sequence[NodeInfo]) -> dict[str, Share]:
        """Nodes are numbered as they appear, those that appear together in the order of their names."""
        for node in sorted(nodes, key=lambda node: node.order):
            self._numbers.setdefault(node.name, len(self._numbers))
        return {node.name: self._share(self._numbers[node.name]) for node in nodes}

    def _share(self, number: int) -> Share:
        cut = self._cuts[number % len(self._cuts)]
        limit = self._ranks[number % len(self._ranks)] if self._ranks else math.inf
        ranks = {
            name: int(min(rank, limit))
            for name, rank in self._full.items()
            if self._blocks.get(name, cut) < cut
        }
        return Share(cut, ranks, Planned(self._bits, self._batch_size, blocks=cut))

    def learn(self, server_round: int, reports: Reports) -> None:
        """Nothing depends on it."""

    def state_dict(self) -> dict[str, Any]:
        """The nodes' numbers."""
        return {"numbers": dict(self._numbers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._numbers = dict(state["numbers"])


class PlannedCuts:
    """Cuts and ranks by every node's budget, planned anew when importance or a budget has changed enough.

    Args:
        spec: the whole model, with the candidate weights.
        options: what may be planned.
        server: what the cuts are weighed against.
        settling: see :class:`ImportanceHistory`.
        threshold: relative change of a weight's importance from which plans are made anew.
        quorum: share of the nodes that must be able to take part.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: PlanOptions,
        server: ServerSide,
        *,
        settling: float,
        threshold: float,
        quorum: float,
    ) -> None:
        self._spec, self._options, self._server = spec, options, server
        self._history = ImportanceHistory(settling)
        self._threshold, self._quorum = threshold, quorum
        self._planned_with: dict[str, float] = {}
        self._budgets: dict[str, NodeBudget] = {}
        self._plans: dict[str, CutPlan] = {}
        self.refused: Mapping[str, str] = {}

    def deal(self, nodes: Sequence[NodeInfo]) -> dict[str, Share]:
        """Plan where something has changed; a node that is away keeps its plan.

        Raises:
            PlanError: too few nodes can take part for a quorum; each one's reason is given.
        """
        refused: dict[str, str] = {}
        budgets: dict[str, NodeBudget] = {}
        for node in nodes:
            try:
                budgets[node.name] = NodeBudget.from_description(node.name, dict(node.description or {}))
            except PlanError as error:
                refused[node.name] = str(error)
        stale = largest_change(self._planned_with, self._history.scores) > self._threshold
        if stale and (self._history.scores or not self._plans):
            self._plans, self._planned_with = {}, dict(self._history.scores)
        changed = {
            name: budget
            for name, budget in budgets.items()
            if budget != self._budgets.get(name) or name not in self._plans
        }
        if changed:
            cuts = range(1, self._spec.num_blocks)
            plans, reasons = plan_cuts(changed, self._spec, self._scores(), self._options, self._server, cuts)
            for name in changed:
                self._plans.pop(name, None)
            self._plans |= plans
            refused |= reasons
        self._budgets |= budgets
        self.refused = refused
        able = [node.name for node in nodes if node.name in self._plans and node.name not in refused]
        needed = max(1, math.ceil(self._quorum * len(nodes) - 1e-9))
        if len(able) < needed:
            raise PlanError(
                f"{len(able)} of {len(nodes)} nodes can hold a part of the model, expected at least {needed} "
                f"(server.quorum); {'; '.join(refused.values())}"
            )
        return {name: _share_of(self._plans[name]) for name in able}

    def _scores(self) -> Importance:
        """The history; a weight of which nobody has told yet counts as the mean."""
        known = self._history.scores
        mean = math.fsum(known.values()) / len(known) if known else 1.0
        return Importance({weight.name: known.get(weight.name, mean) for weight in self._spec.weights})

    def learn(self, server_round: int, reports: Reports) -> None:
        """Mix the parties' scores into the history."""
        if reports:
            self._history.update(server_round, pooled(reports))

    def state_dict(self) -> dict[str, Any]:
        """History, budgets and plans."""
        return {
            "history": self._history.state_dict(),
            "planned-with": dict(self._planned_with),
            "budgets": {name: asdict(budget) for name, budget in self._budgets.items()},
            "plans": {name: asdict(plan) for name, plan in self._plans.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._history.load_state_dict(state["history"])
        self._planned_with = dict(state["planned-with"])
        self._budgets = {name: NodeBudget(**values) for name, values in state["budgets"].items()}
        self._plans = {
            name: CutPlan(**{**values, "client": NodePlan(**values["client"])})
            for name, values in state["plans"].items()
        }


def _share_of(plan: CutPlan) -> Share:
    client = plan.client
    bits = cast(Bits, client.bits)
    planned = Planned(bits, client.batch_size, client.steps, client.predicted_bytes, blocks=plan.cut)
    return Share(plan.cut, client.ranks, planned, plan.step_seconds)
