"""Rivals as wrappers around any strategy: rules that choose or weigh clients, decided on sketches.

A rule that weighs clients unequally scales their updates, so that the inner strategy's mean gives the rule's result
where all clients count alike; where they count by their examples, the weights multiply. Rules that mix coordinates
stand in :mod:`.coordinates`, those that follow clients through rounds in :mod:`.following`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

import torch
from fedllm.strategies.filtering import Cohort, ReplyFilter, Verdict
from fedllm.strategies.robust import rules
from fedllm.strategies.trusted import RootedFilter, RootUpdate
from flwr.serverapp.strategy import Strategy
from pydantic import Field
from torch import Tensor

from fedllm.errors import PlanError
from fedllm.seeding import derive_seed


class WeighingFilter(ReplyFilter):
    """Base: weights of a round's updates, relative to an equal share each."""

    @abstractmethod
    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Weights ``[n]``; an update of weight 0 is rejected."""

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Scale the kept updates so that their mean is the rule's weighted sum."""
        weights = self.weights(server_round, cohort)
        return Verdict(weights * int((weights > 0).sum()), weights)


class AgainstShare(ReplyFilter):
    """Base of the rules that allow for a share of attackers.

    Args:
        inner: any Flower strategy.
        attackers: share of the clients that the rule allows for; below a half.
        kwargs: keywords of the next base.
    """

    def __init__(
        self, inner: Strategy, *, attackers: Annotated[float, Field(ge=0, lt=0.5)] = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._share = attackers

    def attackers(self, cohort: Cohort) -> int:
        """F for this round."""
        # 0.29 · 100 is 28.999… in floating point.
        return int(self._share * len(cohort.clients) + 1e-9)


class Krum(AgainstShare, WeighingFilter):
    """Krum: the one update nearest to its neighbours (arXiv 1703.02757)."""

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """1 for one client."""
        return rules.krum_weights(cohort.sketches, self.attackers(cohort))


class MultiKrum(AgainstShare, WeighingFilter):
    """Multi-Krum: the mean of the n − f updates nearest to their neighbours (arXiv 1703.02757)."""

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Equal for the chosen."""
        return rules.multi_krum_weights(cohort.sketches, self.attackers(cohort))


class DivideAndConquer(AgainstShare, WeighingFilter):
    """DnC: without the updates furthest out along the top singular vector (Shejwalkar and Houmansadr, NDSS 2021)."""

    def __init__(self, inner: Strategy, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(inner, seed=seed, **kwargs)
        self._seed = seed

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Equal for those that pass."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, server_round, "dnc"))
        sample = max(1, self.sketcher.size // 2)
        return rules.dnc_weights(cohort.sketches, self.attackers(cohort), generator, sample=sample)


class GeometricMedian(WeighingFilter):
    """Geometric median of the updates, by Weiszfeld's weights (arXiv 1912.13445)."""

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Inverse to the distance from the median."""
        return rules.geometric_median_weights(cohort.sketches)


class NormBound(WeighingFilter):
    """Norms above the round's median are scaled down to it (arXiv 1911.07963).

    Args:
        inner: any Flower strategy.
        multiple: of the median.
        kwargs: keywords of :class:`fedllm.strategies.filtering.ReplyFilter`.
    """

    def __init__(
        self, inner: Strategy, *, multiple: Annotated[float, Field(gt=0)] = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._multiple = multiple

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Factors over n."""
        bound = self._multiple * float(cohort.norms.median())
        return rules.norm_bound_factors(cohort.norms, bound) / len(cohort.clients)


class FLTrust(RootedFilter, WeighingFilter):
    """FLTrust: weights by the agreement with a trusted update, norms as that one's (Cao et al., NDSS 2021, eq. 2 to 4).

    Args:
        inner: any Flower strategy.
        root_examples: so many of the server's test rows are trusted; 100 in the paper.
        sketch_size: numbers that stand for an update.
        seed: of the sketches.
        root: trusted update as a function instead of ``root_examples``.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        root_examples: Annotated[int, Field(ge=1)] = 100,
        sketch_size: Annotated[int, Field(ge=16)] = 512,
        seed: int = 0,
        root: RootUpdate | None = None,
    ) -> None:
        super().__init__(inner, root_examples=root_examples, root=root, sketch_size=sketch_size, seed=seed)

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Nobody in a round whose trusted update is of no use: there is nothing to compare with."""
        if self.root is not None and self.root_sketch is None:
            nobody = torch.zeros(len(cohort.clients))
            return Verdict(nobody, nobody, reason="FLTrust has no trusted update in this round")
        return super().judge(server_round, cohort)

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Cosines above 0, over their sum and the updates' norms.

        Raises:
            PlanError: there is no trusted update: outside of a fedllm run ``root`` must be given.
        """
        if self.root_sketch is None:
            raise PlanError("FLTrust has no trusted update: give root, or run by fedllm with root-examples")
        root = self.root_sketch
        return rules.fltrust_weights(cohort.sketches, cohort.norms, root.vector, root.norm)
