"""A Flower grid in memory whose clients are plain functions, with delays and failures; an event sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedllm.nodes import DESCRIBE
from fedllm.records import decode, encode

Client = Callable[[Message, int], Message]


class FakeGrid(Grid):
    """``client(message, node)`` answers; ``delay(message, node)`` seconds later the answer can be pulled."""

    def __init__(
        self,
        nodes: Iterable[int],
        client: Client,
        delay: Callable[[Message, int], float | None] = lambda message, node: 0.0,
        names: dict[int, str] | None = None,
    ) -> None:
        self.nodes = list(nodes)
        self.client = client
        self.delay = delay
        self.names = names
        self.asked: list[tuple[str, int]] = []
        self._count = 0
        self._due: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            message_id = f"m{self._count}"
            message.metadata.__dict__["_message_id"] = message_id
            node = message.metadata.dst_node_id
            if node not in self.nodes:
                continue
            ids.append(message_id)
            self.asked.append((message.metadata.message_type, node))
            if message.metadata.message_type == DESCRIBE:
                self._due[message_id] = (0.0, self._describe(message, node))
                continue
            wait = self.delay(message, node)
            if wait is not None:
                self._due[message_id] = (time.monotonic() + wait, self.client(message, node))
        return ids

    def _describe(self, message: Message, node: int) -> Message:
        if self.names is None:
            reason = "No query function registered with name 'describe'"
            return Message(Error(code=3, reason=reason), reply_to=message)
        record = ConfigRecord({"name": self.names[node], "num-examples": 10, "device": "cpu"})
        return Message(RecordDict({"config": record}), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        now = time.monotonic()
        ready = [i for i in message_ids if i in self._due and self._due[i][0] <= now]
        return [self._due.pop(i)[1] for i in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        open_ids = set(self.push_messages(messages))
        replies: list[Message] = []
        while open_ids:
            for reply in self.pull_messages(open_ids):
                open_ids.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.001)
        return replies


def reply_with(message: Message, arrays: ArrayRecord, num_examples: float = 10, **metrics: float) -> Message:
    record = MetricRecord({"num-examples": num_examples, "loss": 1.0, **metrics})
    return Message(RecordDict({"arrays": arrays, "metrics": record}), reply_to=message)


def drifting_client(message: Message, node: int) -> Message:
    """Moves every array by a step that depends on the node and the round only."""
    if message.metadata.message_type.startswith("evaluate"):
        metrics = MetricRecord({"num-examples": 10 + node, "loss": 1 / (1 + node)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
    return drift(message, node, int(message.content["config"]["server-round"]))


def drift(message: Message, node: int, server_round: int) -> Message:
    generator = torch.Generator().manual_seed(1000 * server_round + node)
    arrays = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in decode(message.content["arrays"]).items()
    }
    return reply_with(message, encode(arrays), num_examples=10 + node)


def initial_arrays() -> ArrayRecord:
    return encode(
        {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.zeros(4, 2), "bias": torch.zeros(5)}
    )


class Recorder:
    """An event sink that remembers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]
