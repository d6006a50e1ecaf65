"""Who is kept: how far each reply's features lie from what honest ones have been like, and where the line is drawn.

Three features of every reply are judged, each against its level among the replies accepted so far and against how the
client usually differs from that level:

======  =====================================================================  =================
feature what                                                                   suspicious if
======  =====================================================================  =================
score   cosine between the predicted and the actual direction                  too low, too high
size    logarithm of the update's norm                                         too low, too high
twin    largest cosine to another reply of the round                           too high
======  =====================================================================  =================

Size and twin find what a direction alone cannot: an honest mean that was shrunk (Min-Max), colluders that all send one
vector inside the honest spread (ALIE); of exact copies all go but the original, if one is told by its history. A score
that is too high is a replay. The levels move with training, for instance because gradients shrink; a tolerance for that
is part of the yardstick, and it is what an adaptive attacker can use.

Where noise dominates, honest scores scatter around a small level and the yardstick alone would admit noise. A count
decides then: if many more replies lie below half of the level than honest scatter explains, they are a crowd, together
with those nearer to them than to the level. It goes, apart from those who follow the course of training, as honest
replies do whose scores sink because training settles, and those who stood out from such crowds in rounds before. All of
this is ours, not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch
from fedllm.strategies.vert.history import COPY
from torch import Tensor

FEATURES = ("score", "size", "twin")
_TOLERANCE = torch.tensor([0.20, 0.45, 0.15])
_FLOOR = torch.tensor([0.02, 0.04, 0.02])
_SIGMAS = 4.0
_BLEND = 0.5
FOREIGN_LOG_SIZE = math.log(4)
"""By how much a size may differ from a trusted update's, and a stranger's from what is expected, whatever scatters; a
shift that nearly all strangers share, a factor of 2 at most, comes on top."""
_COHORT, _SHIFT = 3, math.log(2)
_ORIGINAL = 0.02
"""How much better than all of its copies an original is predicted at least; a lost original is a lost client."""


class Yardstick:
    """Level and spread of the features among accepted replies.

    Args:
        most_size: bound of what is allowed in size, as a logarithm, however sizes scatter.
    """

    def __init__(self, most_size: float = math.inf) -> None:
        self._most_size = most_size
        self.level: Tensor | None = None
        self.spread = torch.zeros(len(FEATURES))

    def distances(self, features: Tensor, offsets: Tensor, carried: Tensor | None = None) -> Tensor:
        """How far each reply is from what is expected of it, ``[n]``; above 1 is suspicious, infinite a copy.

        Args:
            features: ``[n, 3]`` in the order of :data:`FEATURES`.
            offsets: how each client usually differs from the level, ``[n, 3]``.
            carried: whose scores have sunk for a reason, ``[n]`` bool: what is usual among them is expected of them.
        """
        if self.level is None or len(features) == 0:
            return torch.zeros(len(features))
        deviation = features - self.level - offsets
        if carried is not None and bool(carried.any()):
            deviation[carried, 0] -= deviation[carried, 0].median().clamp_max(0)
        higher, lower = common_shift(deviation)
        rest = deviation - higher - lower
        allowed = _SIGMAS * torch.maximum(self.spread, _FLOOR) + _TOLERANCE
        allowed[1] = allowed[1].clamp_max(self._most_size)
        # However wide the scatter, a score may not be clearly negative where it was clearly positive; and that it sinks
        # is suspicious whatever the others' do.
        sunk = -deviation[:, 0] / allowed[0].clamp_max(max(float(self.level[0]) + 0.05, 0.25))
        distances = torch.stack(
            [sunk, rest[:, 0] / allowed[0], rest[:, 1].abs() / allowed[1], rest[:, 2] / allowed[2]], 1
        ).amax(1)
        distances = distances.clamp_min(0)
        if float(self.level[2] + _SIGMAS * self.spread[2]) < COPY:
            distances[features[:, 2] > COPY] = math.inf
        return distances

    def crowd(self, scores: Tensor) -> Tensor:
        """Whose scores ``[n]`` (less offsets) are below half of the level, if too many for honest scatter, or nobody's.

        With them are those who are nearer to them than to the level, and beyond twice the honest spread of it.
        """
        nobody = torch.zeros(len(scores), dtype=torch.bool)
        if self.level is None:
            return nobody
        level, spread = float(self.level[0]), float(torch.maximum(self.spread, _FLOOR)[0])
        below = scores < level / 2
        share = NormalDist().cdf(-level / 2 / spread)
        scatter = math.sqrt(len(scores) * share * (1 - share))
        if level <= 0 or int(below.sum()) <= len(scores) * share + 2 * scatter + 2:
            return nobody
        between = (float(scores[below].median()) + level) / 2
        found = scores < max(level / 2, min(between, level - 2 * spread))
        return below if bool(found.all()) else found

    def learn(self, features: Tensor, offsets: Tensor) -> Tensor:
        """Move towards the accepted replies of a round; returns their deviations from its level, ``[n, 3]``."""
        level = (features - offsets).median(0).values
        deviations = features - level
        spread = (features - offsets - level).abs().median(0).values * 1.4826
        if self.level is None:
            self.level, self.spread = level, spread
        else:
            self.level = self.level + _BLEND * (level - self.level)
            self.spread = self.spread + _BLEND * (spread - self.spread)
        return deviations

    def state_dict(self) -> dict[str, Any]:
        """Tensors."""
        return {"spread": self.spread} | ({} if self.level is None else {"level": self.level})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.level, self.spread = state.get("level"), state["spread"]


def common_shift(deviation: Tensor) -> tuple[Tensor, Tensor]:
    """By how much nearly all of a round's replies ``[n, 3]`` lie above, or below, what was expected, ``[3]`` each.

    Clients that find a direction together agree more, are predicted better and move further, all at once: that is no
    reason to reject them. A tenth may be out of line. Sizes are allowed a factor of 2, for all may be hostile.
    """
    n = len(deviation)
    nothing = torch.zeros(len(FEATURES))
    if n < _COHORT:
        return nothing, nothing
    ordered, spare = deviation.sort(0).values, math.ceil(n / 10) - 1
    higher, lower = ordered[spare].clamp_min(0), ordered[n - 1 - spare].clamp_max(0)
    higher[1], lower[1] = higher[1].clamp_max(_SHIFT), lower[1].clamp_min(-_SHIFT)
    return higher, lower * torch.tensor([0.0, 1.0, 0.0])


def against_root(scores: Tensor, features: Tensor, root_norm: float) -> Tensor:
    """Distances ``[n]`` in the first rounds, when a trusted update is the best there is to compare with.

    Expected are a positive cosine of at least a third of the best one's (a client with few labels agrees less), a norm
    within a factor of 4 of the trusted one's, and no copies.

    Args:
        scores: cosines ``[n]`` to the trusted update.
        features: ``[n, 3]`` in the order of :data:`FEATURES`.
        root_norm: the trusted update's.
    """
    _, sizes, twin = features.T
    off = (sizes - math.log(max(root_norm, 1e-30))).abs() / FOREIGN_LOG_SIZE
    plausible = (off <= 1) & (twin <= COPY)
    best = float(scores[plausible].max()) if bool(plausible.any()) else 0.0
    if best <= 0:
        distances = torch.full_like(scores, 2.0)
    else:  # a score of the best is at distance 0, a third of it at 1
        distances = torch.maximum(1.5 * (1 - scores / best), off).clamp_min(0)
        distances = torch.where(plausible, distances, distances + 1)
    distances[twin > COPY] = math.inf
    return distances


def twins(directions: Tensor, scores: Tensor, settle: bool = False) -> Tensor:
    """Largest cosine of each direction ``[n, q]`` to another one, ``[n]``; 0 for a lone reply.

    Of replies that are copies of one vector, the one whose own history predicts it better than that of any other is
    taken for the original, and the copies do not count against it: of a vector that many send, one at most is kept.

    Args:
        directions: ``[n, q]`` of norm 1.
        scores: cosines to what was predicted, ``[n]``.
        settle: where no history tells the original, the first of the copies stands for all of them.
    """
    if len(directions) < 2:
        return torch.zeros(len(directions))
    cosines = (directions @ directions.T).fill_diagonal_(-1)
    for index in (cosines.amax(1) > COPY).nonzero()[:, 0].tolist():
        copies = cosines[index] > COPY
        margin = scores[index] - scores[copies].max()
        first = settle and index < int(copies.nonzero()[0, 0])
        if bool(margin > _ORIGINAL) or (first and bool(margin >= -_ORIGINAL)):
            cosines[index, copies] = -1
    return cosines.amax(1)
