"""The published VERT as a wrapper, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fedllm.strategies.believable import middle
from fedllm.strategies.filtering import Cohort, Verdict, WholeUpdates, check_keep
from fedllm.strategies.one_form import check_one_form, defences_of_any_form
from fedllm.strategies.vert.paper import PaperDetector
from flwr.serverapp.strategy import Strategy
from pydantic import Field

from fedllm.config import RunConfig


class PaperVERT(WholeUpdates):
    """VERT as published, for comparison: whole updates in memory, a clean warm-up and a known number of honest clients.

    Args:
        inner: any Flower strategy.
        keep: replies that are kept after the warm-up; a round with fewer keeps all, and is warned of.
        size: length of a projection.
        warm_up: rounds that are trusted.
        window: rounds of history.
        epochs: passes of the predictor over each client's history.
        learning_rate: of the predictor.
        seed: of everything random.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        keep: Annotated[int, Field(ge=1)] = 1,
        size: Annotated[int, Field(ge=1)] = 128,
        warm_up: Annotated[int, Field(ge=2)] = 2,
        window: Annotated[int, Field(ge=2)] = 10,
        epochs: Annotated[int, Field(ge=1)] = 5,
        learning_rate: Annotated[float, Field(gt=0)] = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, seed=seed)
        self._keep = keep
        self._detector = PaperDetector(
            keep,
            size=size,
            warm_up=warm_up,
            window=window,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
        )

    @staticmethod
    def check_config(config: RunConfig) -> None:
        """Refuse clients of several ranks.

        Raises:
            ConfigError: ``lora.client-ranks`` names more than one.
        """
        check_one_form(config, "defence", config.defence, f"set defence to one of {defences_of_any_form()}")

    @classmethod
    def check_cohort(cls, parameters: Mapping[str, Any], clients: int) -> None:
        """Refuse a ``keep`` above the number of clients in a round, where that is known before the run.

        Raises:
            ConfigError: ``keep`` is larger.
        """
        check_keep("vert-paper.keep", float(parameters.get("keep", 1)), clients)

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """See :class:`PaperDetector`."""
        self.tell_of_few(server_round, cohort, "vert-paper.keep", self._keep)
        kept, scores = self._detector.judge(cohort.clients, cohort.sketches)
        return Verdict(kept.float(), scores)

    def believed(self, claims: Sequence[int]) -> list[int]:
        """The same for each: the published mean is not weighed by examples."""
        return [middle(claims)] * len(claims)

    def own_state(self) -> dict[str, Any]:
        """The history."""
        return self._detector.state_dict()

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self._detector.load_state_dict(state)
