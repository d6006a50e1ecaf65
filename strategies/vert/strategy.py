"""``VERT(inner)``: Vertical defence as a wrapper around any Flower strategy (after Wang et al., arXiv 2411.10673)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from fedllm.strategies.filtering import Cohort, ReplyFilter, Verdict, check_keep
from fedllm.strategies.one_form import check_one_form
from fedllm.strategies.robust.coordinates import Median, NearestNeighbourMixing, TrimmedMean
from fedllm.strategies.trusted import RootedFilter, RootUpdate
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.rule import WEIGHTS, weigh_kept
from flwr.serverapp.strategy import Strategy
from pydantic import Field, PlainValidator
from torch import Tensor

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.events import EventBus


def _checked_keep(keep: Any) -> Any:
    parse_keep(keep)
    return keep


_WARN_AFTER = 3
Keep = Annotated[str | int | float, PlainValidator(_checked_keep)]
Rule = Literal["mean", "geometric-median", "mixed-geometric-median", "median", "trimmed-mean", "nnm"]
RULES: Mapping[str, type[ReplyFilter]] = {
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "nnm": NearestNeighbourMixing,
}


class VERT(RootedFilter):
    """Keeps the clients whose update is what their own and the global history predict; the repaired form, ours.

    Warm-up: the first ``warm_up`` rounds are trusted as they are, because there is nothing to predict from; with
    trusted data they are judged, too. Cold start: a client without history is predicted from the global history
    alone. Where more than half of the clients are hostile from the first round on and no data is trusted, updates
    alone cannot tell who is right; the run warns. If all replies of a round are rejected the model stays as it was.

    Args:
        inner: any Flower strategy.
        keep: replies to keep: ``auto``, a number (4), or a share with a dot (0.2; 1.0 is all), quoted or not.
            A number above the replies of a round, or all, rejects nobody there, apart from those that do not move; of
            such a number the round is warned.
        warm_up: first rounds, which are trusted.
        root_examples: so many of the server's test rows are trusted; 0: none.
            The server trains on them in every round with the clients' update rule. They are evaluated on as well.
        clip: norms above this multiple of the kept replies' median are scaled down to it.
        window: directions that are remembered of each client.
        max_clients: clients that are remembered.
        sketch_size: numbers that stand for an update.
        rule: of the kept replies: their ``mean`` by the inner strategy, or a robust rule among them.
            The latter helps where some attackers got through. ``geometric-median``, and ``mixed-geometric-median``
            (that of the means of each reply and those nearest to it) weigh the replies; the others need whole updates
            of one form.
        seed: of sketches and predictors.
        root: trusted update as a function instead of ``root_examples``.

    Raises:
        ConfigError: ``keep`` is neither ``auto`` nor a whole number of at least 1 nor a share above 0 and up to 1.0.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        keep: Keep = "auto",
        warm_up: Annotated[int, Field(ge=1)] = 2,
        root_examples: Annotated[int, Field(ge=0)] = 0,
        clip: Annotated[float, Field(ge=1)] = 1.5,
        window: Annotated[int, Field(ge=1)] = 4,
        max_clients: Annotated[int, Field(ge=1)] = 10_000,
        sketch_size: Annotated[int, Field(ge=16)] = 512,
        rule: Rule = "mean",
        seed: int = 0,
        root: RootUpdate | None = None,
    ) -> None:
        if rule in RULES:
            inner = RULES[rule](inner, seed=seed)
            inner.tells = False  # the verdict of the round is VERT's
        super().__init__(inner, root_examples=root_examples, root=root, sketch_size=sketch_size, seed=seed)
        self.keep, self.warm_up, self.rule = keep, warm_up, rule
        self.detector = Detector(
            sketch_size,
            keep=parse_keep(keep),
            warm_up=warm_up,
            clip=clip,
            window=window,
            clients=max_clients,
            seed=seed,
        )
        self._in_a_row = 0

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Refuse trusted rows that cannot be trained on, and a rule that cannot do with the clients' ranks.

        Raises:
            ConfigError: strategy, ranks and the keys of VERT do not go together.
        """
        super().check_config(config)
        table = registry.parameter_table(config.defence)
        if (rule := str(config.plugins.get(table, {}).get("rule", "mean"))) in RULES:
            others = ", ".join(name for name in get_args(Rule) if name not in RULES)
            check_one_form(config, f"{table}.rule", rule, f"set {table}.rule to one of {others}")

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Get the trusted data ready, or say what the run relies on without any."""
        super().prepare(config, bundle, events)
        if self.root is None:
            events.emit(
                "warning",
                message=f"VERT trusts the first {self.warm_up} rounds as they are: if most clients are hostile from "
                "the start, their updates alone cannot tell who is right; vert.root-examples gives it data to trust",
            )

    @classmethod
    def check_cohort(cls, parameters: Mapping[str, Any], clients: int) -> None:
        """Refuse a ``keep`` above the number of clients in a round, where that is known before the run.

        Raises:
            ConfigError: ``keep`` is larger.
        """
        check_keep("vert.keep", parse_keep(parameters.get("keep", "auto")), clients)

    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """See :class:`fedllm.strategies.vert.detector.Detector`."""
        self.tell_of_few(server_round, cohort, "vert.keep", self.detector.keep)
        found = self.detector.judge(
            server_round, cohort.clients, cohort.sketches, cohort.norms, self.root_sketch
        )
        details = {
            "distances": dict(zip(cohort.clients, found.distances.tolist(), strict=True)),
            "predictor": found.predictor,
        }
        self._tell_of_many(server_round, found.kept)
        return Verdict(self.weigh(found.factors, cohort.sketches), found.scores, details)

    def _tell_of_many(self, server_round: int, kept: Tensor) -> None:
        """Warn once of rounds in a row that reject most replies unasked: it is an attack, or nobody can train on."""
        asked_for = self.detector.keep > 0
        self._in_a_row = self._in_a_row + 1 if float(kept.float().mean()) < 0.5 and not asked_for else 0
        if self._in_a_row == _WARN_AFTER:
            self._warn(
                f"round {server_round}: VERT has rejected most replies {_WARN_AFTER} times in a row: either most "
                "clients are hostile, or training turns faster than it can follow; if they are not, lower "
                "train.learning-rate, train more local steps, or set vert.keep"
            )

    def weigh(self, factors: Tensor, sketches: Tensor) -> Tensor:
        """Factors ``[n]`` with the weights of the rule, where it is one that weighs; see :mod:`.rule`."""
        rule = WEIGHTS.get(self.rule)
        return factors if rule is None else weigh_kept(factors, sketches, rule)

    def own_state(self) -> dict[str, Any]:
        """The history of the clients and what the predictors have learned."""
        return self.detector.state_dict()

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self.detector.load_state_dict(state)


def parse_keep(keep: str | int | float) -> float:
    """``auto`` → 0, a number → itself, a share → itself, but that of all → the largest number below 1.

    Raises:
        ConfigError: anything else.
    """
    if keep == "auto":
        return 0.0
    number, share = _as(int, keep), _as(float, keep)
    if number is not None and number >= 1:
        return float(min(number, sys.maxsize))
    if number is None and share is not None and 0 < share <= 1:
        return min(share, math.nextafter(1, 0))  # 1 stands for a single reply
    raise ConfigError(
        "vert.keep: expected auto, a whole number of at least 1, or a share with a dot above 0 and up to 1.0, "
        f"found {keep!r}"
    )


def _as(kind: type[int] | type[float], keep: str | int | float) -> float | None:
    """A value that is written as a number of a kind, else None."""
    if not isinstance(keep, str):
        return keep if isinstance(keep, kind) and not isinstance(keep, bool) else None
    try:
        return kind(keep)
    except ValueError:
        return None
