"""Where to cut the model for each node, and which ranks its blocks get: HSplitLoRA-style (arXiv 2505.02795).

For every cut the ranks of the client's blocks are planned by FedPipe's planner on the part of the model that the client
would hold; the server's blocks have the full rank. Among the cuts that fit a node's memory, the one with the shortest
step wins, and among those within a tenth of it the one whose weights are worth most: blocks go to whoever is faster.
The objective is our reconstruction; of the paper's only the aim, to balance client and server, is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.errors import PlanError
from fedllm.lora.budget import plan_node
from fedllm.lora.importance import Importance
from fedllm.lora.plans import NodeBudget, NodePlan, PlanOptions
from fedllm.lora.spec import ModelSpec

_NEARLY = 1.1


@dataclass(frozen=True)
class CutPlan:
    """What a node holds and trains.

    Attributes:
        cut: blocks on the client.
        client: ranks by weight, batch size, bits and predicted memory of the client's part.
        step_seconds: predicted time of one step, server and link included.
        value: gain of all weights, the server's included; at most 1.
    """

    cut: int
    client: NodePlan
    step_seconds: float
    value: float


@dataclass(frozen=True)
class ServerSide:
    """What the cuts are weighed against.

    Attributes:
        flops_per_second: of the server; infinite: its time does not count.
        clients: that share it in a step.
        activation_bytes: of one value on the wire.
        labels_on_client: whether the head runs on the clients.
    """

    flops_per_second: float = math.inf
    clients: int = 1
    activation_bytes: float = 4.0
    labels_on_client: bool = False


def client_spec(spec: ModelSpec, cut: int, labels_on_client: bool) -> ModelSpec:
    """The part of a model that a client holds: embeddings, the first blocks, and the output layer with the labels."""
    return replace(
        spec,
        blocks=spec.blocks[:cut],
        weights=tuple(weight for weight in spec.weights if weight.block < cut),
        vocabulary=spec.vocabulary if labels_on_client else 0,
        output_parameters=spec.output_parameters if labels_on_client else 0,
        head_parameters=spec.head_parameters,
    )


def plan_cut(
    budget: NodeBudget,
    spec: ModelSpec,
    importance: Importance,
    options: PlanOptions,
    server: ServerSide,
    cuts: Sequence[int],
) -> CutPlan:
    """Plan one node.

    Raises:
        PlanError: not even the smallest of the cuts fits; the node, what is needed and what it has are named.
    """
    found: list[CutPlan] = []
    refused: PlanError | None = None
    shares = dict(
        zip(
            (w.name for w in spec.weights), importance.normalized([w.name for w in spec.weights]), strict=True
        )
    )
    for cut in sorted(cuts):
        part = client_spec(spec, cut, server.labels_on_client)
        held = math.fsum(shares[weight.name] for weight in part.weights)
        own = Importance({weight.name: importance.scores[weight.name] or 0.0 for weight in part.weights})
        if not held > 0:
            own = Importance(dict.fromkeys(own.scores, 1.0))
        try:
            plan = plan_node(budget, part, own, options)
        except PlanError as error:
            refused = refused or error
            break  # a later cut needs more of everything
        value = held * plan.value + (1.0 - held)
        found.append(CutPlan(cut, plan, _step_seconds(budget, spec, plan, cut, options, server), value))
    if not found:
        assert refused is not None
        raise PlanError(f"{refused} (cut after block {min(cuts)}, the first that is allowed)")
    fastest = min(plan.step_seconds for plan in found)
    return max(
        (plan for plan in found if plan.step_seconds <= fastest * _NEARLY),
        key=lambda plan: (plan.value, -plan.step_seconds),
    )


def plan_cuts(
    budgets: Mapping[str, NodeBudget],
    spec: ModelSpec,
    importance: Importance,
    options: PlanOptions,
    server: ServerSide,
    cuts: Sequence[int],
) -> tuple[dict[str, CutPlan], dict[str, str]]:
    """Plans by node, and the reasons of those that cannot take part."""
    plans, refused = {}, {}
    for name, budget in budgets.items():
        try:
            plans[name] = plan_cut(budget, spec, importance, options, server, cuts)
        except PlanError as error:
            refused[name] = str(error)
    return plans, refused


def _step_seconds(
    budget: NodeBudget, spec: ModelSpec, plan: NodePlan, cut: int, options: PlanOptions, server: ServerSide
) -> float:
    """Forward and backward pass on both sides, and activations up and gradients down; n tokens of width h."""
    time, batch, length = options.time, plan.batch_size, options.sequence_length
    part = client_spec(spec, cut, server.labels_on_client)
    client = time.step_seconds(part, plan.ranks, plan.bits, batch, length, budget.flops_per_second)
    rest = replace(spec, blocks=spec.blocks[cut:], weights=())
    on_server = server.clients * time.base_flops(rest, 0, batch, length) / server.flops_per_second
    crossing = batch * length * spec.hidden_size * server.activation_bytes
    times = 2 if server.labels_on_client else 1
    return client + on_server + times * crossing * (1 / budget.upload_rate + 1 / budget.download_rate)
