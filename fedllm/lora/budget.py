"""The planner: bits, batch size and a rank for every weight, from what a node has.

For every width of the base, batch size and lowest adapted block, ranks are a knapsack of importance times gain under
the node's memory; work that the deadline leaves undone is paid for at ``under_training_weight``. The most valuable plan
wins; among equals the one with more bits, then the larger batch. FedPipe-style: our reconstruction of its planning
problem (arXiv 2404.06448), which its summaries call a mixed-integer linear program solved by a fast search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedllm.errors import PlanError
from fedllm.lora.importance import Importance
from fedllm.lora.knapsack import GAP, Choice, Knapsack
from fedllm.lora.plans import CohortPlan, NodeBudget, NodePlan, PlanOptions
from fedllm.lora.spec import ModelSpec
from fedllm.lora.timing import RoundWork

__all__ = ["CohortPlan", "NodeBudget", "NodePlan", "PlanOptions", "plan_cohort", "plan_node"]

_TIE = 1e-9


def plan_node(budget: NodeBudget, spec: ModelSpec, importance: Importance, options: PlanOptions) -> NodePlan:
    """Plan one node.

    Raises:
        PlanError: the model with its smallest adapter does not fit, or not one step ends before the deadline; the node,
            what is needed and what it has are named. Or there is no candidate, or the importance does not cover all.
    """
    return _Planner(spec, importance, options).plan(budget)


def plan_cohort(
    budgets: Iterable[NodeBudget], spec: ModelSpec, importance: Importance, options: PlanOptions
) -> CohortPlan:
    """Plan all nodes; one that cannot take part does not stop the others.

    Raises:
        PlanError: there is no candidate, or the importance does not cover them all.
    """
    planner = _Planner(spec, importance, options)
    plans: dict[str, NodePlan] = {}
    errors: dict[str, PlanError] = {}
    for budget in budgets:
        try:
            plans[budget.node] = planner.plan(budget)
        except PlanError as error:
            errors[budget.node] = error
    return CohortPlan(plans, errors)


@dataclass(frozen=True)
class _Setting:
    """A width, batch size and lowest block that a node could be given, with what ranks can still use."""

    bits: int
    batch: int
    lowest: int
    capacity: float
    work: RoundWork
    most: float


class _Planner:
    """The part of planning that all nodes share: gains, and the knapsacks by batch size and lowest block."""

    def __init__(self, spec: ModelSpec, importance: Importance, options: PlanOptions) -> None:
        if not spec.weights:
            raise PlanError("there is no candidate weight, so there is nothing to plan")
        self._spec, self._options = spec, options
        self._columns = (0, *options.ranks)
        names = [weight.name for weight in spec.weights]
        self._gain = np.array([importance.gains(name, self._columns) for name in names])
        self._gain = self._gain * np.array(importance.normalized(names))[:, None]
        self._size = np.array([[float(w.adapter_parameters(r)) for r in self._columns] for w in spec.weights])
        self._block = np.array([weight.block for weight in spec.weights])
        self._lowest = sorted({weight.block for weight in spec.weights})
        self._unrestricted: dict[int, Knapsack] = {}
        self._knapsacks: dict[tuple[int, int], Knapsack] = {}
        self._fixed = {
            (bits, batch, lowest): options.memory.fixed(
                spec, lowest, bits, batch, options.sequence_length
            ).total
            for bits in options.bits
            for batch in options.batch_sizes
            for lowest in self._lowest
        }

    def plan(self, budget: NodeBudget) -> NodePlan:
        """The best plan of all settings.

        Raises:
            PlanError: there is none.
        """
        best: tuple[Choice, _Setting] | None = None
        doubtful = []
        for setting in self._settings(budget):
            if best is not None and setting.most < best[0].value - _TIE:
                break  # settings come sorted by what they can reach at most
            knapsack, work = self._knapsack(setting.batch, setting.lowest), setting.work
            bound = knapsack.bound(setting.capacity, work.penalty, work.relaxed)
            if best is None or bound >= best[0].value - _TIE:
                choice = knapsack.greedy(setting.capacity, work.penalty)
                doubtful.append((bound, choice, setting))
                best = _better(best, choice, setting)
        for bound, choice, setting in sorted(doubtful, key=lambda entry: -entry[0]):
            if best is None or bound - best[0].value <= GAP * abs(bound):
                break
            knapsack = self._knapsack(setting.batch, setting.lowest)
            choice = knapsack.improve(choice, bound, setting.capacity, setting.work.penalty)
            best = _better(best, choice, setting)
        if best is None:
            raise self._refusal(budget)
        return self._finish(budget, *best)

    def _settings(self, budget: NodeBudget) -> list[_Setting]:
        """Every setting that the node can hold, the most promising first."""
        reachable = {low: float(self._gain[self._block >= low, -1].sum()) for low in self._lowest}
        settings = []
        for (bits, batch, lowest), fixed in self._fixed.items():
            if fixed > budget.memory_bytes:
                continue
            work = self._work(budget, bits, batch, lowest)
            most = reachable[lowest] - float(work.penalty(np.zeros(1))[0])
            capacity = math.floor(budget.memory_bytes) - fixed
            settings.append(_Setting(bits, batch, lowest, capacity, work, most))
        return sorted(settings, key=lambda s: (-s.most, -s.bits, -s.batch, s.lowest))

    def _knapsack(self, batch: int, lowest: int) -> Knapsack:
        """Ranks of the weights from a block upwards; what they cost does not depend on the width of the base."""
        if (batch, lowest) not in self._knapsacks:
            self._knapsacks[batch, lowest] = self._all_weights(batch).among(self._block >= lowest)
        return self._knapsacks[batch, lowest]

    def _all_weights(self, batch: int) -> Knapsack:
        if batch not in self._unrestricted:
            model, length = self._options.memory, self._options.sequence_length
            inputs = np.array([model.input_bytes(w, batch, length) for w in self._spec.weights])
            memory = model.trainable_bytes * self._size
            memory[:, 1:] += inputs[:, None] * model.activation_scale
            self._unrestricted[batch] = Knapsack(self._gain, memory, self._size)
        return self._unrestricted[batch]

    def _work(self, budget: NodeBudget, bits: int, batch: int, lowest: int) -> RoundWork:
        options, time = self._options, self._options.time
        length = options.sequence_length
        pace = time.slowdown[bits] / budget.flops_per_second
        heads = self._spec.head_parameters
        return RoundWork(
            steps=options.steps(budget.num_examples, batch),
            deadline=options.deadline_seconds,
            step_seconds=time.base_flops(self._spec, lowest, batch, length) * pace,
            step_seconds_per_parameter=time.adapter_flops(1, batch, length) * pace,
            link_seconds=time.link_seconds(heads, budget.upload_rate, budget.download_rate),
            link_seconds_per_parameter=time.link_seconds(1, budget.upload_rate, budget.download_rate),
            weight=options.under_training_weight,
        )

    def _finish(self, budget: NodeBudget, choice: Choice, setting: _Setting) -> NodePlan:
        spec, options = self._spec, self._options
        columns = zip(spec.weights, choice.picks.tolist(), strict=True)
        ranks = {weight.name: self._columns[column] for weight, column in columns if column}
        size = sum(weight.adapter_parameters(ranks.get(weight.name, 0)) for weight in spec.weights)
        # The lowest weight that is adapted may stand above the block that was allowed.
        work = self._work(budget, setting.bits, setting.batch, spec.lowest_block(ranks))
        steps = int(work.steps_done(np.array([float(size)]))[0])
        memory = options.memory.predict(spec, ranks, setting.bits, setting.batch, options.sequence_length)
        under = 1 - steps / work.steps
        gain = choice.value + float(setting.work.penalty(np.array([float(size)]))[0])
        return NodePlan(
            node=budget.node,
            bits=setting.bits,
            batch_size=setting.batch,
            steps=steps,
            ranks=ranks,
            predicted_bytes=memory.total,
            predicted_seconds=work.seconds(steps, size),
            under_training=under,
            value=gain - options.under_training_weight * under,
        )

    def _refusal(self, budget: NodeBudget) -> PlanError:
        """Why there is no plan: memory, if nothing fits at all, else time."""
        needed, bits, batch = min(
            (math.ceil(fixed + self._knapsack(batch, lowest).cheapest), bits, batch)
            for (bits, batch, lowest), fixed in self._fixed.items()
        )
        if needed > budget.memory_bytes:
            return PlanError(
                f"node {budget.node}: needed are {needed} bytes ({needed / 1e6:.1f} MB) of memory at {bits} bits with "
                f"batch size {batch} and the smallest adapter, available are {budget.memory_bytes:.0f} "
                f"({budget.memory_bytes / 1e6:.1f} MB); give it a smaller model, or leave it out"
            )
        smallest = float(self._size[:, 1].min())
        seconds = min(
            self._work(budget, bits, batch, lowest).seconds(1, smallest)
            for bits, batch, lowest in self._fixed
        )
        return PlanError(
            f"node {budget.node}: one step and the transfers take at least {seconds:.3g} s, the deadline is "
            f"{self._options.deadline_seconds:g} s; raise the deadline, or leave the node out"
        )


def _better(
    best: tuple[Choice, _Setting] | None, choice: Choice, setting: _Setting
) -> tuple[Choice, _Setting] | None:
    """The more valuable choice; among equals that with more bits, then that with the larger batch."""
    if choice.value == -math.inf:
        return best
    if best is None:
        return choice, setting
    if abs(choice.value - best[0].value) > _TIE:
        return (choice, setting) if choice.value > best[0].value else best
    wider = (setting.bits, setting.batch) > (best[1].bits, best[1].batch)
    return (choice, setting) if wider else best
