"""Rivals that mix coordinates, as wrappers around any strategy: they make one update of all of a round's.

Every reply then carries that update, so that the inner strategy's mean is the rule's result however it weighs replies.
They need whole updates of equal form: n·d floats, and adapters of one rank, whose factors are plain arrays here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from fedllm.strategies.filtering import Cohort, Verdict, WholeUpdates
from fedllm.strategies.one_form import check_one_form, defences_of_any_form
from fedllm.strategies.robust import rules
from fedllm.strategies.robust.strategy import AgainstShare
from flwr.serverapp.strategy import Strategy
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedllm.config import RunConfig

Mixed = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"]


class CoordinateRule(WholeUpdates):
    """Base: a rule makes one update of all."""

    @staticmethod
    def check_config(config: RunConfig) -> None:
        """Refuse clients of several ranks.

        Raises:
            ConfigError: ``lora.client-ranks`` names more than one.
        """
        check_one_form(config, "defence", config.defence, f"set defence to one of {defences_of_any_form()}")

    @abstractmethod
    def combine(self, cohort: Cohort) -> Tensor:
        """The update ``[d]`` that stands for all; ``cohort.sketches`` are the whole updates ``[n, d]``."""

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Keep every reply with the rule's update in it; the scores are the cosines to that one."""
        update = self.combine(cohort)
        scores = F.cosine_similarity(cohort.sketches, update[None])
        return Verdict(torch.ones(len(cohort.clients)), scores, replacement=update)


class Median(CoordinateRule):
    """Coordinate-wise median (Yin et al., ICML 2018, option I)."""

    def combine(self, cohort: Cohort) -> Tensor:
        """See :func:`fedllm.strategies.robust.rules.median`."""
        return rules.median(cohort.sketches)


class TrimmedMean(AgainstShare, CoordinateRule):
    """Coordinate-wise mean without the f largest and f smallest values (Yin et al., ICML 2018, option II)."""

    def combine(self, cohort: Cohort) -> Tensor:
        """See :func:`fedllm.strategies.robust.rules.trimmed_mean`."""
        return rules.trimmed_mean(cohort.sketches, self.attackers(cohort))


class Bulyan(AgainstShare, CoordinateRule):
    """Bulyan: Krum's choice of n − 2f, then the values around their median (El Mhamdi et al., ICML 2018, section 4)."""

    def combine(self, cohort: Cohort) -> Tensor:
        """See :func:`fedllm.strategies.robust.rules.bulyan`."""
        return rules.bulyan(cohort.sketches, self.attackers(cohort))


class NearestNeighbourMixing(AgainstShare, CoordinateRule):
    """NNM: each update becomes the mean of its n − f nearest, then a rule (Allouah et al., AISTATS 2023, algorithm 2).

    Args:
        inner: any Flower strategy.
        rule: of the mixed updates.
        kwargs: keywords of the next base.
    """

    def __init__(self, inner: Strategy, *, rule: Mixed = "trimmed-mean", **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)
        self._rule: Mixed = rule

    def combine(self, cohort: Cohort) -> Tensor:
        """See :func:`fedllm.strategies.robust.rules.nnm`."""
        f = self.attackers(cohort)
        mixed = rules.nnm(cohort.sketches, f)
        match self._rule:
            case "median":
                return rules.median(mixed)
            case "trimmed-mean":
                return rules.trimmed_mean(mixed, f)
            case "krum":
                return rules.krum_weights(mixed, f) @ mixed
            case "multi-krum":
                return rules.multi_krum_weights(mixed, f) @ mixed
            case "geometric-median":
                return rules.geometric_median_weights(mixed) @ mixed
        return mixed.mean(0)


class CentredClipping(CoordinateRule):
    """Centred clipping around the last round's result (Karimireddy et al., ICML 2021, eq. 3 to 4).

    The paper's radius is a constant to be tuned; here it follows the updates (ours).

    Args:
        inner: any Flower strategy.
        radius: in multiples of the updates' median distance to the centre.
        steps: repetitions in a round.
        seed: not used: nothing is random.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        radius: Annotated[float, Field(gt=0)] = 1.0,
        steps: Annotated[int, Field(ge=1)] = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, seed=seed)
        self._radius, self._steps = radius, steps
        self._centre: Tensor | None = None

    def combine(self, cohort: Cohort) -> Tensor:
        """See :func:`fedllm.strategies.robust.rules.centred_clipping`."""
        updates = cohort.sketches
        centre = self._centre
        if centre is None or len(centre) != updates.shape[1]:
            centre = torch.zeros(updates.shape[1])
        radius = self._radius * float((updates - centre).norm(dim=1).median())
        self._centre = rules.centred_clipping(updates, centre, radius, self._steps)
        return self._centre

    def own_state(self) -> dict[str, Any]:
        """The centre."""
        return {} if self._centre is None else {"centre": self._centre}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self._centre = state.get("centre")
