"""Rivals as wrappers around any strategy: rules that choose or weigh clients, decided on sketches.

A rule that weighs clients unequally scales their updates, so that the inner strategy's mean gives the rule's result
where all clients count alike; where they count by their examples, the weights multiply. Rules that mix coordinates
(median, trimmed mean) are Flower's ``FedMedian`` and ``FedTrimmedAvg``, which go inside.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from fedllm.strategies.filtering import Cohort, ReplyFilter, Verdict
from fedllm.strategies.robust import rules
from fedllm.strategies.robust.temporal import TemporalCosine as TemporalCosineRule
from flwr.serverapp.strategy import Strategy
from pydantic import Field
from torch import Tensor

from fedllm.seeding import derive_seed

Share = Annotated[float, Field(ge=0, lt=1)]


class WeighingFilter(ReplyFilter):
    """Base: weights of a round's updates, relative to an equal share each.

    Args:
        inner: any Flower strategy.
        kwargs: keywords of :class:`fedllm.strategies.filtering.ReplyFilter`.
    """

    def __init__(self, inner: Strategy, **kwargs: Any) -> None:
        super().__init__(inner, **kwargs)

    @abstractmethod
    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Weights ``[n]``; an update of weight 0 is rejected."""

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Scale the kept updates so that their mean is the rule's weighted sum."""
        weights = self.weights(server_round, cohort)
        return Verdict(weights * int((weights > 0).sum()), weights)


class _AgainstShare(WeighingFilter):
    """Base of the rules that allow for a share of attackers.

    Args:
        inner: any Flower strategy.
        attackers: share of the clients that the rule allows for; below a half.
        kwargs: keywords of :class:`fedllm.strategies.filtering.ReplyFilter`.
    """

    def __init__(
        self, inner: Strategy, *, attackers: Annotated[float, Field(ge=0, lt=0.5)] = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._share = attackers

    def attackers(self, cohort: Cohort) -> int:
        """F for this round."""
        return int(self._share * len(cohort.clients))


class Krum(_AgainstShare):
    """Krum: the one update nearest to its neighbours (arXiv 1703.02757)."""

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """1 for one client."""
        return rules.krum_weights(cohort.sketches, self.attackers(cohort))


class MultiKrum(_AgainstShare):
    """Multi-Krum: the mean of the n − f updates nearest to their neighbours (arXiv 1703.02757)."""

    def weights(self, server_round: int, cohort: Cohort) -> Tensor:
        """Equal for the chosen."""
        return rules.multi_krum_weights(cohort.sketches, self.attackers(cohort))


class DivideAndConquer(_AgainstShare):
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


class TemporalCosine(ReplyFilter):
    """No training: cosine to a client's own last updates and the last means, the best are kept (ours, a baseline).

    Args:
        inner: any Flower strategy.
        keep: share of the replies that is kept after two rounds.
        kwargs: keywords of :class:`fedllm.strategies.filtering.ReplyFilter`.
    """

    def __init__(
        self, inner: Strategy, *, keep: Annotated[float, Field(gt=0, le=1)] = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._rule = TemporalCosineRule(keep)

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """See :class:`fedllm.strategies.robust.temporal.TemporalCosine`."""
        kept, scores = self._rule.judge(cohort.clients, cohort.sketches)
        return Verdict(kept.float(), scores)

    def own_state(self) -> dict[str, Any]:
        """The remembered updates."""
        return self._rule.state_dict()

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self._rule.load_state_dict(state)
