"""The judge: sketches of a round's replies in, who is kept and how much of each out; pure torch.

A round is judged in five steps. *Predict* every client's direction from its own and the global history. *Measure* how
each reply differs (:mod:`fedllm.strategies.vert.select`). *Keep* those within the yardstick, or the ``keep`` nearest to
it. *Hold the course*: what is kept must together agree with the way that training has gone, and must not point away
from a trusted update if there is one (:mod:`fedllm.strategies.vert.course`). *Learn* from the accepted replies only.

If nobody lies within the yardstick nobody is kept: either all are hostile, or training itself has turned. The yardstick
is then half as wide again in the next round, and so on, so that those who are nearest to expectation come back first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fedllm.strategies.vert.course import Course, towards
from fedllm.strategies.vert.evidence import Evidence
from fedllm.strategies.vert.history import COPY, History
from fedllm.strategies.vert.predict import Ladder, without_own
from fedllm.strategies.vert.select import FEATURES, FOREIGN_LOG_SIZE, Yardstick, against_root, twins
from fedllm.strategies.vert.sketch import Sketch
from torch import Tensor
from torch.nn import functional as F

_WIDEN, _TURN = 1.5, 1.2
"""How much wider the yardstick, and the bound of the course, get with every round that keeps nobody. The yardstick
gives way first: honest replies that it was too narrow for come back before hostile ones can pull training around."""
_UNTELLING, _MOST = 0.2, 10.0
"""What such a round counts if only clients took part that are not known to stand out from the hostile, and what all
such rounds in a row count at most."""
_NEWEST = 0.2
"""Share of the newest round in what speaks for a client."""


@dataclass(frozen=True)
class Judgement:
    """What became of the replies of one round, in the order in which they were given.

    Attributes:
        factors: ``[n]``; 0: rejected, 1: kept as it is, between: kept with its update scaled down to a common norm.
        scores: ``[n]`` cosine between prediction and update; 0 where nothing was predicted.
        distances: ``[n]``; above 1 a reply lies outside of what is expected.
        predictor: which rung of the ladder predicted.
    """

    factors: Tensor
    scores: Tensor
    distances: Tensor
    predictor: str

    @property
    def kept(self) -> Tensor:
        """``[n]`` bool."""
        return self.factors > 0


class Detector:
    """VERT in its default form: everything that lasts from round to round.

    Args:
        size: length of the sketches.
        keep: replies to keep: a number from 1, a share below 1, or 0 for as many as lie within expectation.
        warm_up: first rounds, in which everybody is trusted unless there is a trusted update.
        window: directions remembered of each client.
        clip: norms above this multiple of the accepted replies' median are scaled down to it.
        clients: clients that are remembered.
        seed: of the learning predictors.
    """

    def __init__(
        self,
        size: int,
        *,
        keep: float = 0.0,
        warm_up: int = 2,
        window: int = 4,
        clip: float = 1.5,
        clients: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.keep, self.warm_up, self.clip = keep, warm_up, clip
        self._history = History(size, len(FEATURES), window, clients)
        self._ladder = Ladder(seed)
        self._yardstick, self._strangers = Yardstick(), Yardstick(FOREIGN_LOG_SIZE)
        self._course = Course()
        self._of_strangers, self._since_crowd = Evidence(_NEWEST, clients), Evidence(_NEWEST, clients)
        self._judged, self._skipped = 0, 0.0
        self._again: float | None = None

    def judge(
        self,
        server_round: int,
        clients: Sequence[str],
        sketches: Tensor,
        norms: Tensor,
        root: Sketch | None = None,
    ) -> Judgement:
        """Judge the replies of a round and learn from those that are kept.

        Args:
            server_round: the round.
            clients: names, each once.
            sketches: ``[n, size]``.
            norms: of the whole updates, ``[n]``.
            root: a trusted update.
        """
        directions = F.normalize(sketches, dim=1)
        trusted = None if root is None else F.normalize(root.vector, dim=0)
        inputs = self._history.inputs(clients, trusted)
        alone = (self._ladder.predict(without_own(inputs), "temporal") * directions).sum(1)
        against = self._against(clients, alone)
        known = self._history.rounds(clients) > 0
        scores = torch.where(known, (self._ladder.predict(inputs) * directions).sum(1), alone)
        begins, evidence = self._judged < self.warm_up, list[tuple[list[str], Tensor]]()
        twin = twins(directions, scores, settle=begins and root is not None)
        features = torch.stack([scores, norms.clamp_min(1e-30).log(), twin], 1)
        if begins and root is not None and trusted is not None:
            # Few rounds say less of a client than a trusted update does.
            distances = against_root(directions @ trusted, features, root.norm)
        else:
            distances, evidence = self._distances(clients, features, directions, alone, known, against)
        again = self._history.likeness(clients, directions)
        distances[(norms == 0) | ((again > COPY) & (self._again is not None and self._again < COPY))] = (
            math.inf
        )
        predictor = self._ladder.chosen
        kept = self._select(distances, everybody=begins and root is None)
        if not begins:
            kept = self._course.hold(kept, directions, _TURN**self._skipped)
        if trusted is not None:
            kept = towards(trusted, kept, directions)
        factors = self._clipped(kept, norms, self._history.rounds(clients))
        if bool(kept.any()):
            self._skipped = 0.0
            self._learn(server_round, clients, kept, inputs, directions, features, alone)
            self._learn_likeness(again[kept & known])
            self._course.learn(directions[kept])
            for names, surplus in evidence:
                self._since_crowd.weigh(names, surplus)
        else:
            self._relieve(clients)
        return Judgement(factors, scores, distances, predictor)

    def _against(self, clients: Sequence[str], alone: Tensor) -> Tensor:
        """Against whom all that they have sent speaks, ``[n]`` bool.

        A client that was never accepted must not get in by chance in one of many rounds.
        """
        if self._strangers.level is None:
            return torch.zeros(len(clients), dtype=torch.bool)
        self._of_strangers.weigh(clients, alone - self._strangers.level[0] / 2)
        return self._of_strangers.of(clients) < 0

    def _distances(
        self,
        clients: Sequence[str],
        features: Tensor,
        directions: Tensor,
        alone: Tensor,
        known: Tensor,
        against: Tensor,
    ) -> tuple[Tensor, list[tuple[list[str], Tensor]]]:
        """From what is expected ``[n]``: of a client with a history, or of one that only the others can speak for.

        Returns:
            the distances; names and what the round says of them, if it is worth remembering.
        """
        offsets, evidence = self._history.offsets(clients), list[tuple[list[str], Tensor]]()
        distances = torch.zeros(len(clients))
        for yardstick, ours in ((self._yardstick, known), (self._strangers, ~known)):
            names = [name for name, is_ours in zip(clients, ours.tolist(), strict=True) if is_ours]
            distances[ours], surplus = self._measured(
                yardstick, names, features[ours], offsets[ours], directions[ours], alone[ours]
            )
            evidence += [] if surplus is None else [(names, surplus)]
        return torch.where(~known & against, distances + 1, distances), evidence

    def _measured(
        self,
        yardstick: Yardstick,
        clients: Sequence[str],
        features: Tensor,
        offsets: Tensor,
        directions: Tensor,
        alone: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Distances ``[n]`` by a yardstick; a crowd of low scores is hostile, unless it follows the course.

        From the first hostile crowd on it is counted who stands out from it. Honest scores may sink for a round, and
        hostile ones come near by chance: whoever has stood out so far does not go with a later crowd, and the others
        stay hostile where there is none.

        Returns:
            the distances, and by how much each stood out ``[n]``, if there is or was a crowd.
        """
        standing, scores = self._since_crowd.of(clients), features[:, 0] - offsets[:, 0]
        crowd = yardstick.crowd(scores)
        unsuspected = crowd & (standing >= 0)
        carried = torch.zeros_like(crowd)
        carried[unsuspected] = self._course.carries(directions[unsuspected])
        distances = yardstick.distances(features, offsets, carried)
        strays, stood_out = crowd & (standing <= 0) & ~carried, None
        if bool(strays.all()):
            # A crowd of all says nothing of anybody: it is the level that has moved, the honest ones are among them.
            strays = torch.zeros_like(strays)
        elif yardstick.level is not None and (bool((crowd & ~carried).any()) or len(self._since_crowd)):
            half = yardstick.level[0].clamp_min(0) / 2
            # The past of a client that was away for long, or rejected, says little of it.
            surplus = torch.maximum(scores, alone) - half
            # Whoever is with the crowd does not stand out from it, also above the half; the hostile may live it down.
            surplus = torch.where(crowd & ~carried & (standing >= 0), surplus.clamp_max(0), surplus)
            # A round speaks no louder against a client than one as expected speaks for it.
            stood_out = torch.maximum(surplus, torch.where(carried, 0.0, -half))
        return distances + (strays | (standing < 0)).float(), stood_out

    def _relieve(self, clients: Sequence[str]) -> None:
        """Note a round that kept nobody.

        If nobody took part of whom it is known that it stands out from the hostile, the round says little about
        whether training has turned, and the yardstick is not to widen for the hostile alone.
        """
        telling = len(self._since_crowd) == 0 or bool((self._since_crowd.of(clients) > 0).any())
        self._skipped = min(_MOST, self._skipped + (1.0 if telling else _UNTELLING))

    def _learn_likeness(self, again: Tensor) -> None:
        """How like its own last updates an accepted reply usually is; gradients of whole data sets hardly change."""
        if len(again):
            newest = float(again.median())
            self._again = newest if self._again is None else (self._again + newest) / 2

    @property
    def nbytes(self) -> int:
        """Bytes of the history."""
        return self._history.nbytes

    def _select(self, distances: Tensor, everybody: bool) -> Tensor:
        if everybody:
            return torch.isfinite(distances)
        if self.keep == 0:
            return distances <= float(_WIDEN**self._skipped)
        count = int(self.keep) if self.keep >= 1 else math.ceil(self.keep * len(distances) - 1e-9)
        kept = torch.zeros(len(distances), dtype=torch.bool)
        kept[distances.argsort(stable=True)[:count]] = True
        return kept & torch.isfinite(distances)

    def _clipped(self, kept: Tensor, norms: Tensor, rounds: Tensor) -> Tensor:
        """Factors ``[n]``: what is usual is told by the kept, each as much as the rounds ``[n]`` it was kept in before.

        Newcomers could be many, and set the size to which all are clipped.
        """
        if not bool(kept.any()):
            return torch.zeros_like(norms)
        weights = rounds[kept] if bool(rounds[kept].any()) else torch.ones(int(kept.sum()))
        limit = self.clip * _weighted_median(norms[kept], weights)
        return torch.where(kept, (limit / norms.clamp_min(1e-30)).clamp_max(1.0), 0.0)

    def _learn(
        self,
        server_round: int,
        clients: Sequence[str],
        kept: Tensor,
        inputs: Tensor,
        directions: Tensor,
        features: Tensor,
        alone: Tensor,
    ) -> None:
        names = [name for name, is_kept in zip(clients, kept.tolist(), strict=True) if is_kept]
        features, known = features[kept], self._history.rounds(names) > 0
        deviations = torch.zeros(len(names), len(FEATURES))
        if bool(inputs.any()):  # where nothing was predicted the scores say nothing
            # What a stranger must be like is learned from all of them, as if they had no history.
            common = torch.cat([alone[kept, None], features[:, 1:]], 1)
            self._strangers.learn(common, torch.zeros_like(common))
        if bool(known.any()):
            offsets = self._history.offsets(names)
            deviations[known] = self._yardstick.learn(features[known], offsets[known])
        self._ladder.learn(inputs[kept], directions[kept])
        self._history.remember(server_round, names, directions[kept], deviations)
        self._judged += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that later judgements depend on."""
        return {
            "history": self._history.state_dict(),
            "ladder": self._ladder.state_dict(),
            "yardstick": self._yardstick.state_dict(),
            "strangers": self._strangers.state_dict(),
            "course": self._course.state_dict(),
            "of_strangers": self._of_strangers.state_dict(),
            "since_crowd": self._since_crowd.state_dict(),
            "judged": self._judged,
            "skipped": self._skipped,
            "again": self._again,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._history.load_state_dict(state["history"])
        self._ladder.load_state_dict(state["ladder"])
        self._yardstick.load_state_dict(state["yardstick"])
        self._strangers.load_state_dict(state["strangers"])
        self._course.load_state_dict(state["course"])
        self._of_strangers.load_state_dict(state["of_strangers"])
        self._since_crowd.load_state_dict(state["since_crowd"])
        self._judged, self._skipped, self._again = state["judged"], state["skipped"], state["again"]


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The lowest of values ``[n]`` that has half of the weights ``[n]`` at or below it."""
    order = values.argsort()
    reached = weights[order].double().cumsum(0)
    return values[order[int((reached >= reached[-1] / 2).nonzero()[0, 0])]]
