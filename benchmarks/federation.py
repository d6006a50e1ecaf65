"""A federation in one process: a strategy and its clients, without Flower's processes.

The strategy's messages go to the code that Flower's ClientApp calls, one client after the other, so that nothing but
computing takes time and runs repeat to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import (
    TaskIdentity,
)  # flwr's processes set it; messages cannot be made without

from fedllm import client
from fedllm.config import RunConfig
from fedllm.data import label_names, test_examples
from fedllm.events import EventBus
from fedllm.hostile import HostileClients
from fedllm.models import ModelBundle, load_bundle
from fedllm.nodes import NodeInfo
from fedllm.records import (
    ARRAYS,
    CLIENT,
    CLIENT_PARAMETERS,
    METRICS,
    SEED,
    SIMULATED,
    UPLOAD_CODEC,
    check_reply,
    decode,
    wire_bytes,
)
from fedllm.server import build_strategy
from fedllm.strategy import BaseStrategy
from fedllm.tasks import get_task
from fedllm.wrapper import StrategyWrapper, core_of, layers_of


def pretend_to_be_flower() -> None:
    """Let this process make messages, as those of Flower do."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Federation:
    """A run's strategy, clients and test rows in this process.

    Args:
        config: of the run.
        clients: how many there are.
        events: what defences tell goes there.
    """

    def __init__(self, config: RunConfig, clients: int, events: EventBus | None = None) -> None:
        self.config = config
        self.clients = clients
        self.bundle: ModelBundle = load_bundle(config, label_names(config))
        self.test = test_examples(config, self.bundle.tokenizer)
        self.flat = config.to_flat()
        self.strategy = build_strategy(config)
        core = core_of(self.strategy)
        assert isinstance(core, BaseStrategy)
        self._core = core
        attacked = config.attack != "none"
        nodes = [
            NodeInfo(
                number + 1,
                str(number),
                (0, number, ""),
                description=ConfigRecord({SIMULATED: True}) if attacked else None,
            )
            for number in range(clients)
        ]
        for layer in layers_of(self.strategy):
            cast(Any, layer).nodes = nodes
        if isinstance(self.strategy, StrategyWrapper):
            self.strategy.prepare(config, self.bundle, events or EventBus([]))
        self.bytes_up = 0
        self.steps = 0

    def round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        """One round; returns the new adapter, or the old one where a defence has rejected all replies."""
        new, _ = self.strategy.aggregate_train(
            server_round, map(self._train, self._messages(server_round, arrays))
        )
        return arrays if new is None else new

    def first_client(self, arrays: ArrayRecord) -> None:
        """What the first client of the first round does."""
        self._train(next(iter(self._messages(1, arrays))))

    def _messages(self, server_round: int, arrays: ArrayRecord) -> Iterable[Message]:
        request = ConfigRecord(
            {
                CLIENT: self.config.client,
                CLIENT_PARAMETERS: json.dumps(self.config.plugins.get(self.config.client, {})),
                SEED: self.config.seed,
                UPLOAD_CODEC: "fp32",
            }
        )
        return self.strategy.configure_train(server_round, arrays, request, cast(Grid, None))

    def _train(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id - 1
        context = Context(
            run_id=1,
            node_id=partition + 1,
            node_config={"partition-id": partition, "num-partitions": self.clients},
            state=RecordDict(),
            run_config=cast(Any, self.flat),
        )
        reply = client.train(message, context)
        check_reply(reply, self._core.reply_spec(message))
        self.bytes_up += wire_bytes(cast(ArrayRecord, reply.content[ARRAYS]))
        self.steps += int(cast(Any, reply.content[METRICS])["steps"])
        return reply

    def accuracy(self, arrays: ArrayRecord) -> float:
        """On the test rows."""
        assert self.test is not None
        self.bundle.load_adapter_state(decode(arrays))
        pad = self.bundle.tokenizer.pad_token_id
        return get_task(self.config.task).evaluate(self.bundle.model, self.test, 64, pad, "cpu")["accuracy"]


class HonestOnly(HostileClients):
    """The oracle: from the round on in which they would attack, hostile clients are not asked at all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages, those to honest clients only."""
        messages = super().configure_train(server_round, arrays, config, grid)
        if server_round < self._from_round:
            return messages
        return [message for message in messages if not self.is_hostile(message.metadata.dst_node_id)]
