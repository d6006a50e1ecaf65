"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378), algorithm 1 with option II's control variates.

The controls of all clients are kept by the server, by node name: clients stay stateless, may restart, and a resumed run
goes on with the same bits. A client is sent its correction c − c_i and returns its adapter and the mean of its
uncorrected gradients, which is c_i⁺ of option II (c_i − c + (x − y_i)/(Kη), written out for plain SGD); per round that
is 2d each way, as in the paper. The server holds one vector per client seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedllm.accumulate import Accumulator, Reply, WeightedMean
from fedllm.errors import ReplyError
from fedllm.records import (
    CORRECTION,
    MEAN_GRADIENT,
    check_arrays,
    decode,
    encode,
    only_arrays,
    records_of,
    spec_of,
)
from fedllm.strategy import BaseStrategy

Positive = Annotated[float, Field(gt=0)]


class _Adapters:
    """The unweighted mean of the adapters, and the clients' new controls."""

    def __init__(self) -> None:
        self._mean = WeightedMean()
        self.controls: dict[str, dict[str, Tensor]] = {}

    def add(self, reply: Reply) -> None:
        self._mean.add(Reply(reply.node, 1.0, reply.arrays, reply.metrics, reply.content))
        control = reply.content[MEAN_GRADIENT]
        assert isinstance(control, ArrayRecord)
        self.controls[reply.node] = decode(control)

    def result(self) -> dict[str, Tensor]:
        return self._mean.result()


class Scaffold(BaseStrategy):
    """Control variates against client drift; for the client update ``scaffold-sgd``.

    Args:
        server_learning_rate: η_g, the step along the mean of the clients' moves.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(self, *, server_learning_rate: Positive = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.server_learning_rate = server_learning_rate
        self._controls: dict[str, dict[str, Tensor]] = {}
        self._control: dict[str, Tensor] = {}
        self._population = 1
        self._folding = _Adapters()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the adapter and each client's own correction c − c_i."""
        nodes = self.connected(grid)
        self._population = max(len(nodes), 1)
        names = {node.node_id: node.name for node in nodes}
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            own = self._controls.get(names[message.metadata.dst_node_id], {})
            correction = {
                name: control - own.get(name, torch.zeros(())) for name, control in self._control.items()
            }
            if correction:
                # Clients share one content unless each has its own.
                message = Message(
                    RecordDict({**message.content, CORRECTION: encode(correction)}),
                    dst_node_id=message.metadata.dst_node_id,
                    message_type=message.metadata.message_type,
                    group_id=message.metadata.group_id,
                )
            messages.append(message)
        return messages

    def check_train_reply(self, reply: Message, sent: Message) -> None:
        """See the base class; a reply must bring its mean gradient.

        Raises:
            ReplyError: it has none, as from another client update, or one of other keys or shapes.
        """
        super().check_train_reply(reply, sent)
        control = records_of(reply, ArrayRecord).get(MEAN_GRADIENT)
        if control is None:
            raise ReplyError(f"the reply has no {MEAN_GRADIENT!r}; set client to scaffold-sgd")
        try:
            check_arrays(control, spec_of(only_arrays(sent), "fp32"))
        except ReplyError as error:
            raise ReplyError(f"{MEAN_GRADIENT}: {error}") from error

    def accumulator(self) -> Accumulator:
        """The mean of the adapters, and the controls."""
        self._folding = _Adapters()
        return self._folding

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """X ← x + η_g mean(y_i − x) and c ← c + Σ (c_i⁺ − c_i)/N; the controls change only if the round counts."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, None
        for node, new in self._folding.controls.items():
            old = self._controls.get(node, {})
            for name, tensor in new.items():
                change = tensor - old.get(name, torch.zeros(()))
                self._control[name] = self._control.get(name, torch.zeros(())) + change / self._population
            self._controls[node] = new
        if self.server_learning_rate != 1.0:
            mean = decode(arrays)
            x = self._current
            arrays = encode(
                {name: x[name] + self.server_learning_rate * (mean[name] - x[name]) for name in mean}
            )
        return arrays, metrics

    def state_dict(self) -> dict[str, Any]:
        """The controls of the server and of every client seen."""
        return super().state_dict() | {"control": self._control, "controls": self._controls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._control = {name: tensor.clone() for name, tensor in state["control"].items()}
        self._controls = {
            node: {name: tensor.clone() for name, tensor in control.items()}
            for node, control in state["controls"].items()
        }
