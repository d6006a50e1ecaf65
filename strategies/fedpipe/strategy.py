"""FedPipe as a Flower strategy: plan, send every node its share, fold what comes back exactly."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from fedllm.strategies.fedpipe.plan import RoundPlan, modules_of, share_of
from fedllm.strategies.fedpipe.planner import CohortPlanner, Schedule
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field

from fedllm.accumulate import Reply
from fedllm.batches import count_steps
from fedllm.config import RankList, RunConfig
from fedllm.errors import ConfigError, PlanError, ReplyError
from fedllm.events import EventBus
from fedllm.importance_report import read_importance
from fedllm.lora.importance import Importance
from fedllm.lora.memory import MemoryModel
from fedllm.lora.plans import NodePlan, PlanOptions, ranks_up_to
from fedllm.lora.timing import TimeModel
from fedllm.nodes import NodeInfo, name_of
from fedllm.planned import Bits, Planned, compute_bytes
from fedllm.records import ASK_IMPORTANCE, IMPORTANCE, encode
from fedllm.resources import MEMORY
from fedllm.strategy import BaseStrategy

if TYPE_CHECKING:
    from fedllm.models import ModelBundle

logger = logging.getLogger(__name__)

NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class FedPipe(BaseStrategy):
    """Plan weights, ranks, batch size and base bits for every node by its budget (FedPipe-style, arXiv 2404.06448).

    Nodes train one low rank on all candidate weights first and report which of them matter; then each gets the weights
    and ranks that are worth most within its memory and the deadline, on a base of the bits that fit. What comes back is
    averaged exactly, whatever its form. Of the paper only the abstract and summaries were available: schedule, planning
    problem and aggregation are our reconstruction.

    Candidates are the modules of ``lora.target-modules`` within transformer blocks, the highest rank is ``lora.rank``,
    the largest batch ``train.batch-size``. In a Flower app that is not fedllm's the base model is not known: then
    nothing is planned, and every node gets the whole adapter.

    Args:
        warmup_rounds: rounds that find out which weights matter; 0: all count the same.
        warmup_steps: local steps in these rounds.
        probe_rank: rank of every weight in these rounds.
        replan_every: rounds by the plan before the next warm-up; 0: only a changed budget changes the plan.
        ranks: ranks that may be planned; empty: powers of two up to ``lora.rank``.
        batch_sizes: batch sizes that may be planned; empty: ``train.batch-size``, a half and a quarter of it.
        bits: widths of the base that may be planned: 32, 16, 8, 4.
        deadline: seconds that a round may take by the time model, transfers included; 0: any.
        under_training_weight: what a node loses that cannot do its steps by then; the gain of a plan is at most 1.
        gain: how the use of a rank grows: ``log``, or ``energy`` as measured in the warm-up, up to ``probe_rank``.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    plans_ranks = True

    def __init__(
        self,
        *,
        warmup_rounds: Count = 1,
        warmup_steps: Annotated[int, Field(ge=2)] = 20,
        probe_rank: Annotated[int, Field(ge=1)] = 4,
        replan_every: Count = 0,
        ranks: RankList = (),
        batch_sizes: RankList = (),
        bits: RankList = (16, 8, 4),
        deadline: NonNegative = 0.0,
        under_training_weight: NonNegative = 1.0,
        gain: Literal["log", "energy"] = "log",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.warmup_rounds = warmup_rounds
        self.warmup_steps = warmup_steps
        self.probe_rank = probe_rank
        self.replan_every = replan_every
        self.ranks = ranks
        self.batch_sizes = batch_sizes
        self.bits = bits
        self.deadline = deadline
        self.under_training_weight = under_training_weight
        self.gain: Literal["log", "energy"] = gain
        self._planner: CohortPlanner | None = None
        self._events: EventBus | None = None
        self._plan: RoundPlan | None = None
        self._whole = False
        self._left_out: set[str] = set()
        self._reports: dict[str, Importance] = {}
        self._faults: list[str] = []
        self._memory: dict[str, float] = {}
        self._asked: dict[str, int] = {}

    # ------------------------------------------------------------------ plan

    def prepare(self, config: RunConfig, bundle: ModelBundle, events: EventBus) -> None:
        """Set up the planner for this run's base model.

        Raises:
            ConfigError: the configuration fixes what is to be planned, or allows no plan.
        """
        from fedllm.model_spec import adapted_spec

        self._check(config)
        spec = adapted_spec(bundle.model, modules_of(bundle.initial_state))
        schedule = Schedule(
            self.warmup_rounds,
            self.warmup_steps,
            min(self.probe_rank, config.lora.rank),
            self.replan_every,
            self.gain,
            config.server.quorum,
        )
        self._planner = CohortPlanner(spec, self._options(config, bundle.model.config), schedule)
        self._events = events

    def _check(self, config: RunConfig) -> None:
        if config.lora.rank_pattern:
            raise ConfigError("lora.rank-pattern is set, but fedpipe plans the ranks; leave it empty")
        if config.model.quantization != "none":
            raise ConfigError(
                f"model.quantization is {config.model.quantization}, but fedpipe plans it for each node; set it to "
                "none, and fedpipe.bits to the widths that you allow"
            )
        if too_high := [rank for rank in self.ranks if rank > config.lora.rank]:
            raise ConfigError(
                f"fedpipe.ranks: {too_high[0]} exceeds lora.rank ({config.lora.rank}), the rank of the global adapter"
            )
        if wrong := [bits for bits in self.bits if bits not in (32, 16, 8, 4)]:
            raise ConfigError(f"fedpipe.bits: expected some of 32, 16, 8 and 4, found {wrong[0]}")

    def _options(self, config: RunConfig, model: Any) -> PlanOptions:
        from fedllm.model_spec import kept_attention

        # With "auto" every node decides: what a CPU keeps is never less than what a GPU does.
        device = torch.device("cpu" if config.model.device == "auto" else config.model.device)
        batch, rank, train = config.train.batch_size, config.lora.rank, config.train
        checkpointing = bool(config.plugins.get(config.client, {}).get("gradient-checkpointing", False))
        return PlanOptions(
            ranks=self.ranks or ranks_up_to(rank),
            batch_sizes=self.batch_sizes or tuple({max(batch // 4, 1), max(batch // 2, 1), batch}),
            bits=self.bits,
            sequence_length=config.data.max_length,
            steps=lambda examples, size: count_steps(examples, train.model_copy(update={"batch_size": size})),
            deadline_seconds=self.deadline or math.inf,
            under_training_weight=self.under_training_weight,
            memory=MemoryModel(
                attention=kept_attention(model, device),
                checkpointing=checkpointing,
                adapter_dropout=config.lora.dropout > 0,
                quantized_compute=compute_bytes(config.model),
            ),
            time=TimeModel(checkpointing=checkpointing),
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan, and ask the nodes that can take part, each for its share."""
        self._reports, self._faults, self._memory, self._asked = {}, [], {}, {}
        if self._planner is not None:
            plan = self._planner.plan(self.connected(grid))
            if plan is not self._plan:
                self._tell(server_round, plan)
            self._plan = plan
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {name_of(self.nodes, m.metadata.dst_node_id): m.metadata.dst_node_id for m in messages}
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes to evaluate the whole global adapter, on the base that is planned for them."""
        self._whole = True
        try:
            return super().configure_evaluate(server_round, arrays, config, grid)
        finally:
            self._whole = False

    def select(
        self, server_round: int, nodes: Sequence[NodeInfo], count: int, purpose: str
    ) -> list[NodeInfo]:
        """Choose among the nodes that can take part."""
        if self._plan is not None:
            able = [node for node in nodes if node.name in self._plan.nodes]
            count = math.ceil(count * len(able) / len(nodes))
            nodes = able
        return super().select(server_round, nodes, count, purpose)

    def arrays_for(self, node: NodeInfo, arrays: ArrayRecord) -> ArrayRecord:
        """The node's share of the global adapter; all of it for an evaluation."""
        if self._plan is None or self._whole:
            return arrays
        ranks = self._plan.nodes[node.name].ranks
        return encode(share_of(self._offered, ranks), self.download_codec)

    def config_for(self, node: NodeInfo, config: ConfigRecord) -> ConfigRecord:
        """The configuration with the node's bits, batch size and steps."""
        if self._plan is None:
            return config
        plan = self._plan.nodes[node.name]
        bits: Bits = plan.bits  # type: ignore[assignment]  # the planner chooses among fedpipe.bits
        planned = Planned(bits, plan.batch_size, plan.steps, plan.predicted_bytes)
        asked = self._plan.phase == "warm-up" and not self._whole
        return ConfigRecord({**config, **planned.to_config(), ASK_IMPORTANCE: asked})

    def _tell(self, server_round: int, plan: RoundPlan) -> None:
        assert self._planner is not None
        assert self._events is not None
        refused = self._planner.refused
        for name in sorted(refused.keys() - self._left_out):
            self._events.emit("node-rejected", node=name, reason=refused[name])
        self._left_out = set(refused)
        self._events.emit(
            "planned",
            round=server_round,
            phase=plan.phase,
            weights=self._planner.weights,
            nodes={name: _shown(node_plan) for name, node_plan in plan.nodes.items()},
            refused=refused,
        )

    # --------------------------------------------------------------- replies

    def open_reply(self, message: Message) -> Reply:
        """Decode a reply, and set aside what it tells of importance and memory."""
        reply = super().open_reply(message)
        if self._planner is None:
            return reply
        if available := reply.metrics.get(MEMORY):
            self._memory[reply.node] = available
        record = message.content.get(IMPORTANCE)
        if isinstance(record, ArrayRecord):
            try:
                self._reports[reply.node] = read_importance(reply.node, record)
            except ReplyError as error:
                self._faults.append(f"{error}; the report is not used, the adapter is")
        return reply

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies; then take in what they told, and how long the round took by the time model."""
        seen: list[str] = []
        try:
            arrays, metrics = super().aggregate_train(server_round, self._seen(replies, seen))
        finally:
            # A node that was planned for and did not deliver may have another budget by now.
            if self._planner is not None:
                self.outdated = {node_id for name, node_id in self._asked.items() if name not in seen}
        if self._planner is None or self._plan is None or metrics is None:
            return arrays, metrics
        assert self._events is not None
        seconds = {name: self._plan.nodes[name].predicted_seconds for name in seen}
        self._events.emit("round-timed", round=server_round, seconds=max(seconds.values()), nodes=seconds)
        for fault in [*self._faults, *self._planner.finish(self._reports, self._memory)]:
            self._events.emit("warning", message=f"round {server_round}: {fault}")
        return arrays, MetricRecord({**metrics, "simulated-seconds": max(seconds.values())})

    def _seen(self, replies: Iterable[Message], names: list[str]) -> Iterable[Message]:
        for message in replies:
            if not message.has_error():
                names.append(name_of(self.nodes, message.metadata.src_node_id))
            yield message

    # ----------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The base class's state, and what the next plan depends on."""
        state = super().state_dict()
        return state if self._planner is None else {**state, "planner": self._planner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        if self._planner is not None:
            if "planner" not in state:
                raise PlanError("the checkpoint has no plan: it is of a run that fedpipe did not plan")
            self._planner.load_state_dict(state["planner"])
            self._plan = self._planner.current

    def settings(self) -> dict[str, object]:
        """What :meth:`summary` prints, by name."""
        return super().settings() | {
            "warmup": f"{self.warmup_rounds} rounds of {self.warmup_steps} steps at rank {self.probe_rank}",
            "replan_every": self.replan_every or "never",
            "bits": ", ".join(map(str, self.bits)),
            "deadline": f"{self.deadline:g} s" if self.deadline else "none",
        }


def _shown(plan: NodePlan) -> dict[str, Any]:
    """A node's plan as the event tells it."""
    return {
        "bits": plan.bits,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "ranks": dict(plan.ranks),
        "bytes": plan.predicted_bytes,
        "seconds": plan.predicted_seconds,
        "under_training": plan.under_training,
        "value": plan.value,
    }
