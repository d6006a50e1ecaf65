"""HSplitLoRA as a Flower strategy: the round goes through Flower's messages, its steps through our own stream."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fedllm.strategies.fedpipe.plan import modules_of, share_of
from fedllm.strategies.hsplitlora.cuts import ServerSide
from fedllm.strategies.hsplitlora.planning import planning_of
from fedllm.strategies.hsplitlora.server_part import SERVER, ServerRound, ServerSettings
from fedllm.strategies.hsplitlora.shares import Dealer, FixedCuts, PlannedCuts, Share
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedllm.accumulate import Accumulator, Reply
from fedllm.config import RankList, RunConfig
from fedllm.errors import ConfigError, PlanError, SplitError
from fedllm.events import EventBus
from fedllm.nodes import NodeInfo
from fedllm.planned import base_bits
from fedllm.records import (
    ASK_IMPORTANCE,
    CLIENT,
    CLIENT_PARAMETERS,
    IMPORTANCE,
    OWNED,
    UPLOAD_CODEC,
    WORKERS,
    ReplySpec,
    decode,
    encode,
    only_arrays,
    records_of,
    spec_of,
)
from fedllm.seeding import derive_seed
from fedllm.split.codec import ActivationCodec
from fedllm.split.endpoint import Certificates, split_address
from fedllm.split.model import SplitModel
from fedllm.split.server import SplitServer
from fedllm.strategy import BaseStrategy
from fedllm.tasks import Task, get_task

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

logger = logging.getLogger(__name__)

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

RULE = "split"
"""The clients' update rule."""


class HSplitLoRA(BaseStrategy):
    """Split fine-tuning with cuts and ranks by budget, merged without error (HSplitLoRA-style, arXiv 2505.02795).

    A client holds the embeddings and the first blocks, the server the rest; activations go up and their gradients come
    down on a gRPC stream beside Flower's messages (SplitLoRA, arXiv 2407.00952). Adapters of unequal rank, and blocks
    that some clients hold and the server does for others, are merged in product space. Parts of HSplitLoRA could not be
    read: smoothing of importance, choice of cuts, and merging of blocks on both sides are our reconstruction.

    ``lora.aggregation``: ``exact`` (default) restarts every round from the leading triplets of the merged product;
    ``stack`` keeps the product frozen and begins a new adapter, as in the paper.

    Args:
        cuts: blocks on the clients, in turn; empty: planned for each node by its memory and speed.
        labels: ``server``: labels go up and the head runs there, as in the paper; ``client``: they stay, and the head
            runs on the client (U-shape).
        mode: ``parallel``: one step of the server for the whole cohort; ``sequential``: one for each client.
        address: where the split server listens; port 0 takes a free one. Outside of 127.0.0.1 it needs a certificate.
        public_address: under which nodes reach it; empty: the address itself.
        certificate: PEM file with the server's certificate chain; empty: no TLS.
        key: PEM file with its private key.
        codec: of what goes down on the stream: fp32, bf16, fp16 or int8; ``split.codec`` is that of what goes up.
        server_learning_rate: of the server's adapters; 0: ``train.learning-rate``.
        weight_decay: of the server's optimiser.
        max_grad_norm: the server's gradient is scaled down to this norm; 0: never.
        join_timeout: seconds within which a client must open its stream.
        step_timeout: seconds that a client may take from one answer to its next packet.
        ranks: ranks that may be planned; empty: powers of two up to ``lora.rank``.
        server_flops: operations a second of the server, weighed against the nodes' when cuts are planned; 0: its time
            does not count.
        importance_settling: rounds after which the history of importance counts for more than half.
        replan_threshold: relative change of a weight's importance from which cuts and ranks are planned anew.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.

    Raises:
        ConfigError: settings that do not go together.
        SplitError: ``address`` is none.
    """

    plans_ranks = True
    needs_model = True
    """Outside of a fedllm run :meth:`prepare` must be called with the server's model."""
    trains_at_once = True
    """A step of the server takes in all clients of a round: a simulation must run all of them at the same time."""

    def __init__(
        self,
        *,
        cuts: RankList = (),
        labels: Literal["server", "client"] = "server",
        mode: Literal["parallel", "sequential"] = "parallel",
        address: str = "127.0.0.1:0",
        public_address: str = "",
        certificate: str = "",
        key: str = "",
        codec: ActivationCodec = "fp32",
        server_learning_rate: NonNegative = 0.0,
        weight_decay: NonNegative = 0.0,
        max_grad_norm: NonNegative = 1.0,
        join_timeout: Positive = 600.0,
        step_timeout: Positive = 600.0,
        ranks: RankList = (),
        server_flops: NonNegative = 0.0,
        importance_settling: Positive = 5.0,
        replan_threshold: Positive = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.adapters.name not in ("exact", "stack"):
            raise ConfigError(
                f"lora.aggregation is {self.adapters.name}, but hsplitlora merges products: set it to exact or stack"
            )
        if bool(certificate) != bool(key):
            raise ConfigError("hsplitlora.certificate and hsplitlora.key go together; one of them is empty")
        split_address(address)
        self.cuts = cuts
        self.labels: Literal["server", "client"] = labels
        self.mode: Literal["parallel", "sequential"] = mode
        self.address, self.public_address = address, public_address
        self.certificates = Certificates(None, Path(certificate), Path(key)) if certificate else None
        self.codec: ActivationCodec = codec
        self.server_learning_rate, self.weight_decay = server_learning_rate, weight_decay
        self.max_grad_norm = max_grad_norm
        self.join_timeout, self.step_timeout = join_timeout, step_timeout
        self.ranks, self.server_flops = ranks, server_flops
        self.importance_settling, self.replan_threshold = importance_settling, replan_threshold
        self._client_ranks: Sequence[int] = kwargs.get("client_ranks", ())
        self._bundle: ModelBundle | None = None
        self._events: EventBus | None = None
        self._server: SplitServer | None = None
        self._round: ServerRound | None = None
        self._shares: dict[str, Share] = {}
        self._told: set[tuple[str, str]] = set()
        self._examples: dict[str, float] = {}
        self._scores: dict[str, tuple[float, Mapping[str, float]]] = {}
        self._chosen: Sequence[NodeInfo] = ()
        self._server_round = 0

    def _check_own_ways(self, aggregation: str, client_ranks: Sequence[int]) -> None:
        """Products are merged by the base class, and ranks in turn go with cuts in turn."""

    # ------------------------------------------------------------------ plan

    def prepare(self, config: RunConfig, bundle: ModelBundle, events: EventBus) -> None:
        """Cut the server's model, and set up whatever deals cuts and ranks.

        Raises:
            ConfigError: the configuration asks for something that split training cannot do.
            SplitError: a model that cannot be cut, or a cut that leaves one side without a block.
        """
        self._check(config)
        self._bundle, self._events = bundle, events
        self._split = SplitModel(bundle.model.get_base_model())
        for cut in self.cuts:
            self._split.check_cut(cut, "hsplitlora.cuts")
        self._task: Task = get_task(config.task)
        self._rule_parameters = dict(config.plugins.get(RULE, {}))
        self._dealer: Dealer = self._fixed(config) if self.cuts else self._planner(config)
        train = config.train
        rate = self.server_learning_rate or train.learning_rate
        self._settings = ServerSettings(
            self.labels,
            self.mode,
            rate,
            train.head_learning_rate or rate,
            self.weight_decay,
            self.max_grad_norm,
            self.join_timeout,
            self.step_timeout,
        )

    def _check(self, config: RunConfig) -> None:
        if config.client not in (RULE, "backprop"):
            raise ConfigError(
                f"client is {config.client!r}, but hsplitlora's clients follow the rule {RULE!r}; leave it unset"
            )
        if config.server.fraction_evaluate > 0:
            raise ConfigError(
                "server.fraction-evaluate is set, but clients of hsplitlora hold only a part of the model; set it to "
                "0: the server evaluates"
            )
        if config.lora.client_ranks and not self.cuts:
            raise ConfigError(
                "lora.client-ranks is set, but without hsplitlora.cuts ranks are planned; set both or none"
            )
        if (self.certificates is not None) != bool(config.plugins.get(RULE, {}).get("root-certificate")):
            raise ConfigError(
                "hsplitlora.certificate and split.root-certificate go together: the server shows the one, and nodes "
                "check it with the other, the authority that signed it; one of them is empty"
            )
        if config.model.blocks:
            raise ConfigError(
                "model.blocks is set, but hsplitlora decides how many blocks a client holds; leave it 0"
            )

    def _fixed(self, config: RunConfig) -> FixedCuts:
        assert self._bundle is not None
        full = modules_of(self._bundle.initial_state)
        blocks = {name: block for name in full if (block := self._split.block_of(name)) is not None}
        bits = base_bits(config.model)
        return FixedCuts(self.cuts, self._client_ranks, full, blocks, bits, config.train.batch_size)

    def _planner(self, config: RunConfig) -> PlannedCuts:
        assert self._bundle is not None
        width = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}
        side = ServerSide(
            self.server_flops or math.inf,
            max(config.server.min_nodes, 1),
            width[self.codec],
            self.labels == "client",
        )
        return PlannedCuts(
            *planning_of(config, self._bundle, self.ranks),
            side,
            settling=self.importance_settling,
            threshold=self.replan_threshold,
            quorum=config.server.quorum,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Deal the cuts, open the round's session and ask the clients.

        Raises:
            SplitError: the strategy has no model (it needs a fedllm run, or a call of :meth:`prepare`), or a simulation
                cannot run all clients of the round at the same time.
        """
        if self._bundle is None:
            raise SplitError(
                "hsplitlora trains a part of the model itself: call prepare(config, bundle, events) first"
            )
        self._end_round()
        self._shares = self._dealer.deal(self.connected(grid))
        self._tell_refused()
        self._examples, self._scores, self._server_round = {}, {}, server_round
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if messages:
            self._opened().begin(self._listening())
        return messages

    def _check_workers(self) -> None:
        """Refuse a round whose clients would wait for each other: a simulation with room for fewer of them."""
        chosen = self._chosen
        told = [ConfigRecord() if node.description is None else node.description for node in chosen]
        workers = [int(str(description.get(WORKERS, len(chosen)))) for description in told]
        if workers and min(workers) < len(chosen):
            raise SplitError(
                f"{len(chosen)} clients train together in a round, but this simulation runs {min(workers)} at a time: "
                f'start it by `fedllm simulate`, or give `flwr run` --federation-config "init-args-num-cpus=N" with '
                "N = clients × client-resources-num-cpus (on GPUs a smaller client-resources-num-gpus), or lower "
                "server.fraction-train"
            )

    def select(
        self, server_round: int, nodes: Sequence[NodeInfo], count: int, purpose: str
    ) -> list[NodeInfo]:
        """Choose among the nodes that can take part, and open the session for those chosen."""
        able = [node for node in nodes if node.name in self._shares]
        chosen = super().select(server_round, able, math.ceil(count * len(able) / len(nodes)), purpose)
        self._chosen = chosen
        self._check_workers()
        return chosen

    def arrays_for(self, node: NodeInfo, arrays: ArrayRecord) -> ArrayRecord:
        """The leading ranks of the modules in the client's blocks, and the heads."""
        return encode(self._held(self._shares[node.name]), self.download_codec)

    def config_for(self, node: NodeInfo, config: ConfigRecord) -> ConfigRecord:
        """The configuration with the client's cut, and how it reaches the split server."""
        share = self._shares[node.name]
        parameters = {
            **self._rule_parameters,
            "address": self._reachable(),
            "token": self._opened().tickets[node.name].token,
            "labels": self.labels,
        }
        return ConfigRecord(
            {
                **config,
                **share.planned.to_config(),
                CLIENT: RULE,
                CLIENT_PARAMETERS: json.dumps(parameters),
                OWNED: self._owned(share),
                ASK_IMPORTANCE: not self.cuts,
            }
        )

    def _owned(self, share: Share) -> list[str]:
        """Names of the tensors that a client trains: its blocks', and the heads' where the head runs on it."""
        held = self._held(share)
        return [name for name in held if self.labels == "client" or self._split.block_of(name) is not None]

    def _held(self, share: Share) -> dict[str, Tensor]:
        """A client's part of what is offered: the leading ranks of its blocks' modules, and what the head needs."""
        beyond = {
            name: rank
            for name, rank in modules_of(self._offered).items()
            if self.labels == "client" and self._split.block_of(name) is None
        }
        return share_of(self._offered, {**share.ranks, **beyond})

    def _opened(self) -> ServerRound:
        """The server's half of this round, opened for the clients that were chosen."""
        if self._round is None:
            assert self._bundle is not None
            self._round = ServerRound(
                self._bundle,
                self._split,
                {node.name: self._shares[node.name].cut for node in self._chosen},
                self._offered,
                self.adapters.frozen(self._current) if self.adapters.name == "stack" else {},
                self._task,
                self._settings,
                derive_seed(self.seed, self._server_round, "split"),
                ask_importance=not self.cuts,
            )
        return self._round

    def _listening(self) -> SplitServer:
        if self._server is None:
            assert self._bundle is not None
            self._server = SplitServer(
                self.address,
                self.certificates,
                codec=self.codec,
                model=self._bundle.config.name,
                blocks=self._split.num_blocks,
            )
        return self._server

    def _reachable(self) -> str:
        return self.public_address or f"{self.address.rpartition(':')[0]}:{self._listening().port}"

    def _tell_refused(self) -> None:
        assert self._events is not None
        for name, reason in self._dealer.refused.items():
            if (name, reason) not in self._told:
                self._told.add((name, reason))
                self._events.emit("node-rejected", node=name, reason=reason)

    # --------------------------------------------------------------- replies

    def reply_spec(self, sent: Message) -> ReplySpec:
        """A client returns what it trains."""
        config = records_of(sent, ConfigRecord)[self.configrecord_key]
        owned = config[OWNED]
        assert isinstance(owned, list)
        arrays = only_arrays(sent)
        codec: Any = config.get(UPLOAD_CODEC)
        return spec_of(ArrayRecord({str(name): arrays[str(name)] for name in owned}), codec)

    def open_reply(self, message: Message) -> Reply:
        """Decode a reply, and set aside what it tells of importance."""
        reply = super().open_reply(message)
        self._examples[reply.node] = reply.weight
        record = message.content.get(IMPORTANCE)
        if isinstance(record, ArrayRecord):
            scores = {name: float(value.sum()) for name, value in decode(record).items()}
            if all(math.isfinite(score) and score >= 0 for score in scores.values()):
                self._scores[reply.node] = (reply.weight, scores)
            else:
                self._warn(
                    f"node {reply.node}: its importance scores are not all finite and positive; they are not used"
                )
        return reply

    def accumulator(self) -> Accumulator:
        """Products of the clients, and of the server for the blocks that it did."""
        return _WithServer(super().accumulator(), self._server_replies)

    def _server_replies(self) -> Iterable[Reply]:
        round_ = self._opened()
        round_.end()
        return round_.replies(self._examples)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the clients' parts as they come, then the server's; the session ends whatever happens."""
        round_ = self._round
        try:
            arrays, metrics = super().aggregate_train(server_round, replies)
        finally:
            self._end_round()
        if round_ is None or metrics is None:
            return arrays, metrics
        own = round_.importance.scores()
        self._dealer.learn(
            server_round, self._scores | ({SERVER: (sum(self._examples.values()), own)} if own else {})
        )
        return arrays, MetricRecord({**metrics, "server-steps": round_.trainer.steps})

    def _end_round(self) -> None:
        if self._round is not None:
            round_, self._round = self._round, None
            round_.end()

    def _warn(self, message: str) -> None:
        assert self._events is not None
        self._events.emit("warning", message=f"round {self._server_round}: {message}")

    def close(self) -> None:
        """End the round and give the split server's port back."""
        self._end_round()
        if self._server is not None:
            server, self._server = self._server, None
            server.close()

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The base class's state, and what later cuts depend on."""
        state = super().state_dict()
        return state if self._bundle is None else {**state, "cuts": self._dealer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        if self._bundle is not None:
            if "cuts" not in state:
                raise PlanError("the checkpoint has no cuts: it is of a run that hsplitlora did not plan")
            self._dealer.load_state_dict(state["cuts"])

    def settings(self) -> dict[str, object]:
        """What :meth:`summary` prints, by name."""
        return super().settings() | {
            "cuts": ", ".join(map(str, self.cuts)) or "planned",
            "labels": self.labels,
            "mode": self.mode,
            "address": self.public_address or self.address,
            "tls": self.certificates is not None,
        }


class _WithServer:
    """An accumulator that takes in the server's part last.

    Args:
        clients: accumulates the clients' replies.
        server: the server's replies, asked for once the clients' are all there.
    """

    def __init__(self, clients: Accumulator, server: Callable[[], Iterable[Reply]]) -> None:
        self._clients, self._server = clients, server

    def add(self, reply: Reply) -> None:
        """Fold a client's reply in."""
        self._clients.add(reply)

    def result(self) -> dict[str, Any]:
        """The folded tensors, the server's part included."""
        for reply in self._server():
            self._clients.add(reply)
        return self._clients.result()
