"""Who is connected: stable names for Flower's random node ids, and a bounded wait for enough nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm import __version__
from fedllm.errors import PlanError
from fedllm.events import EventBus
from fedllm.narration import printable
from fedllm.packing import PACKED
from fedllm.records import CONFIG, MAX_EXAMPLES, MODEL_VERSION, NUM_EXAMPLES, records_of

DESCRIBE = "query.describe"
_MAX_NAME, _MAX_TEXT = 128, 20_000
SHOWN = (
    "device",
    "cpus",
    "memory-bytes",
    "num-examples",
    "label-names",
    "label-counts",
    "version",
    MODEL_VERSION,
)
"""The parts of a node's description that go into its ``node-joined`` event."""


@dataclass(frozen=True)
class NodeInfo:
    """What a node told of itself.

    Attributes:
        node_id: Flower's id, new in every run of a simulation.
        name: the node's own name; seeds and events use it.
        order: sorts nodes the same way in every run.
        num_examples: training examples it holds; 0 if it did not say.
        description: the whole reply to ``query.describe``.
    """

    node_id: int
    name: str
    order: tuple[int, int, str]
    num_examples: int = 0
    description: ConfigRecord | None = None


def name_of(nodes: Iterable[NodeInfo], node_id: int) -> str:
    """The name under which the loop knows a node; its id outside of fedllm's loop."""
    return next((node.name for node in nodes if node.node_id == node_id), str(node_id))


class NodeDirectory:
    """Keeps track of connected nodes; asks each newcomer once for its description.

    A node whose app does not know ``query.describe`` (any stock Flower ClientApp) takes part under its node id.
    A node that answers with an error of its own, for instance an unreadable data file, is rejected by name, and so is
    one with another version of fedllm, since records and update rules may differ between versions, or with other
    weights of the base model, on which the adapter of the others means nothing.
    """

    def __init__(
        self,
        grid: Grid,
        events: EventBus,
        *,
        timeout: float = 180.0,
        poll_interval: float = 0.02,
        model_version: str = "",
    ) -> None:
        self._grid = grid
        self._events = events
        self._timeout = timeout
        self._poll_interval = poll_interval
        self._model_version = model_version
        self._known: dict[int, NodeInfo] = {}
        self._rejected: dict[int, tuple[str, float]] = {}
        self._pending: dict[str, int] = {}

    def wait_for(self, min_nodes: int) -> list[NodeInfo]:
        """All usable nodes in stable order, once there are enough of them and nobody's description is outstanding.

        Raises:
            PlanError: fewer than ``min_nodes`` within the timeout; says how many are there and who was rejected.
        """
        deadline = time.monotonic() + self._timeout
        told = -1
        while True:
            nodes = self.refresh()
            late = time.monotonic() >= deadline
            if len(nodes) >= min_nodes and (late or not self._pending):
                if self._pending:
                    message = (
                        f"{len(self._pending)} nodes did not describe themselves within {self._timeout:g} s"
                    )
                    self._events.emit("warning", message=message)
                return nodes
            if late:
                raise PlanError(self._too_few(len(nodes), min_nodes))
            if len(nodes) < min_nodes and len(nodes) != told:
                told = len(nodes)
                self._events.emit("waiting-for-nodes", have=told, need=min_nodes)
            time.sleep(self._poll_interval)

    def _too_few(self, have: int, need: int) -> str:
        message = (
            f"{have} usable nodes after {self._timeout:g} s, expected at least {need} (server.min-nodes)"
        )
        if self._pending:
            message += f"; {len(self._pending)} are connected but still loading: raise server.node-timeout"
        if self._rejected:
            reasons = "; ".join(sorted({reason for reason, _ in self._rejected.values()}))
            message += f"; {len(self._rejected)} rejected: {reasons}"
        return message + "; connect more nodes, or lower server.min-nodes"

    def refresh(self) -> list[NodeInfo]:
        """Usable nodes that are connected now, in stable order; newcomers are asked, but not waited for."""
        connected = set(self._grid.get_node_ids())
        # A rejected node gets another chance after it has come back, or some time later: a disk may be mounted by then.
        self._rejected = {
            i: (reason, since)
            for i, (reason, since) in self._rejected.items()
            if i in connected and time.monotonic() - since < self._timeout
        }
        self._pending = {message: i for message, i in self._pending.items() if i in connected}
        self._ask(connected - self._known.keys() - self._rejected.keys() - set(self._pending.values()))
        if self._pending:
            for reply in self._grid.pull_messages(set(self._pending)):
                node_id = self._pending.pop(reply.metadata.reply_to_message_id, None)
                if node_id is not None:
                    self._register(node_id, reply)
        return sorted((self._known[i] for i in connected & self._known.keys()), key=lambda node: node.order)

    def ask_again(self, node_ids: Iterable[int]) -> None:
        """Ask known nodes for a new description; until it is here the old one holds, and nobody waits for it."""
        self._ask(set(node_ids) & self._known.keys() - set(self._pending.values()))

    def name(self, node_id: int) -> str:
        """The name under which a node is known; its id if it never described itself."""
        return self._known[node_id].name if node_id in self._known else str(node_id)

    def packs(self, node_id: int) -> bool:
        """Whether a node takes packed records, see :mod:`fedllm.packing`."""
        description = self._known[node_id].description if node_id in self._known else None
        return description is not None and bool(description.get(PACKED, False))

    def _ask(self, node_ids: Iterable[int]) -> None:
        for node_id in sorted(node_ids):
            message = Message(RecordDict(), dst_node_id=node_id, message_type=DESCRIBE)
            for message_id in self._grid.push_messages([message]):
                if message_id:
                    self._pending[message_id] = node_id

    def _register(self, node_id: int, reply: Message) -> None:
        if reply.has_error():
            reason = reply.error.reason or "unknown error"
            if "No query function registered" in reason:
                self._known[node_id] = NodeInfo(node_id, str(node_id), (1, node_id, ""))
            else:
                self._reject(node_id, str(node_id), reason)
            return
        description = records_of(reply, ConfigRecord).get(CONFIG, ConfigRecord())
        name = str(description.get("name", node_id))
        if "error" in description:
            self._reject(node_id, name, str(description["error"]))
            return
        if reason := self._other_version(description):
            self._reject(node_id, name, reason)
            return
        count = description.get(NUM_EXAMPLES, 0)
        if len(name) > _MAX_NAME or len(str(dict(description))) > _MAX_TEXT:
            self._reject(
                node_id, name, f"its name has over {_MAX_NAME} characters, or its description {_MAX_TEXT}"
            )
            return
        if not isinstance(count, int) or not 0 <= count <= MAX_EXAMPLES:
            self._reject(node_id, name, f"{NUM_EXAMPLES} is {count!r}, expected a whole number of examples")
            return
        twin = next(
            (node for node in self._known.values() if node.name == name and node.node_id != node_id), None
        )
        if twin is not None and twin.node_id in set(self._grid.get_node_ids()):
            self._reject(
                node_id, name, f"another connected node is named {name!r}; give each node a name of its own"
            )
            return
        if twin is not None:
            del self._known[twin.node_id]
        # Numeric names sort by number, so that client 10 does not stand between 1 and 2.
        number = int(name) if name.isdecimal() else 0
        order = (0 if name.isdecimal() else 1, number, name)
        before = self._known.get(node_id)
        self._known[node_id] = NodeInfo(node_id, name, order, count, description)
        if before is not None and before.description == description:
            return  # it was asked again, and nothing has changed
        shown = {key.replace("-", "_"): description[key] for key in SHOWN if key in description}
        self._events.emit("node-joined", node=name, **shown)

    def _other_version(self, description: ConfigRecord) -> str:
        """Why a node's version of fedllm or of the base model is not the server's; empty if it is."""
        version = str(description.get("version", __version__))[:_MAX_NAME]
        if version != __version__:
            return (
                f"the node has fedllm {version}, the server {__version__}; install the same version on both "
                "and start the node again"
            )
        model = str(description.get(MODEL_VERSION, ""))[:_MAX_NAME]
        if model and self._model_version and model != self._model_version:
            return (
                f"the node's base model is {model}, the server's {self._model_version}: other weights under one "
                "name; give both the same files, or pin model.revision, and start the node again"
            )
        return ""

    def _reject(self, node_id: int, name: str, reason: str) -> None:
        name, reason = printable(name, limit=_MAX_NAME), printable(reason, limit=_MAX_TEXT)
        self._known.pop(node_id, None)
        self._rejected[node_id] = (f"node {name}: {reason}", time.monotonic())
        self._events.emit("node-rejected", node=name, reason=reason)
