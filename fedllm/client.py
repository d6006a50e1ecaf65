"""What a client does with a Flower message; :mod:`fedllm.client_app` routes messages here.

Base model, tokenizer and tokenised examples stay in the process between messages.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedllm import __version__, logs, registry
from fedllm.base_models import load_tokenizer
from fedllm.config import ModelConfig, RunConfig
from fedllm.data import client_examples, label_counts, label_names
from fedllm.encoded import Encoded
from fedllm.errors import DataError, FedLLMError, PlanError
from fedllm.frozen import frozen_products
from fedllm.model_version import model_version
from fedllm.models import ModelBundle, intact, load_bundle
from fedllm.packing import PACKED, pack, unpack
from fedllm.peak_memory import PeakMemory
from fedllm.planned import Planned
from fedllm.records import (
    ADAPTER,
    ARRAYS,
    ASK_IMPORTANCE,
    ATTACK,
    ATTACK_PARAMETERS,
    CLIENT,
    CLIENT_PARAMETERS,
    CONFIG,
    FROZEN,
    LOSS_NOT_FINITE,
    METRICS,
    MODEL_VERSION,
    NUM_EXAMPLES,
    OWNED,
    SEED,
    SERVER_ROUND,
    SIMULATED,
    UPLOAD_CODEC,
    WORKERS,
    decode,
    encode,
    only_arrays,
    records_of,
)
from fedllm.resources import MEMORY, gradient_mode, memory_budget, node_resources
from fedllm.seeding import derive_seed
from fedllm.tasks import get_task
from fedllm.update import Attack, ClientUpdate, TrainJob

logger = logging.getLogger(__name__)


def node_name(context: Context) -> str:
    """The name that an operator gave the node, else its partition, else Flower's id."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", context.node_id)))


Answer = Callable[[Message, Context], Message]


def _logged(answer: Answer) -> Answer:
    """Let the log lines of an answer say for which run, round and node it is."""

    @wraps(answer)
    def logged(message: Message, context: Context) -> Message:
        if not logging.getLogger("fedllm").hasHandlers():
            logs.set_up(level=logging.WARNING)
        place: dict[str, str | int] = {
            "run_id": str(context.run_id),
            "node": node_name(context),
            "phase": answer.__name__,
        }
        number = records_of(message, ConfigRecord).get(CONFIG, ConfigRecord()).get(SERVER_ROUND)
        if isinstance(number, int):
            place["round"] = number
        with logs.bound(**place):
            return answer(message, context)

    return logged


def _unpacked(answer: Answer) -> Answer:
    """Let an answer see every array by itself; its reply is packed if the message was."""

    @wraps(answer)
    def unpacked(message: Message, context: Context) -> Message:
        was_packed = unpack(message.content)
        reply = answer(message, context)
        return Message(pack(reply.content), reply_to=message) if was_packed else reply

    return unpacked


@_logged
def describe(message: Message, context: Context) -> Message:
    """Answer ``query.describe``: resources and number of examples, or why this node cannot take part.

    No weight of the base model is read: the node may be too small to hold it as the configuration has it.
    """
    record: dict[str, Any] = {"name": node_name(context), "version": __version__, SIMULATED: _is_simulated()}
    record[PACKED] = not record[SIMULATED]
    if (workers := _simulated_workers()) is not None:
        record[WORKERS] = workers
    try:
        config = _config(context)
        _use_own_cpus()
        examples = _examples(config, context, _tokenizer(config.model.name, config.model.revision))
        device = _device(config)
        record |= {
            "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            "cpus": len(os.sched_getaffinity(0)),
            **node_resources(context.node_config, config, device, node_name(context)),
            **gradient_mode(context.node_config, node_name(context)),
            NUM_EXAMPLES: len(examples),
            MODEL_VERSION: model_version(config.model.name, config.model.revision),
        }
        if config.data.share_label_counts and config.task == "sequence-classification":
            counts = label_counts(config, *_partition(context), _node_file(context))
            record |= {"label-names": list(counts), "label-counts": list(counts.values())}
    except FedLLMError as error:
        record["error"] = str(error)
    return Message(RecordDict({CONFIG: ConfigRecord(record)}), reply_to=message)


@_logged
@_unpacked
def train(message: Message, context: Context) -> Message:
    """Answer ``train``: run the update rule that the message names on the adapter that it carries."""
    started = time.perf_counter()
    request = message.content[CONFIG]
    assert isinstance(request, ConfigRecord)
    config, budget = _planned(request, context)
    bundle, examples = _load(config, context)
    server_round, name = int(_number(request, SERVER_ROUND)), node_name(context)
    start = decode(only_arrays(message))
    bundle.load_adapter_state(start, any_ranks=True)
    seed = derive_seed(int(_number(request, SEED)), server_round, name)
    # Dropout draws from torch's global generator.
    torch.manual_seed(seed)
    peak = PeakMemory(bundle.device)
    update: ClientUpdate = registry.build(
        "clients", str(request[CLIENT]), json.loads(str(request[CLIENT_PARAMETERS]))
    )
    inputs = {
        key: decode(record) for key, record in records_of(message, ArrayRecord).items() if key != ARRAYS
    }
    job = TrainJob(
        bundle,
        get_task(config.task),
        examples,
        config.train,
        seed,
        server_round,
        name,
        start,
        owned=_names(request, OWNED),
        ask_importance=bool(request.get(ASK_IMPORTANCE, False)),
        inputs=inputs,
    )
    with intact(bundle), frozen_products(bundle.model, inputs.get(FROZEN, {})):
        result = _attack(request, name).run(update, job) if ATTACK in request else update.run(job)
    codec: Any = request[UPLOAD_CODEC]
    # A gradient is small beside the adapter: its difference to the adapter would be a poor thing to round.
    reference = start if getattr(update, "sends", ADAPTER) == ADAPTER else None
    content = RecordDict({ARRAYS: encode(result.arrays, codec, reference)})
    for record_name, tensors in result.extras.items():
        content[record_name] = encode(tensors)
    content[METRICS] = MetricRecord(
        {
            **result.metrics,
            **budget,
            NUM_EXAMPLES: result.num_examples,
            **_loss(result.loss),
            "seconds": time.perf_counter() - started,
            "peak-bytes": peak.bytes,
        }
    )
    return Message(content, reply_to=message)


@_logged
@_unpacked
def evaluate(message: Message, context: Context) -> Message:
    """Answer ``evaluate``: metrics of the adapter on the client's own examples."""
    started = time.perf_counter()
    request = records_of(message, ConfigRecord).get(CONFIG, ConfigRecord())
    config, budget = _planned(request, context)
    bundle, examples = _load(config, context)
    bundle.load_adapter_state(decode(only_arrays(message)), any_ranks=True)
    frozen = records_of(message, ArrayRecord).get(FROZEN, ArrayRecord())
    with intact(bundle), frozen_products(bundle.model, decode(frozen)):
        metrics = get_task(config.task).evaluate(
            bundle.model,
            examples,
            config.server.evaluate_batch_size,
            bundle.tokenizer.pad_token_id,
            bundle.device,
        )
    record = MetricRecord(
        {**metrics, **budget, NUM_EXAMPLES: len(examples), "seconds": time.perf_counter() - started}
    )
    return Message(RecordDict({METRICS: record}), reply_to=message)


ANSWERS: dict[str, Answer] = {"describe": describe, "train": train, "evaluate": evaluate}
"""By what a message asks for."""


def _loss(value: float) -> dict[str, float]:
    """The loss as metrics; one that is not finite would be taken for a damaged reply."""
    return {"loss": value} if math.isfinite(value) else {LOSS_NOT_FINITE: 1}


def _load(config: RunConfig, context: Context) -> tuple[ModelBundle, Encoded]:
    _use_own_cpus()
    labels = label_names(config) if config.task == "sequence-classification" else ()
    bundle = load_bundle(config, labels)
    return bundle, _examples(config, context, bundle.tokenizer)


def _examples(config: RunConfig, context: Context, tokenizer: Any) -> Encoded:
    examples = client_examples(config, tokenizer, *_partition(context), _node_file(context))
    if len(examples) == 0:
        raise DataError(f"node {node_name(context)} has no training examples")
    return examples


@lru_cache(maxsize=4)
def _tokenizer(name: str, revision: str) -> Any:
    return load_tokenizer(ModelConfig(name=name, revision=revision))


def _attack(request: ConfigRecord, name: str) -> Attack:
    """The attack that the server orders; a deployed node refuses."""
    if not _is_simulated():
        raise FedLLMError(f"node {name} is not simulated and does not attack; set attack to none")
    attack: Attack = registry.build(
        "attacks", str(request[ATTACK]), json.loads(str(request[ATTACK_PARAMETERS]))
    )
    return attack


def _is_simulated() -> bool:
    """Whether this process is a worker of Flower's simulation engine, which runs on Ray."""
    return "RAY_JOB_ID" in os.environ or "RAY_RAYLET_PID" in os.environ


def _planned(request: ConfigRecord, context: Context) -> tuple[RunConfig, dict[str, int]]:
    """The configuration with what the server planned for this node, and the budget to report with the reply.

    Raises:
        PlanError: the node has less memory now than the plan needs.
    """
    config, planned = _config(context), Planned.from_config(request)
    if planned is None:
        return config, {}
    budget = memory_budget(context.node_config, config, _device(config), node_name(context))
    if planned.bytes > budget:
        raise PlanError(
            f"node {node_name(context)}: the plan needs {planned.bytes:,} bytes, but {MEMORY} is now {budget:,}; "
            "waiting for another plan"
        )
    return planned.apply(config), {MEMORY: budget}


def _config(context: Context) -> RunConfig:
    overrides = {"model.device": device} if (device := context.node_config.get("device")) else {}
    return _parse_config(json.dumps({**context.run_config, **overrides}))


@lru_cache(maxsize=16)
def _parse_config(flat: str) -> RunConfig:
    return registry.config_from_flat(json.loads(flat))


def _partition(context: Context) -> tuple[int, int]:
    """This node's partition and how many there are; a node with a file of its own needs neither."""
    config = context.node_config
    if _node_file(context):
        return 0, 1
    try:
        return int(config["partition-id"]), int(config["num-partitions"])
    except KeyError as error:
        raise DataError(
            f"node {node_name(context)} has no {error} in its --node-config; give it partition-id and num-partitions, "
            "or a data file of its own with data-file"
        ) from None


def _node_file(context: Context) -> str:
    return str(context.node_config.get("data-file", ""))


def _use_own_cpus() -> None:
    """Use as many torch threads as the process has CPUs, whatever the job before this one has set."""
    torch.set_num_threads(_own_cpus())


@cache
def _own_cpus() -> int:
    """CPUs of the process: Ray's share in simulation, else OMP_NUM_THREADS if an operator set it, else all."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cpus = float(limit) if limit.isdecimal() else float(len(os.sched_getaffinity(0)))
    if _is_simulated():
        import ray

        if ray.is_initialized():
            assigned = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
            cpus = assigned.get("CPU", cpus)
    return max(int(cpus), 1)


def _simulated_workers() -> int | None:
    """Clients for which Ray has room at the same time; None outside of a simulation."""
    if not _is_simulated():
        return None
    import ray

    if not ray.is_initialized():
        return None
    own = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    room = ray.cluster_resources()  # type: ignore[no-untyped-call]
    shares = [(room.get(kind, 0.0), own[kind]) for kind in ("CPU", "GPU") if own.get(kind, 0.0) > 0]
    return min((int(total / share + 1e-9) for total, share in shares), default=None)


def _device(config: RunConfig) -> torch.device:
    name = config.model.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _number(record: ConfigRecord, key: str) -> float:
    value = record[key]
    if not isinstance(value, int | float):
        raise FedLLMError(f"the server sent {key}={value!r}, expected a number")
    return value


def _names(record: ConfigRecord, key: str) -> tuple[str, ...]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise FedLLMError(f"the server sent {key}={value!r}, expected a list of names")
    return tuple(str(name) for name in value)
