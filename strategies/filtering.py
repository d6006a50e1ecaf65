"""Reply filters: wrappers that see a round's replies as a whole before the inner strategy sees any of them.

Replies wait on disk (:mod:`fedllm.spool`) while a sketch of each stays in memory. When the last one has come the filter
judges, and the inner strategy gets a stream of those that were kept, scaled down where the filter says so. A round
whose exchange fails for want of a quorum is not judged and not learned from. A reply that a filter cannot judge, such
as one whose norm no float32 can hold, is dropped before it is seen by any.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fedllm.strategies.believable import LARGEST_CLAIM, LARGEST_NORM, check_tensors, is_bounded, middle
from fedllm.strategies.flat_updates import Tensors, flat_update, overwrite, set_update
from fedllm.strategies.vert.sketch import Sketch, Sketcher
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, PlanError, ReplyError
from fedllm.events import EventBus
from fedllm.records import NUM_EXAMPLES, check_num_examples, decode, only_arrays, only_metrics
from fedllm.spool import ReplySpool
from fedllm.wrapper import StrategyWrapper, core_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """A round's replies as a filter sees them, in the order in which the clients were asked.

    Attributes:
        clients: names.
        sketches: ``[n, q]`` of their updates.
        norms: of the whole updates, ``[n]``.
        claims: what each says that it weighs, normally its number of examples.
    """

    clients: Sequence[str]
    sketches: Tensor
    norms: Tensor
    claims: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """What a filter makes of a cohort.

    Attributes:
        factors: ``[n]``; 0: rejected, else the update is multiplied by it.
        scores: ``[n]``, the larger the more trusted.
        details: further fields of the ``verdict`` event.
        replacement: an update ``[d]`` that every kept reply carries instead of its own, so that the inner strategy's
            mean, whatever its weights, is this update; None: replies keep theirs.
        reason: why the round is left out with nobody judged; empty: it is not.
    """

    factors: Tensor
    scores: Tensor
    details: Mapping[str, Any] = field(default_factory=dict)
    replacement: Tensor | None = None
    reason: str = ""


class ReplyFilter(StrategyWrapper):
    """Base of all filters.

    Args:
        inner: any Flower strategy.
        sketch_size: numbers that are kept of an update while a round is open.
        seed: of the sketches.
        spool_bytes: bytes of waiting replies that are held in memory; more go to temporary files.

    Attributes:
        tells: whether verdicts become events; not where another filter around this one tells them.
    """

    def __init__(
        self, inner: Strategy, *, sketch_size: int = 512, seed: int = 0, spool_bytes: int = 32 * 2**20
    ) -> None:
        super().__init__(inner)
        self.sketcher = Sketcher(sketch_size, seed)
        self.tells = True
        self._spool_bytes = spool_bytes
        self._events: EventBus | None = None
        self._sent: dict[int, ArrayRecord] = {}
        self._decoded: tuple[ArrayRecord | None, Tensors] = (None, {})

    @classmethod
    def check_cohort(cls, parameters: Mapping[str, Any], clients: int) -> None:
        """Refuse parameters that do not fit the number of clients in a round; most fit any.

        Raises:
            ConfigError: they do not.
        """

    @abstractmethod
    def judge(self, server_round: int, cohort: Cohort) -> Verdict:
        """Decide on a round's replies and learn from them; there is at least one."""

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Take the run's events and the room for waiting replies."""
        super().prepare(config, bundle, events)
        self._events = events
        self._spool_bytes = int(config.server.spool_megabytes * 2**20)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages; what each client was sent is remembered until it replies."""
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: only_arrays(message) for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies, then let the inner strategy fold those that are kept; nothing if none is."""
        self.skip_reason = ""
        with ReplySpool(self._spool_bytes) as spool:
            cohort = self._gather(server_round, replies, spool)
            if not cohort.clients:
                self.skip_reason = "no reply was left to judge; the model stays as it was"
                return self.inner.aggregate_train(server_round, iter(()))
            verdict = self._sound(server_round, cohort, self.judge(server_round, cohort))
            if verdict.reason:
                self.skip_reason = f"{verdict.reason}; the model stays as it was"
                return None, None
            weights = self._counted(cohort, verdict)
            if self.tells:
                self._tell(server_round, cohort, verdict, weights)
            if not bool((verdict.factors != 0).any()):
                rejected = f"{type(self).__name__} rejected all {len(cohort.clients)} replies"
                self.skip_reason = f"{rejected}; the model stays as it was"
                return None, None
            return self.inner.aggregate_train(server_round, self._kept(spool, verdict, weights))

    def _gather(self, server_round: int, replies: Iterable[Message], spool: ReplySpool) -> Cohort:
        clients, sketches, norms, claims = list[str](), list[Tensor](), list[float](), list[int]()
        for message in replies:
            if message.has_error():
                continue
            name = self.node_name(message.metadata.src_node_id)
            try:
                claim = check_num_examples(only_metrics(message), self._weight_key)
                sketch = self._represented(message)
            except ReplyError as error:
                self._drop(server_round, name, str(error))
                continue
            self._check_length(sketch, sketches, message)
            spool.put(len(clients), message)
            clients.append(name)
            sketches.append(sketch.vector)
            norms.append(sketch.norm)
            claims.append(claim)
        empty = torch.zeros(0, self.sketcher.size)
        return Cohort(clients, torch.stack(sketches) if sketches else empty, torch.tensor(norms), claims)

    def _represented(self, message: Message) -> Sketch:
        """What is kept of a reply.

        Raises:
            ReplyError: it cannot be judged.
        """
        start, new = self._tensors(message)
        sent = self.sent_tensors(message.metadata.src_node_id)
        check_tensors(sent, new)
        if (names := [name for name in sent if name in new]) != list(new):
            # Rules over coordinates go by the order, and updates come without what was sent to tell it.
            record = only_arrays(message)
            arrays = dict(record.items())
            record.clear()
            record.update({name: arrays[name] for name in names})
            new = {name: new[name] for name in names}
        sketch = self.represent(start, new)
        if not is_bounded(sketch):
            raise ReplyError(
                f"the norm of its update is {sketch.norm:g}, expected at most {LARGEST_NORM:g}: "
                f"{type(self).__name__} cannot compare it"
            )
        return sketch

    @property
    def _weight_key(self) -> str:
        """The metric by which the inner strategy weighs replies."""
        return str(getattr(core_of(self), "weighted_by_key", NUM_EXAMPLES))

    def believed(self, claims: Sequence[int]) -> list[int]:
        """What the kept replies weigh, of what they claim ``[n]``: see :data:`LARGEST_CLAIM`."""
        limit = LARGEST_CLAIM * middle(claims)
        return [min(claim, limit) for claim in claims]

    def _counted(self, cohort: Cohort, verdict: Verdict) -> dict[int, int]:
        """Weights of the kept replies that do not weigh what they claim, by index."""
        kept = [index for index, factor in enumerate(verdict.factors.tolist()) if factor != 0]
        claims = [cohort.claims[index] for index in kept]
        believed = self.believed(claims) if kept else []
        return {
            index: weight
            for index, claim, weight in zip(kept, claims, believed, strict=True)
            if weight != claim
        }

    def _drop(self, server_round: int, name: str, reason: str) -> None:
        """Tell of a reply that does not count, as the round's exchange does."""
        if self._events is None:
            logger.warning("round %d: the reply of node %s is dropped: %s", server_round, name, reason)
            return
        self._events.emit(
            "node-dropped", round=server_round, phase="train", node=name, kind="invalid", reason=reason
        )

    def _sound(self, server_round: int, cohort: Cohort, verdict: Verdict) -> Verdict:
        """The verdict without what is not finite: a NaN that is folded in would be the next global model."""
        sound = torch.isfinite(verdict.factors)
        if verdict.replacement is not None and not bool(torch.isfinite(verdict.replacement).all()):
            sound = torch.zeros_like(sound)
        if bool(sound.all()):
            return verdict
        names = [name for name, is_sound in zip(cohort.clients, sound.tolist(), strict=True) if not is_sound]
        self._warn(
            f"round {server_round}: {type(self).__name__} came to no finite number for {len(names)} replies, which "
            f"are rejected: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        )
        return replace(verdict, factors=torch.where(sound, verdict.factors, 0.0))

    def _warn(self, message: str) -> None:
        if self._events is None:
            logger.warning("%s", message)
        else:
            self._events.emit("warning", message=message)

    def tell_of_few(self, server_round: int, cohort: Cohort, key: str, keep: float) -> None:
        """Warn of a round with fewer replies than shall be kept: there the number rejects nobody."""
        if keep > (count := len(cohort.clients)):
            self._warn(
                f"round {server_round}: {key} is {keep:g}, but only {count} replies came, of which it rejects "
                f"none; set {key} below the number of clients in a round"
            )

    def represent(self, start: Tensors, new: Tensors) -> Sketch:
        """What is kept of an update while the round is open; ``start`` is empty if ``new`` already is an update."""
        return self.sketcher.update(start, new)

    def _check_length(self, sketch: Sketch, others: Sequence[Tensor], message: Message) -> None:
        if others and len(sketch.vector) != len(others[0]):
            name = self.node_name(message.metadata.src_node_id)
            raise PlanError(
                f"node {name}: its update has {len(sketch.vector)} numbers, those of the others {len(others[0])}; "
                f"{type(self).__name__} cannot compare adapters of different forms"
            )

    def _tensors(self, message: Message) -> tuple[Tensors, Tensors]:
        """What the client was sent, and its reply; the first is empty if replies are updates already."""
        new = decode(only_arrays(message), self.sent_tensors(message.metadata.src_node_id))
        return self._base(message), new

    def _base(self, message: Message) -> Tensors:
        """What a reply is relative to: what its client was sent, or nothing if replies are updates already."""
        return self.sent_tensors(message.metadata.src_node_id) if self.replies_are_adapters else {}

    def sent_tensors(self, node_id: int) -> Tensors:
        """What a client was sent in this round."""
        record = self._sent[node_id]
        if self._decoded[0] is not record:
            self._decoded = (record, decode(record))
        return self._decoded[1]

    def _kept(self, spool: ReplySpool, verdict: Verdict, weights: Mapping[int, int]) -> Iterator[Message]:
        for index, factor in enumerate(verdict.factors.tolist()):
            message = spool.take(index)
            if factor == 0:
                continue
            if verdict.replacement is not None:
                set_update(only_arrays(message), self._base(message), verdict.replacement)
            elif factor != 1:
                self._scale(message, factor)
            if index in weights:
                only_metrics(message)[self._weight_key] = weights[index]
            yield message

    def _scale(self, message: Message, factor: float) -> None:
        """Multiply the update of a reply by a factor; a LoRA product follows to first order in the change."""
        sent, arrived = self._tensors(message)
        # Counters are integers, between which nothing lies: they are rounded when they are written.
        new = {n: value if value.is_floating_point() else value.double() for n, value in arrived.items()}
        scaled = {
            name: factor * value if not sent else torch.lerp(sent[name].to(value), value, factor)
            for name, value in new.items()
        }
        overwrite(only_arrays(message), scaled)

    def _tell(self, server_round: int, cohort: Cohort, verdict: Verdict, weights: Mapping[int, int]) -> None:
        fields = {
            "round": server_round,
            "defence": type(self).__name__,
            "kept": dict(zip(cohort.clients, (verdict.factors != 0).tolist(), strict=True)),
            "scores": dict(zip(cohort.clients, verdict.scores.tolist(), strict=True)),
            "factors": dict(zip(cohort.clients, verdict.factors.tolist(), strict=True)),
            "weights": {cohort.clients[index]: weight for index, weight in weights.items()},
            **verdict.details,
        }
        if self._events is not None:
            self._events.emit("verdict", **fields)
        rejected = [name for name, kept in fields["kept"].items() if not kept]
        logger.info(
            "round %d: %s rejected %d of %d replies%s",
            server_round,
            type(self).__name__,
            len(rejected),
            len(cohort.clients),
            f": {', '.join(rejected[:20])}{', …' if len(rejected) > 20 else ''}" if rejected else "",
        )


class WholeUpdates(ReplyFilter):
    """Base of filters that need every number of every update: all of a round's are in memory, n·d floats.

    Args:
        inner: any Flower strategy.
        seed: of everything random.
    """

    def __init__(self, inner: Strategy, *, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)

    def represent(self, start: Tensors, new: Tensors) -> Sketch:
        """The whole update, flat: factors of adapters are plain arrays here."""
        flat = flat_update(start, new)
        return Sketch(flat, float(flat.norm()))


def check_keep(key: str, keep: float, clients: int) -> None:
    """Refuse to keep more replies than a round can have.

    Raises:
        ConfigError: ``keep`` is above ``clients``, the number of clients that train in a round.
    """
    if keep > clients:
        raise ConfigError(
            f"{key} is {keep:g}, but a round has {clients} clients (simulation.clients times server.fraction-train): "
            "nobody would be rejected; lower it to the number of clients that are surely honest"
        )
