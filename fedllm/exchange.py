"""One exchange with the clients: push messages, poll for replies, check each on arrival, yield them in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedllm.errors import ReplyError, RoundError
from fedllm.events import EventBus
from fedllm.narration import printable
from fedllm.outcomes import DropKind
from fedllm.packing import pack, unpack
from fedllm.records import NUM_EXAMPLES, records_of, wire_bytes
from fedllm.spool import ReplySpool

_MAX_REASON = 2000


@dataclass(frozen=True)
class LoopOptions:
    """How long the server waits and when a round counts; units are seconds and bytes.

    Attributes:
        min_nodes: nodes that must be connected before the first round.
        node_timeout: how long to wait for them.
        quorum: share of the asked clients whose valid replies make a round count.
        deadline: after this a round closes as soon as it has its quorum.
        round_timeout: after this a round closes whatever it has.
        max_failed_rounds: rounds in a row without quorum after which the run stops.
        spool_bytes: bytes of waiting replies kept in memory.
        poll_interval: longest pause between two looks for replies; it is shorter while they come in.
        model_version: of the server's base model; nodes that tell of another one are rejected. Empty: any will do.
    """

    min_nodes: int = 2
    node_timeout: float = 180.0
    quorum: float = 0.5
    deadline: float = 3600.0
    round_timeout: float = 7200.0
    max_failed_rounds: int = 3
    spool_bytes: int = 32 * 2**20
    poll_interval: float = 0.05
    model_version: str = ""


class QuorumError(RoundError):
    """A round closed with too few valid replies; the global model stays as it was.

    Attributes:
        hopeless: several clients were asked, all have answered, and not one answer is usable.
    """

    def __init__(self, message: str, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


@dataclass
class ExchangeStats:
    """What came of an exchange so far."""

    asked: int = 0
    valid: int = 0
    num_examples: int = 0
    dropped: dict[str, str] = field(default_factory=dict)


class Exchange:
    """Iterating yields the valid replies in the order in which their messages were given.

    Iteration ends when every client has answered, when the deadline has passed and the quorum is there, or at the
    round's timeout. It then raises :class:`QuorumError` if there are too few valid replies: a consumer that folds
    replies as they come is interrupted before it can change the global model.
    """

    def __init__(
        self,
        grid: Grid,
        events: EventBus,
        options: LoopOptions,
        *,
        server_round: int,
        phase: str,
        node_name: Callable[[int], str],
        packs: Callable[[int], bool],
        check: Callable[[Message, Message], None],
    ) -> None:
        """Prepare an exchange.

        Args:
            grid: Flower's grid.
            events: receives ``node-replied`` and ``node-dropped``.
            options: deadlines and quorum.
            server_round: the round, for events.
            phase: ``train`` or ``evaluate``, for events.
            node_name: the name of a node id.
            packs: whether a node id takes packed records.
            check: raises :class:`ReplyError` for a reply (first argument) to a message (second) that cannot be used.
        """
        self._grid = grid
        self._events = events
        self._options = options
        self._where = {"round": server_round, "phase": phase}
        self._node_name = node_name
        self._packs = packs
        self._check = check
        self._sent: dict[str, tuple[int, Message]] = {}
        self._open: set[str] = set()
        self._bytes: dict[int, int] = {}
        self._at_once = 1
        self._started = self._last_arrival = 0.0
        self.stats = ExchangeStats()

    def send(self, messages: Sequence[Message]) -> None:
        """Push the messages; a node that cannot be reached counts as dropped."""
        self._started = self._last_arrival = time.monotonic()
        self.stats.asked = len(messages)
        for message in messages:
            # A reply that comes after the round has closed is of no use; neither is the work for it.
            message.metadata.ttl = self._options.round_timeout
        pushed = self._packed(messages)
        ids = list(self._grid.push_messages(pushed))
        if (
            messages
            and not ids
            and not set(self._grid.get_node_ids()).isdisjoint(
                message.metadata.dst_node_id for message in messages
            )
        ):
            raise RoundError(
                f"round {self._where['round']}: Flower took none of {len(messages)} messages although their nodes are "
                "connected; is the adapter too large for one request?"
            )
        if len(ids) != len(messages):
            # The in-memory grid leaves out what it refuses; the id it gave each message tells which.
            accepted = set(ids)
            ids = [i if (i := message.metadata.message_id) in accepted else "" for message in pushed]
        # A reply is about as large as what was sent.
        largest = max((self._sent_bytes(message) for message in messages), default=0)
        self._at_once = max(4, self._options.spool_bytes // max(largest, 1))
        for index, (message_id, message) in enumerate(zip(ids, messages, strict=True)):
            if message_id:
                self._sent[message_id] = (index, message)
            else:
                self._drop(message, "unreachable", "the message could not be sent: the node is not connected")
        self._open = set(self._sent)

    def _packed(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as they travel; those to many nodes that share one content go on sharing one."""
        contents: dict[int, RecordDict] = {}
        pushed = []
        for message in messages:
            told = message.metadata
            if not self._packs(told.dst_node_id):
                pushed.append(message)
                continue
            key = id(message.content)
            if key not in contents:
                contents[key] = pack(message.content)
            pushed.append(
                Message(
                    contents[key],
                    dst_node_id=told.dst_node_id,
                    message_type=told.message_type,
                    ttl=told.ttl,
                    group_id=told.group_id,
                )
            )
        return pushed

    @property
    def unanswered(self) -> set[str]:
        """Ids of messages without a reply."""
        return self._open

    @property
    def needed(self) -> int:
        """Valid replies that make the quorum; at least one."""
        return max(1, math.ceil(self._options.quorum * self.stats.asked - 1e-9))

    def __iter__(self) -> Iterator[Message]:
        with ReplySpool(self._options.spool_bytes) as spool:
            waiting = {index for index, _ in self._sent.values()}
            while self._open and not self._closed():
                arrived = self._poll(spool)
                waiting -= arrived
                # Everything before the first position still open may go out now.
                frontier = min(waiting, default=math.inf)
                for index in [i for i in spool.indices if i < frontier]:
                    yield spool.take(index)
                if self._open and not arrived:
                    time.sleep(self._pause())
            self._drop_silent()
            for index in spool.indices:
                yield spool.take(index)
        self.require_quorum()

    def withdraw(self, reply: Message, reason: str) -> None:
        """Drop a reply that was valid by itself but does not go with the others; check the quorum afterwards."""
        sent = self._sent[reply.metadata.reply_to_message_id][1]
        self.stats.valid -= 1
        self.stats.num_examples -= int(_numbers(reply).get(NUM_EXAMPLES, 0))
        self._drop(sent, "inconsistent", reason)

    def _pause(self) -> float:
        """Short while replies come in, then as configured, later a fiftieth of the silence: a look costs time."""
        idle = time.monotonic() - self._last_arrival
        return max(min(self._options.poll_interval, max(idle / 10, 0.002)), min(idle / 50, 1.0))

    def _closed(self) -> bool:
        elapsed = time.monotonic() - self._started
        if elapsed >= self._options.round_timeout:
            return True
        return elapsed >= self._options.deadline and self.stats.valid >= self.needed

    def _poll(self, spool: ReplySpool) -> set[int]:
        """Fetch some of what has arrived; returns the positions that are settled, with a good reply or without.

        A grid hands over every reply that is ready among the ids that it is given, so few are asked for at once: what
        is in memory does not grow with the cohort. Those whose turn comes first go first.
        """
        settled: set[int] = set()
        ids = sorted(self._open, key=lambda message_id: self._sent[message_id][0])
        for start in range(0, len(ids), self._at_once):
            settled |= self._pull(ids[start : start + self._at_once], spool)
            if settled:
                break
        return settled

    def _pull(self, ids: Sequence[str], spool: ReplySpool) -> set[int]:
        settled: set[int] = set()
        for reply in self._grid.pull_messages(ids):
            message_id = reply.metadata.reply_to_message_id
            if message_id not in self._open:
                continue
            self._open.discard(message_id)
            index, sent = self._sent[message_id]
            settled.add(index)
            self._last_arrival = time.monotonic()
            if self._accept(reply, sent):
                spool.put(index, reply)
        return settled

    def _accept(self, reply: Message, sent: Message) -> bool:
        if reply.has_error():
            self._drop(sent, "client-error", _last_line(reply.error.reason or ""))
            return False
        try:
            unpack(reply.content)
            self._check(reply, sent)
        except ReplyError as error:
            self._drop(sent, "invalid", str(error))
            return False
        except Exception as error:
            # A reply is untrusted input: whatever it breaks, it must not break the run.
            self._drop(sent, "unreadable", f"the reply cannot be read: {type(error).__name__}: {error}")
            return False
        self.stats.valid += 1
        self._report(reply, sent)
        return True

    def _report(self, reply: Message, sent: Message) -> None:
        numbers = _numbers(reply)
        self.stats.num_examples += int(numbers.get(NUM_EXAMPLES, 0))
        self._events.emit(
            "node-replied",
            **self._where,
            node=self._node_name(sent.metadata.dst_node_id),
            bytes_up=_content_bytes(reply),
            bytes_down=self._sent_bytes(sent),
            seconds=numbers.pop("seconds", None),
            elapsed=time.monotonic() - self._started,
            num_examples=int(numbers.pop(NUM_EXAMPLES, 0)),
            loss=numbers.pop("loss", None),
            metrics=numbers,
        )

    def _sent_bytes(self, message: Message) -> int:
        # Messages to many nodes share one content, which `_sent` keeps alive: its id is a safe key.
        key = id(message.content)
        if key not in self._bytes:
            self._bytes[key] = _content_bytes(message)
        return self._bytes[key]

    def _drop(self, sent: Message, kind: DropKind, reason: str) -> None:
        node = self._node_name(sent.metadata.dst_node_id)
        reason = printable(reason, limit=_MAX_REASON)
        self.stats.dropped[node] = reason
        self._events.emit("node-dropped", **self._where, node=node, kind=kind, reason=reason)

    def _drop_silent(self) -> None:
        waited = time.monotonic() - self._started
        for message_id in sorted(self._open, key=lambda i: self._sent[i][0]):
            self._drop(self._sent[message_id][1], "timeout", f"no reply within {waited:.0f} s")

    def require_quorum(self) -> None:
        """Raise :class:`QuorumError` if there are too few valid replies."""
        if self.stats.valid < self.needed:
            reasons = "; ".join(
                f"node {node}: {reason}" for node, reason in list(self.stats.dropped.items())[:5]
            )
            raise QuorumError(
                f"{self.stats.valid} of {self.stats.asked} replies are valid, expected at least {self.needed} "
                f"(server.quorum); {reasons}",
                hopeless=self.stats.valid == 0 and self.stats.asked > 1 and not self._open,
            )


def _numbers(reply: Message) -> dict[str, int | float]:
    metrics = next(iter(records_of(reply, MetricRecord).values()), MetricRecord())
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def _content_bytes(message: Message) -> int:
    return sum(wire_bytes(record) for record in records_of(message, ArrayRecord).values())


def _last_line(reason: str) -> str:
    """The end of a client's error; Flower wraps the exception's text in several lines."""
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    return lines[-1][-1000:] if lines else "unknown error"
