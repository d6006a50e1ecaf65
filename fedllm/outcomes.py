"""What is known of a round and of a node: plain records that :mod:`fedllm.history` fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["open", "finished", "skipped"]
DropKind = Literal["unreachable", "timeout", "client-error", "invalid", "unreadable", "inconsistent"]

#: Metrics that describe a run best, best first, and whether the larger value is the better one.
HEADLINE_METRICS: Mapping[str, bool] = {
    "accuracy": True,
    "macro-f1": True,
    "perplexity": False,
    "loss": False,
}


@dataclass(frozen=True)
class NodeReply:
    """A node's valid reply; ``seconds`` is its computing time, ``elapsed`` counts from the round's start.

    A node that does not say how long it computed, or what its loss was, has ``None`` there.
    """

    phase: str
    node: str
    num_examples: int
    loss: float | None
    seconds: float | None
    elapsed: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class NodeDrop:
    """A node whose reply did not count, and why."""

    round: int
    phase: str
    node: str
    reason: str


@dataclass(frozen=True)
class NodeVerdict:
    """What a defence made of a node's reply; the larger the score, the more it is trusted, NaN if there is none."""

    kept: bool
    score: float


@dataclass
class RoundRecord:
    """One round; ``seconds`` is ``None`` while it is open. Round 0 is the evaluation before any training."""

    number: int
    started: float
    asked: tuple[str, ...] = ()
    replies: list[NodeReply] = field(default_factory=list)
    drops: list[NodeDrop] = field(default_factory=list)
    replies_counted: int | None = None
    num_examples: int = 0
    train_loss: float | None = None
    update_norm: float | None = None
    evaluations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    verdicts: dict[str, NodeVerdict] = field(default_factory=dict)
    skip_reason: str | None = None
    seconds: float | None = None

    @property
    def outcome(self) -> Outcome:
        """Whether the round is still open, was finished, or was skipped without touching the global model."""
        if self.skip_reason is not None:
            return "skipped"
        return "open" if self.seconds is None else "finished"

    @property
    def bytes_up(self) -> int:
        """Bytes that nodes sent to the server."""
        return sum(reply.bytes_up for reply in self.replies)

    @property
    def bytes_down(self) -> int:
        """Bytes that the server sent to nodes that replied."""
        return sum(reply.bytes_down for reply in self.replies)

    @property
    def trained(self) -> list[NodeReply]:
        """Replies of the training phase."""
        return [reply for reply in self.replies if reply.phase == "train"]

    @property
    def headline(self) -> dict[str, float]:
        """Evaluation metrics but the loss, those of the server's test rows first, in order of importance."""
        found: dict[str, float] = {}
        for where in ("server", "clients"):
            metrics = self.evaluations.get(where, {})
            for name in HEADLINE_METRICS:
                value = metrics.get(name)
                if name != "loss" and value is not None:
                    found.setdefault(name, value)
        return found


@dataclass
class NodeTotals:
    """Everything a node did in a run; ``num_examples`` is the size of its training set."""

    name: str
    device: str = ""
    num_examples: int | None = None
    asked: int = 0
    replied: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    last_loss: float | None = None
    drops: list[NodeDrop] = field(default_factory=list)

    def add(self, reply: NodeReply) -> None:
        """Count a reply; the loss and the number of examples are those of training."""
        self.seconds += reply.seconds or 0.0
        self.bytes_up += reply.bytes_up
        self.bytes_down += reply.bytes_down
        if reply.phase == "train":
            self.replied += 1
            self.last_loss = reply.loss
            if self.num_examples is None:
                self.num_examples = reply.num_examples


@dataclass(frozen=True)
class NodeInfo:
    """What a node said of itself when it joined."""

    device: str
    num_examples: int | None


@dataclass(frozen=True)
class NodeTask:
    """What a node was told to do: bits of its base, batch size, and the rank of every weight that it adapts."""

    bits: int
    batch_size: int
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class PlanRecord:
    """A plan that holds from a round on, until the next one.

    Attributes:
        round: the first round that it holds for.
        phase: what it is for, in the strategy's words.
        weights: all weights that could be adapted, in the model's order.
        nodes: by name.
    """

    round: int
    phase: str
    weights: tuple[str, ...]
    nodes: Mapping[str, NodeTask]
