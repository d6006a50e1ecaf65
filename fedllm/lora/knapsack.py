"""Which rank for which weight: a multiple-choice knapsack with a concave gain and a penalty on the total size.

Greedy by gain per cost is optimal for the linear relaxation, whose value bounds what it may have missed. Only where
that bound leaves room (few weights, or one that takes much of the capacity) does a search over partial choices look
further.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Penalty = Callable[[Floats], Floats]

GAP = 0.005
"""Greedy's choice is taken when it is provably within this share of the optimum."""
_MAX_LABELS = 800


class Choice(NamedTuple):
    """One option for every weight.

    Attributes:
        picks: ``[weights]``, column of the option of each weight; 0 is none.
        value: gain minus penalty; minus infinity when nothing fits.
    """

    picks: Indices
    value: float


@dataclass(frozen=True)
class _Order:
    """Increments of all weights in falling density, and their running sums (which start with 0)."""

    weight: Indices
    column: Indices
    before: Indices
    gain: Floats
    memory: Floats
    size: Floats


class Knapsack:
    """The options of a set of weights; column 0 of every table is *no adapter* and all zero.

    Args:
        gain: ``[weights, options]``, not falling along a row.
        memory: ``[weights, options]`` bytes, rising along a row.
        size: ``[weights, options]`` parameters, rising along a row.

    Attributes:
        cheapest: memory of the cheapest option.
    """

    def __init__(self, gain: Floats, memory: Floats, size: Floats) -> None:
        self._tables = gain, memory, size
        self._allowed = np.ones(len(gain), bool)
        self._orders = [self._order(*_steps(gain, cost)) for cost in (memory, size)]
        self.cheapest = float(memory[:, 1].min())

    def among(self, allowed: NDArray[np.bool_]) -> Knapsack:
        """The same knapsack with some of the weights only.

        Args:
            allowed: ``[weights]``, at least one.
        """
        part = copy.copy(self)
        part._allowed = allowed
        part._orders = []
        for order in self._orders:
            kept = allowed[order.weight]
            part._orders.append(self._order(order.weight[kept], order.column[kept], order.before[kept]))
        part.cheapest = float(self._tables[1][allowed, 1].min())
        return part

    def bound(self, capacity: float, penalty: Penalty, relaxed: Penalty) -> float:
        """An upper bound on the value of any choice that adapts a weight.

        Args:
            capacity: bytes.
            penalty: of the total size, not falling; infinite beyond what is allowed.
            relaxed: at most ``penalty`` everywhere, not falling.
        """
        by_memory, by_size = self._orders
        most = float(np.interp(capacity, by_memory.memory, by_memory.gain))
        allowed = max(int(np.count_nonzero(np.isfinite(penalty(by_size.size)))), 1)
        # Between two breakpoints the gain is at most that of the upper one, the penalty at least that of the lower.
        upper = np.append(by_size.gain[1:], by_size.gain[-1])[:allowed]
        return float((np.minimum(upper, most) - relaxed(by_size.size[:allowed])).max())

    def greedy(self, capacity: float, penalty: Penalty) -> Choice:
        """The densest increments up to the first that does not fit, or the best single option.

        Args:
            capacity: bytes.
            penalty: of the total size, not falling; infinite beyond what is allowed.
        """
        return max(self._prefix(capacity, penalty), self._single(capacity, penalty), key=_value)

    def improve(self, choice: Choice, bound: float, capacity: float, penalty: Penalty) -> Choice:
        """Fill what greedy left, then search, until the choice is within :data:`GAP` of a bound.

        Args:
            choice: of :meth:`greedy`.
            bound: of :meth:`bound`.
            capacity: bytes.
            penalty: of the total size, not falling; infinite beyond what is allowed.
        """
        for attempt in (self._filled, self._search):
            if bound - choice.value <= GAP * abs(bound):
                break
            choice = max(choice, attempt(capacity, penalty), key=_value)
        return choice

    def _prefix(self, capacity: float, penalty: Penalty) -> Choice:
        choices = []
        for order in self._orders:
            fits = int(np.searchsorted(order.memory, capacity, side="right")) - 1
            choices.append(self._taken(order, np.arange(fits), penalty))
        return max(choices, key=_value)

    def _filled(self, capacity: float, penalty: Penalty) -> Choice:
        """Greedy, but an increment that does not fit is passed over instead of being the end."""
        choices = []
        for order in self._orders:
            prices = np.diff(order.memory).tolist()
            picked, taken, left = [0] * len(self._allowed), [], capacity
            steps = zip(order.weight.tolist(), order.column.tolist(), order.before.tolist(), strict=True)
            for index, (weight, column, before) in enumerate(steps):
                if prices[index] <= left and picked[weight] == before:
                    picked[weight] = column
                    left -= prices[index]
                    taken.append(index)
            choices.append(self._taken(order, np.array(taken, np.intp), penalty))
        return max(choices, key=_value)

    def _taken(self, order: _Order, steps: Indices, penalty: Penalty) -> Choice:
        """The most valuable of all beginnings of a sequence of increments."""
        picks = np.zeros(len(self._allowed), np.intp)
        if not len(steps):
            return Choice(picks, -np.inf)
        values = np.diff(order.gain)[steps].cumsum() - penalty(np.diff(order.size)[steps].cumsum())
        length = int(values.argmax()) + 1
        # Increments of a weight come in order, so the highest column is the last one taken.
        np.maximum.at(picks, order.weight[steps[:length]], order.column[steps[:length]])
        return Choice(picks, float(values[length - 1]))

    def _order(self, weight: Indices, column: Indices, before: Indices) -> _Order:
        sums = [
            np.concatenate([np.zeros(1), np.cumsum(table[weight, column] - table[weight, before])])
            for table in self._tables
        ]
        return _Order(weight, column, before, *sums)

    def _single(self, capacity: float, penalty: Penalty) -> Choice:
        gain, memory, size = (table[:, 1:] for table in self._tables)
        values = gain - penalty(size.ravel()).reshape(size.shape)
        values[(memory > capacity) | ~self._allowed[:, None]] = -np.inf
        row, column = np.unravel_index(int(values.argmax()), values.shape)
        picks = np.zeros(len(self._allowed), np.intp)
        picks[row] = column + 1
        return Choice(picks, float(values[row, column]))

    def _search(self, capacity: float, penalty: Penalty) -> Choice:
        """Extend partial choices weight by weight and keep those that no other dominates.

        Exact while at most :data:`_MAX_LABELS` remain; beyond that, labels of nearly equal gain are merged.
        """
        labels = np.zeros((1, 3))  # gain, memory, size
        table = np.stack(self._tables, axis=2)
        rows = np.flatnonzero(self._allowed)
        total = float(table[rows, -1, 0].sum())
        history: list[tuple[Indices, Indices]] = []
        for row in rows:
            grown = (labels[:, None] + table[row][None]).reshape(-1, 3)
            fits = np.flatnonzero((grown[:, 1] <= capacity) & np.isfinite(penalty(grown[:, 2])))
            kept = fits[_undominated(grown[fits], total)]
            history.append((kept // table.shape[1], kept % table.shape[1]))
            labels = grown[kept]
        values = labels[:, 0] - penalty(labels[:, 2])
        values[labels[:, 2] == 0] = -np.inf  # a plan adapts something
        label = int(values.argmax())
        value, picks = float(values[label]), np.zeros(len(self._allowed), np.intp)
        for row, (parents, columns) in zip(rows[::-1], reversed(history), strict=True):
            picks[row] = columns[label]
            label = int(parents[label])
        return Choice(picks, value)


def _value(choice: Choice) -> float:
    return choice.value


def _steps(gain: Floats, cost: Floats) -> tuple[Indices, Indices, Indices]:
    """Row, column and column before of the increments along every row's upper concave hull, the densest first."""
    steps = [
        (-density, row, column, before)
        for row in range(len(cost))
        for density, column, before in _hull(gain[row].tolist(), cost[row].tolist())
    ]
    steps.sort()
    rows, columns, befores = (np.array([step[i] for step in steps], np.intp) for i in (1, 2, 3))
    return rows, columns, befores


def _hull(gain: list[float], cost: list[float]) -> list[tuple[float, int, int]]:
    """Density, column and column before of the increments along the upper concave hull of one row."""
    corners = [0]
    for column in range(1, len(gain)):
        if gain[column] <= gain[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2:]
            if (gain[b] - gain[a]) * (cost[column] - cost[b]) > (gain[column] - gain[b]) * (
                cost[b] - cost[a]
            ):
                break
            corners.pop()
        corners.append(column)
    return [((gain[b] - gain[a]) / (cost[b] - cost[a]), b, a) for a, b in itertools.pairwise(corners)]


def _undominated(labels: Floats, total_gain: float) -> Indices:
    """Indices of labels worth extending: from the highest gain down, those that set a new low in memory or size.

    Memory and size rise together, so next to nothing that could win is lost between the two.
    """
    order = np.lexsort((labels[:, 2], labels[:, 1], -labels[:, 0]))
    kept = order[_new_low(labels[order, 1]) | _new_low(labels[order, 2])]
    if len(kept) <= _MAX_LABELS:
        return kept
    bucket = np.floor(labels[kept, 0] / total_gain * (_MAX_LABELS // 2)).astype(np.intp)
    cheapest = {}
    for column in (1, 2):
        ranked = kept[np.lexsort((labels[kept, column], bucket))]
        cheapest[column] = ranked[np.unique(np.sort(bucket), return_index=True)[1]]
    return np.union1d(cheapest[1], cheapest[2])


def _new_low(values: Floats) -> NDArray[np.bool_]:
    before = np.concatenate([np.full(1, np.inf), np.minimum.accumulate(values)[:-1]])
    return values < before
