"""When FedPipe plans, from what, and what it learns from a round: the state machine between planner and messages.

Rounds go in cycles: some warm-up rounds, in which every node trains one low rank on as many candidate weights as it
can hold and reports their importance, then rounds by the plan that follows from it. FedPipe-style: the paper's own
schedule (arXiv 2404.06448) was not available to us.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedllm.strategies.fedpipe.plan import RoundPlan

from fedllm.errors import PlanError, ReplyError
from fedllm.lora.budget import plan_cohort
from fedllm.lora.importance import Importance, check_report, combine
from fedllm.lora.plans import NodeBudget, PlanOptions
from fedllm.lora.spec import ModelSpec
from fedllm.nodes import NodeInfo

logger = logging.getLogger(__name__)

_SPEEDS = ("flops-per-second", "upload-rate", "download-rate")


@dataclass(frozen=True)
class Schedule:
    """When what is planned.

    Attributes:
        warmup_rounds: rounds of a warm-up; 0: every weight counts the same.
        warmup_steps: local steps in them.
        probe_rank: rank of every weight in them.
        replan_every: rounds by the plan after which another warm-up comes; 0: never.
        gain: how a rank's use grows: ``log`` as log(1 + r); ``energy`` as the energy that the leading r directions of
            the warm-up's updates hold, which sees no use in ranks above ``probe_rank``.
        quorum: share of the connected nodes that a plan must reach.
    """

    warmup_rounds: int = 1
    warmup_steps: int = 20
    probe_rank: int = 4
    replan_every: int = 0
    gain: Literal["log", "energy"] = "log"
    quorum: float = 0.5


class CohortPlanner:
    """Plans rounds and remembers what the next plan depends on.

    A node's speed and link are taken from its first description and kept: a measurement is never the same twice, and a
    plan must not change with it when a run is resumed. Its memory is what it last told, in a description or a reply.

    Args:
        spec: the base model, with the candidate weights.
        options: what may be planned.
        schedule: when.
    """

    def __init__(self, spec: ModelSpec, options: PlanOptions, schedule: Schedule) -> None:
        self.spec = spec
        self.weights = [weight.name for weight in spec.weights]
        self._options = options
        self._schedule = schedule
        self._uniform = Importance(dict.fromkeys(self.weights, 1.0))
        self._budgets: dict[str, NodeBudget] = {}
        self._described: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._reports: dict[str, Importance] = {}
        self._importance: Importance | None = None
        self._warmups_left = schedule.warmup_rounds
        self._rounds_left = schedule.replan_every
        self._plan: RoundPlan | None = None

    def plan(self, nodes: Sequence[NodeInfo]) -> RoundPlan:
        """The plan for the next round: the one that holds, or a new one if the phase or a node's budget has changed.

        Raises:
            PlanError: too few of the nodes can take part; says who cannot and why.
        """
        self._read(nodes)
        phase: Literal["warm-up", "plan"] = "warm-up" if self._warmups_left > 0 else "plan"
        memory = {name: budget.memory_bytes for name, budget in self._budgets.items()}
        if self._plan is None or self._plan.phase != phase or self._plan.budgets != memory:
            options, importance = self._options, self._importance or self._uniform
            if phase == "warm-up":
                steps = self._schedule.warmup_steps
                options = replace(options, ranks=(self._schedule.probe_rank,), steps=lambda *_: steps)
                importance = self._uniform
            cohort = plan_cohort(self._budgets.values(), self.spec, importance, options)
            refused = {name: str(error) for name, error in cohort.errors.items()}
            self._plan = RoundPlan(phase, cohort.plans, refused, memory)
        self._require_quorum(nodes)
        return self._plan

    @property
    def current(self) -> RoundPlan | None:
        """The plan that holds, before the first one None."""
        return self._plan

    @property
    def refused(self) -> dict[str, str]:
        """Why nodes cannot take part, by name: what they told is unusable, or too little for any plan."""
        return self._refused | dict(self._plan.refused if self._plan else {})

    def finish(self, reports: Mapping[str, Importance], memory: Mapping[str, float]) -> list[str]:
        """Take in what a round that counts has told.

        Args:
            reports: importance, by node.
            memory: bytes that nodes have now, by node.

        Returns:
            What was wrong with reports, for the log; those reports are not used.
        """
        assert self._plan is not None
        for name, available in memory.items():
            if name in self._budgets:
                self._budgets[name] = replace(self._budgets[name], memory_bytes=available)
        if self._plan.phase == "plan":
            self._count_planned_round()
            return []
        wrong = self._take_reports(reports)
        self._warmups_left -= 1
        if self._warmups_left == 0:
            if self._reports:
                combined = combine(self._reports, {n: self._budgets[n].num_examples for n in self._reports})
                self._importance = (
                    combined if self._schedule.gain == "energy" else Importance(combined.scores)
                )
            else:
                wrong.append(
                    "no usable report of importance came back from the warm-up: every weight counts the same; does the "
                    'client report importance (client = "backprop" does)?'
                )
            self._reports = {}
        return wrong

    def _count_planned_round(self) -> None:
        if self._rounds_left > 0:
            self._rounds_left -= 1
            if self._rounds_left == 0:
                self._warmups_left = self._schedule.warmup_rounds
                self._rounds_left = self._schedule.replan_every

    def _take_reports(self, reports: Mapping[str, Importance]) -> list[str]:
        assert self._plan is not None
        wrong = []
        for name, report in reports.items():
            # Scores of a part of the weights say nothing about the rest, so they cannot enter one mean.
            if not self._plan.covers(name, self.weights):
                continue
            try:
                check_report(name, report, self.weights)
            except ReplyError as error:
                wrong.append(f"{error}; the report is not used, the adapter is")
            else:
                self._reports[name] = report
        return wrong

    def _read(self, nodes: Sequence[NodeInfo]) -> None:
        self._refused = {}
        for node in nodes:
            try:
                told = NodeBudget.from_description(node.name, node.description or {}, _SPEEDS)
            except PlanError as error:
                self._refused[node.name] = str(error)
                self._budgets.pop(node.name, None)
                continue
            known = self._budgets.get(node.name, told)
            if self._described.get(node.name) != told.memory_bytes:
                self._described[node.name] = told.memory_bytes
                known = replace(known, memory_bytes=told.memory_bytes)
            self._budgets[node.name] = known

    def _require_quorum(self, nodes: Sequence[NodeInfo]) -> None:
        assert self._plan is not None
        able = [node.name for node in nodes if node.name in self._plan.nodes]
        needed = max(1, math.ceil(self._schedule.quorum * len(nodes) - 1e-9))
        if len(able) < needed:
            reasons = "; ".join(self.refused[node.name] for node in nodes if node.name in self.refused)
            raise PlanError(
                f"{len(able)} of {len(nodes)} nodes can take part, expected at least {needed} (server.quorum); "
                f"{reasons}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later plans depend on, as JSON values."""
        return {
            "budgets": {name: asdict(budget) for name, budget in self._budgets.items()},
            "described": dict(self._described),
            "reports": {name: asdict(report) for name, report in self._reports.items()},
            "importance": None if self._importance is None else asdict(self._importance),
            "warmups-left": self._warmups_left,
            "rounds-left": self._rounds_left,
            "plan": None if self._plan is None else self._plan.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._budgets = {name: NodeBudget(**values) for name, values in state["budgets"].items()}
        self._described = dict(state["described"])
        self._reports = {name: Importance(**values) for name, values in state["reports"].items()}
        self._importance = None if state["importance"] is None else Importance(**state["importance"])
        self._warmups_left, self._rounds_left = state["warmups-left"], state["rounds-left"]
        self._plan = None if state["plan"] is None else RoundPlan.from_json(state["plan"])
