"""Rivals that follow clients through the rounds, as wrappers around any strategy; they judge sketches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from fedllm.strategies.filtering import Cohort, ReplyFilter, Verdict
from fedllm.strategies.robust import temporal
from flwr.serverapp.strategy import Strategy
from pydantic import Field
from torch import Tensor

Share = Annotated[float, Field(gt=0, le=1)]
WarmUp = Annotated[int, Field(ge=2)]
Size = Annotated[int, Field(ge=16)]


class Follower(Protocol):
    """A rule with a memory."""

    def judge(self, clients: Sequence[str], updates: Tensor) -> tuple[Tensor, Tensor]:
        """Who is kept ``[n]`` bool, and the scores ``[n]``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What later rounds depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        ...


class FollowingFilter(ReplyFilter):
    """Base: a rule with a memory says who is kept.

    Args:
        inner: any Flower strategy.
        rule: the rule.
        sketch_size: numbers that stand for an update.
        seed: of the sketches.
    """

    def __init__(self, inner: Strategy, rule: Follower, *, sketch_size: int, seed: int) -> None:
        super().__init__(inner, sketch_size=sketch_size, seed=seed)
        self._rule = rule

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Whom the rule keeps."""
        kept, scores = self._rule.judge(cohort.clients, cohort.sketches)
        return Verdict(kept.float(), scores)

    def own_state(self) -> dict[str, Any]:
        """The rule's memory."""
        return self._rule.state_dict()

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self._rule.load_state_dict(state)


class TemporalCosine(FollowingFilter):
    """No training: cosine to a client's own last updates and the last means, the best are kept (ours, a baseline).

    Args:
        inner: any Flower strategy.
        keep: share of the replies that is kept after the warm-up; 1: all.
        warm_up: first rounds, which are trusted.
        sketch_size: numbers that stand for an update.
        seed: of the sketches.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        keep: Share = 0.5,
        warm_up: WarmUp = 2,
        sketch_size: Size = 512,
        seed: int = 0,
    ) -> None:
        rule = temporal.TemporalCosine(_share(keep), warm_up=warm_up)
        super().__init__(inner, rule, sketch_size=sketch_size, seed=seed)


class Flanders(FollowingFilter):
    """FLANDERS: an autoregression of the matrix of all updates; those nearest to its forecast are kept (2303.16668).

    Args:
        inner: any Flower strategy.
        keep: share of the replies that is kept after the warm-up; 1: all.
        coordinates: numbers of a sketch that are forecast; the paper samples parameters.
        window: rounds that the autoregression is fitted to.
        warm_up: first rounds, which are trusted.
        sketch_size: numbers that stand for an update.
        seed: of sketches and coordinates.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        keep: Share = 0.5,
        coordinates: Annotated[int, Field(ge=1)] = 100,
        window: Annotated[int, Field(ge=2)] = 5,
        warm_up: WarmUp = 2,
        sketch_size: Size = 512,
        seed: int = 0,
    ) -> None:
        rule = temporal.Flanders(_share(keep), coordinates, window, warm_up, seed)
        super().__init__(inner, rule, sketch_size=sketch_size, seed=seed)


class FLDetector(FollowingFilter):
    """FLDetector-style: who strays from what the global trajectory's curvature predicts is left out (2207.09209).

    How the two clusters are told apart, and that a run goes on without the suspicious, is ours.

    Args:
        inner: any Flower strategy.
        window: rounds in the curvature and in the suspicion.
        warm_up: first rounds, which are trusted.
        sketch_size: numbers that stand for an update.
        seed: of the sketches.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        window: Annotated[int, Field(ge=2)] = 10,
        warm_up: WarmUp = 2,
        sketch_size: Size = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, temporal.FLDetector(window, warm_up), sketch_size=sketch_size, seed=seed)


def _share(keep: float) -> float:
    """A share of the replies as the rules take it: 1, which they take for one reply, is all of them here."""
    return math.inf if keep == 1 else keep
