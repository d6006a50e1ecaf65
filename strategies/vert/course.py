"""The course of training: what all accepted replies together must still agree with, over many rounds.

The yardstick looks at one reply in one round. Colluders who know it can stay just within it, move it a little in every
round, and so turn training around step by step. This is the bound on the sum of such steps (ours): a slow mean of the
accepted directions, and how well what the replies have in common usually agrees with it. Where that of the kept falls
below four fifths of the usual (of what the best quarter reaches, if that is less) by more than noise explains, or below
half of it, those that agree least are left out until it does not. Both are slow, so that a majority cannot move them as
it moves the yardstick; a gradual decline, as training has it, they follow.

Of k replies with directions d, the common part μ is what is left without noise: |μ|² = (k·|d̄|² − 1) / (k − 1), the mean
cosine between two of them, whatever k is. So a few replies can be held to what many have shown, and noise that grows as
training settles is nobody's fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_DIRECTION, _USUAL = 0.15, 0.1
"""Shares of the newest round in the slow mean and in the usual agreement."""
_SHARE, _ANYWAY, _CARRIED = 0.8, 0.5, 0.6
"""Shares of the usual agreement: what the kept must reach but for their noise, and however noisy they are; and what a
crowd of low scores that is only noisy must reach."""
_LEAST, _NOISE = 0.2, 0.01
"""Usual agreement below which there is no course to hold; cosine of two replies below which they are only noise."""
_SIGMAS = 2.0
"""Of a sketch's noise, which counts against nobody."""


class Course:
    """Slow mean ``[q]`` of the accepted directions, the usual agreement with it, and the usual |μ|²."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._usual: float | None = None
        self._alike = 0.0

    def agreement(self, directions: Tensor) -> Tensor:
        """Cosines ``[n]`` of directions ``[n, q]`` to the course; 0 as long as there is none."""
        if self._mean is None:
            return torch.zeros(len(directions))
        return directions @ F.normalize(self._mean, dim=0)

    def hold(self, kept: Tensor, directions: Tensor, relief: float) -> Tensor:
        """Who is still kept, ``[n]`` bool; nobody if even the best agreement is too low.

        Args:
            kept: who would be kept otherwise.
            directions: ``[n, q]`` of norm 1.
            relief: from 1 on; the larger, the lower the bound, below 0 too, for training may really have turned.
        """
        if self._usual is None or self._usual < _LEAST:
            return kept
        held = torch.zeros_like(kept)
        agreement = self.agreement(directions)
        order = [index for index in agreement.argsort(descending=True, stable=True).tolist() if kept[index]]
        alike = _alike(directions[order])
        alike[:1] = self._alike  # a lone reply does not tell its noise
        means = agreement[order].cumsum(0) / torch.arange(1, len(order) + 1)
        best = float(self._denoised(means[math.ceil(len(order) / 4) - 1], alike[-1])) if order else 0.0
        floor = self._needed(alike, directions.shape[1], best) + (1 - relief) * self._usual
        enough = (self._denoised(means, alike) >= floor).nonzero()[:, 0].tolist()
        if enough:
            held[order[: enough[-1] + 1]] = True
        return held

    def carries(self, crowd: Tensor) -> Tensor:
        """Which of a crowd's directions ``[n, q]`` follow the course however noisy each is, ``[n]`` bool.

        All, if what they have in common follows it; else the part of them that agrees most, as honest replies do
        beside hostile ones, if that is true of it.
        """
        agreement = self.agreement(crowd)
        for part in (torch.ones(len(crowd), dtype=torch.bool), upper_part(agreement)):
            if self._follows(crowd[part], agreement[part]):
                return part
        return torch.zeros(len(crowd), dtype=torch.bool)

    def _follows(self, directions: Tensor, agreement: Tensor) -> bool:
        if self._usual is None or self._usual < _LEAST or len(directions) < 2:
            return False
        found = self._denoised(agreement.mean(), _alike(directions)[-1])
        return float(found) >= _CARRIED * self._usual

    def learn(self, directions: Tensor) -> None:
        """Move towards the accepted directions ``[n, q]`` of a round; begin anew if they needed relief."""
        if self._mean is not None and len(directions) > 1:
            alike = _alike(directions)[-1]
            found = float(self._denoised(self.agreement(directions).mean(), alike))
            if self._usual is not None and self._usual >= _LEAST and found < _ANYWAY * self._usual:
                self._mean, self._usual, self._alike = directions.mean(0), None, 0.0
                return
            if self._usual is None:
                self._usual, self._alike = found, float(alike)
            self._usual += _USUAL * (found - self._usual)
            self._alike += _USUAL * (float(alike) - self._alike)
        newest = directions.mean(0)
        self._mean = newest if self._mean is None else self._mean + _DIRECTION * (newest - self._mean)

    def _needed(self, alike: Tensor, size: int, best: float) -> Tensor:
        """Agreement that the first k of replies must reach, ``[n]``, k = 1 to n: of the usual one, less their noise.

        A client's own noise agrees with the course by chance, by 1/√q in a sketch, and less so the mean of many. Where
        even the quarter that agrees best agrees less than usual, it is training that turns.
        """
        k = torch.arange(1, len(alike) + 1)
        noise = (size * k).rsqrt() / self._length(alike)
        usual = self._usual or 0.0
        return (_SHARE * min(usual, best) - _SIGMAS * noise).clamp_min(_ANYWAY * usual)

    def _denoised(self, mean_cosine: Tensor, alike: Tensor) -> Tensor:
        """Cosine between the course and what replies have in common, from the mean of their own cosines to it."""
        return (mean_cosine / self._length(alike)).clamp(-1, 1)

    def _length(self, alike: Tensor) -> Tensor:
        """Of what replies have in common, from the mean cosine between two of them.

        Replies that pull against each other have little in common, too; only a gradual loss counts as noise.
        """
        return alike.clamp_min(max(_NOISE, self._alike / 4)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Mean and usual agreement, where there are any."""
        state: dict[str, Any] = {"mean": self._mean, "usual": self._usual, "alike": self._alike}
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._mean, self._usual = state.get("mean"), state.get("usual")
        self._alike = state["alike"]


def towards(trusted: Tensor, kept: Tensor, directions: Tensor) -> Tensor:
    """Who is still kept so that the mean of all does not point away from a trusted update, ``[n]`` bool.

    Those that agree least with it are left out. A trusted update that has learned its few rows by heart says nothing,
    and what a sketch adds to a cosine is not held against anybody.

    Args:
        trusted: direction ``[q]`` of norm 1.
        kept: who would be kept otherwise.
        directions: ``[n, q]`` of norm 1.
    """
    held = torch.zeros_like(kept)
    agreement = directions @ trusted
    order = [index for index in agreement.argsort(descending=True, stable=True).tolist() if kept[index]]
    sums = directions[order].cumsum(0)
    enough = (sums @ trusted >= -_SIGMAS / len(trusted) ** 0.5 * sums.norm(dim=1)).nonzero()[:, 0].tolist()
    if enough:
        held[order[: enough[-1] + 1]] = True
    return held


def _alike(directions: Tensor) -> Tensor:
    """Mean cosine between two different ones of the first k directions ``[n, q]``, for each k, ``[n]``; 1 for k = 1."""
    k = torch.arange(1, len(directions) + 1)
    lengths = directions.cumsum(0).square().sum(1) / k
    return torch.where(k > 1, (lengths - 1) / (k - 1).clamp_min(1), torch.ones(len(k)))


def upper_part(values: Tensor) -> Tensor:
    """Which values ``[n]`` belong to the upper of two groups, split where the squares within them are least."""
    n = len(values)
    if n < 2:
        return torch.ones(n, dtype=torch.bool)
    order = values.argsort(descending=True, stable=True)
    sums = values[order].double().cumsum(0)
    k = torch.arange(1, n)
    between = sums[:-1].square() / k + (sums[-1] - sums[:-1]).square() / (n - k)
    upper = torch.zeros(n, dtype=torch.bool)
    upper[order[: int(between.argmax()) + 1]] = True
    return upper
