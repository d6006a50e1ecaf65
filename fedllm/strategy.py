"""The base of fedllm's strategies: a Flower ``Strategy`` made of a plan, an accumulator and a server optimiser.

``start`` runs the round loop of :mod:`fedllm.rounds`; everything else follows Flower's interface, so a strategy can be
dropped into any ServerApp. A method overrides as little as it needs:

* :meth:`BaseStrategy.prepare` – what it must know of the run,
* :meth:`BaseStrategy.select` – whom to ask,
* :meth:`BaseStrategy.arrays_for` and :meth:`BaseStrategy.config_for` – what each client gets,
* :meth:`BaseStrategy.accumulator` – how replies are folded,
* ``server_optimizer`` – what becomes of the result,
* :meth:`BaseStrategy.state_dict` – what a checkpoint must keep.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import Field

from fedllm.accumulate import Accumulator, MetricsMean, Reply
from fedllm.aggregation import AdapterAggregation, leading, remainder
from fedllm.config import AggregationName, RankList, RunConfig
from fedllm.errors import ConfigError, PlanError
from fedllm.events import EventBus
from fedllm.nodes import NodeInfo, name_of
from fedllm.records import (
    ADAPTER,
    FROZEN,
    NUM_EXAMPLES,
    SERVER_ROUND,
    UPLOAD_CODEC,
    Codec,
    ReplyKind,
    ReplySpec,
    check_num_examples,
    check_reply,
    decode,
    encode,
    encode_like,
    only_arrays,
    only_metrics,
    records_of,
    release,
    spec_of,
)
from fedllm.seeding import derive_seed

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

logger = logging.getLogger(__name__)

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


@runtime_checkable
class ServerOptimizer(Protocol):
    """Turns the folded result of a round into the next global model.

    If it has an attribute ``diagnostics``, numbers by name that tell of its last step, they become metrics of the round
    with the prefix ``server-``.
    """

    def step(
        self, server_round: int, current: Mapping[str, torch.Tensor], folded: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The next global model, float32, from the current one and the folded replies, which may be taken out."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        ...


class BaseStrategy(Strategy):
    """Sample clients, send them the global adapter, fold what they return.

    Args:
        fraction_train: share of the nodes that train in a round.
        fraction_evaluate: share of the nodes that evaluate after a round.
        min_train_nodes: at least so many train, whatever the fraction.
        min_evaluate_nodes: at least so many evaluate, unless ``fraction_evaluate`` is 0.
        min_available_nodes: nodes that must be connected before the first round.
        weighted_by_key: the metric of a reply that weighs it.
        arrayrecord_key: name of the arrays in messages.
        configrecord_key: name of the configuration in messages.
        seed: seed of the sampling; the same seed asks the same clients in the same rounds.
        download_codec: how the global adapter travels to the clients.
        server_optimizer: what becomes of the folded replies; None: they are the next global adapter.
        aggregation: how adapters are averaged, see :mod:`fedllm.aggregation`.
        client_ranks: ranks of the clients in turn; empty: all have the global adapter's.
        accumulator_rank: largest rank of a product that the server keeps between rounds; 0: no limit.

    Raises:
        ConfigError: an aggregation that this strategy, or its server optimiser, does not go with.
    """

    reads: ClassVar[ReplyKind] = ADAPTER
    """What the arrays of a reply must be; a client update that sends something else is refused before the run."""
    plans_ranks: ClassVar[bool] = False
    """Whether clients of this strategy hold adapters of several forms: then ``auto`` is ``exact``."""

    def __init__(
        self,
        *,
        fraction_train: Fraction = 1.0,
        fraction_evaluate: Fraction = 1.0,
        min_train_nodes: Count = 1,
        min_evaluate_nodes: Count = 1,
        min_available_nodes: Count = 1,
        weighted_by_key: str = NUM_EXAMPLES,
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        seed: int = 0,
        download_codec: Codec = "fp32",
        server_optimizer: ServerOptimizer | None = None,
        aggregation: AggregationName = "auto",
        client_ranks: RankList = (),
        accumulator_rank: Count = 0,
    ) -> None:
        self._check_own_ways(aggregation, client_ranks)
        if aggregation == "auto" and self.plans_ranks:
            aggregation = "exact"
        self.adapters = AdapterAggregation(aggregation, client_ranks, accumulator_rank, server_optimizer)
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes
        self.min_evaluate_nodes = min_evaluate_nodes
        self.min_available_nodes = min_available_nodes
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.seed = seed
        self.download_codec: Codec = download_codec
        self.server_optimizer = server_optimizer
        self.nodes: Sequence[NodeInfo] = ()
        self.outdated: set[int] = set()
        self._current: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, str] = {}
        self._sent: dict[int, ArrayRecord] = {}
        self._offered: dict[str, torch.Tensor] = {}
        self._at_rank: dict[int, ArrayRecord] = {}

    def _check_own_ways(self, aggregation: AggregationName, client_ranks: Sequence[int]) -> None:
        """A method that folds replies, or deals arrays, in a way of its own has no use for the switch."""
        cls = type(self)
        for key, value, hook in (
            ("lora.aggregation", "" if aggregation == "auto" else aggregation, "accumulator"),
            ("lora.client-ranks", client_ranks, "accumulator"),
            ("lora.client-ranks", client_ranks, "arrays_for"),
        ):
            if value and getattr(cls, hook) is not getattr(BaseStrategy, hook):
                raise ConfigError(
                    f"{key} is {value}, but {cls.__name__} has a way of its own; leave it unset"
                )

    # ------------------------------------------------------------------ plan

    def prepare(self, config: RunConfig, bundle: ModelBundle, events: EventBus) -> None:
        """Take what a fedllm run knows beforehand, once, before the first round; by default nothing is needed.

        Args:
            config: of the run.
            bundle: the server's model with its initial adapter.
            events: where the strategy may tell what it does.

        Raises:
            FedLLMError: the strategy cannot do this run.
        """

    def close(self) -> None:
        """Give back what the strategy holds besides memory; called once, after the last round or a failure."""

    def connected(self, grid: Grid) -> Sequence[NodeInfo]:
        """The nodes to choose from: those that the round loop described, else whatever the grid knows."""
        return self.nodes or [NodeInfo(i, str(i), (1, i, "")) for i in sorted(grid.get_node_ids())]

    def select(
        self, server_round: int, nodes: Sequence[NodeInfo], count: int, purpose: str
    ) -> list[NodeInfo]:
        """Choose ``count`` nodes, the same ones for the same seed, round and set of nodes; in stable order."""
        chooser = random.Random(derive_seed(self.seed, server_round, purpose))
        chosen = chooser.sample(range(len(nodes)), min(count, len(nodes)))
        return [nodes[index] for index in sorted(chosen)]

    def arrays_for(self, node: NodeInfo, arrays: ArrayRecord) -> ArrayRecord:
        """The arrays that a client gets: ``arrays``, the encoded global adapter, or its leading ranks."""
        rank = self.adapters.ranks.of(node)
        if rank is None:
            return arrays
        if rank not in self._at_rank:
            self._at_rank[rank] = encode(leading(self._offered, rank), self.download_codec)
        return self._at_rank[rank]

    def config_for(self, node: NodeInfo, config: ConfigRecord) -> ConfigRecord:
        """The configuration that a client gets; return a copy to change it for one client."""
        return config

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages for the clients that train in this round, in stable order."""
        self._current = decode(arrays)
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        if self.fraction_train == 0:
            return []
        return self._messages(
            server_round, arrays, config, grid, MessageType.TRAIN, self.fraction_train, self.min_train_nodes
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages for the clients that evaluate after this round; none if ``fraction_evaluate`` is 0."""
        if self.fraction_evaluate == 0:
            return []
        return self._messages(
            server_round,
            arrays,
            config,
            grid,
            MessageType.EVALUATE,
            self.fraction_evaluate,
            self.min_evaluate_nodes,
        )

    def _messages(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        kind: str,
        fraction: float,
        minimum: int,
    ) -> list[Message]:
        nodes = self.connected(grid)
        if not nodes:
            raise PlanError(f"round {server_round}: no node is connected")
        chosen = self.select(server_round, nodes, max(int(len(nodes) * fraction), minimum), kind)
        config[SERVER_ROUND] = server_round
        self.adapters.ranks.see(nodes)
        self._sent, self._at_rank, self._offered = {}, {}, decode(arrays)
        encoded = arrays
        frozen: ArrayRecord | None = None
        if self.adapters.name == "stack":
            frozen = encode(self.adapters.frozen(self._offered), self.download_codec)
            self._offered = self.adapters.fresh(
                self._offered, derive_seed(self.seed, server_round, "adapter")
            )
        if self.download_codec != "fp32" or self.adapters.name == "stack":
            encoded = encode(self._offered, self.download_codec)
        messages, contents = [], dict[tuple[int, int], RecordDict]()
        for node in chosen:
            own_arrays, own_config = self.arrays_for(node, encoded), self.config_for(node, config)
            self._sent[node.node_id] = own_arrays
            # Clients with the same payload share one content, which is then stored and hashed once.
            payload = (id(own_arrays), id(own_config))
            if payload not in contents:
                contents[payload] = RecordDict(
                    {
                        self.arrayrecord_key: own_arrays,
                        self.configrecord_key: own_config,
                        **self._beside(own_arrays, frozen),
                    }
                )
            messages.append(
                Message(
                    contents[payload],
                    dst_node_id=node.node_id,
                    message_type=kind,
                    group_id=str(server_round),
                )
            )
        return messages

    def _beside(self, held: ArrayRecord, frozen: ArrayRecord | None) -> dict[str, ArrayRecord]:
        """What acts beside a client's adapter without being trained, as a record of its own if there is anything.

        Under ``stack`` these are the server's products. Under ``exact`` it is what the client's ranks leave out of the
        global adapter: without it a client would learn again, in its few ranks, what the others' ranks hold already,
        and the sum of the changes would count that twice.
        """
        if frozen is not None:
            return {FROZEN: _within(frozen, held)}
        if self.adapters.name != "exact":
            return {}
        rest = remainder(self._offered, {name: array.shape for name, array in held.items()})
        return {FROZEN: encode(rest, self.download_codec)} if rest else {}

    # --------------------------------------------------------------- replies

    def reply_spec(self, sent: Message) -> ReplySpec:
        """What the arrays of a training reply must be; by default what the client was sent."""
        config = records_of(sent, ConfigRecord).get(self.configrecord_key, ConfigRecord())
        return spec_of(only_arrays(sent), config.get(UPLOAD_CODEC))  # type: ignore[arg-type]

    def check_train_reply(self, reply: Message, sent: Message) -> None:
        """Refuse a training reply that must not be folded in; extend this for further records of a method.

        Raises:
            ReplyError: the first thing that is wrong; the reply is dropped and its node is named.
        """
        check_reply(reply, self.reply_spec(sent), self.weighted_by_key)

    def open_reply(self, message: Message) -> Reply:
        """Decode a reply that has passed :func:`fedllm.records.check_reply`."""
        metrics = only_metrics(message)
        node_id = message.metadata.src_node_id
        record = only_arrays(message)
        relative = any(array.stype.endswith("+delta") for array in record.values())
        reference = decode(self._sent[node_id]) if relative else None
        name = name_of(self.nodes, node_id)
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        weight = check_num_examples(metrics, self.weighted_by_key)
        sent = self._sent.get(node_id, ArrayRecord())
        return Reply(name, weight, decode(record, reference), numbers, message.content, sent)

    def accumulator(self) -> Accumulator:
        """A fresh accumulator for a round."""
        return self.adapters.accumulator(self._current)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come, then let the server optimiser make the next global adapter."""
        accumulator, metrics, count = self.accumulator(), MetricsMean(), 0
        for message in replies:
            if message.has_error():
                continue
            reply = self.open_reply(message)
            accumulator.add(reply)
            metrics.add(reply.metrics, reply.weight)
            count += 1
            release(message)
        if count == 0:
            return None, None
        folded, found = accumulator.result(), metrics.result()
        if self.server_optimizer is not None:
            folded = self.server_optimizer.step(server_round, self._current, folded)
            told: Mapping[str, float] = getattr(self.server_optimizer, "diagnostics", {})
            found |= {f"server-{name}": value for name, value in told.items()}
        return encode_like(folded, self._dtypes), MetricRecord(dict(found))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean of the clients' metrics, weighted by their examples."""
        metrics, count = MetricsMean(), 0
        for message in replies:
            if not message.has_error():
                record = only_metrics(message)
                metrics.add(record, check_num_examples(record, self.weighted_by_key))
                count += 1
        return MetricRecord(dict(metrics.result())) if count else None

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that later rounds depend on besides the global arrays."""
        parts = {
            "server-optimizer": {} if self.server_optimizer is None else self.server_optimizer.state_dict(),
            "adapters": self.adapters.state_dict(),
        }
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        if self.server_optimizer is not None:
            self.server_optimizer.load_state_dict(state.get("server-optimizer", {}))
        self.adapters.load_state_dict(state.get("adapters", {}))

    def settings(self) -> dict[str, object]:
        """What :meth:`summary` prints, by name."""
        return {
            "fraction_train": self.fraction_train,
            "fraction_evaluate": self.fraction_evaluate,
            "server_optimizer": "none" if self.server_optimizer is None else repr(self.server_optimizer),
            "aggregation": self.adapters.name,
            "download_codec": self.download_codec,
            "seed": self.seed,
        }

    def summary(self) -> None:
        """Log the settings as a tree."""
        lines = [f"{name}: {value}" for name, value in self.settings().items()]
        for line in lines[:-1]:
            logger.info("\t├── %s", line)
        logger.info("\t└── %s", lines[-1])

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds with fedllm's loop; see :func:`fedllm.rounds.run_rounds` for more control."""
        from fedllm.exchange import LoopOptions
        from fedllm.rounds import run_rounds

        options = LoopOptions(min_nodes=self.min_available_nodes, deadline=timeout, round_timeout=timeout)
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            options=options,
        )


def _within(record: ArrayRecord, held: ArrayRecord) -> ArrayRecord:
    """The arrays of a record that belong to modules which a client holds."""
    if record.keys() <= held.keys():
        return record
    return ArrayRecord({name: array for name, array in record.items() if name in held})
