"""What a client does with a Flower message; :mod:`fedllm.client_app` routes messages here.

Base model, tokenizer and tokenised examples stay in the process between messages.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from functools import cache
from typing import Any

import psutil
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedllm import __version__, registry
from fedllm.config import RunConfig
from fedllm.data import client_examples, label_counts, label_names
from fedllm.encoded import Encoded
from fedllm.errors import DataError, FedLLMError
from fedllm.models import ModelBundle, load_bundle
from fedllm.records import (
    ARRAYS,
    CLIENT,
    CLIENT_PARAMETERS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    SEED,
    SERVER_ROUND,
    UPLOAD_CODEC,
    decode,
    encode,
    only_arrays,
)
from fedllm.seeding import derive_seed
from fedllm.tasks import get_task
from fedllm.update import ClientUpdate, TrainJob

logger = logging.getLogger(__name__)


def node_name(context: Context) -> str:
    """The name that an operator gave the node, else its partition, else Flower's id."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", context.node_id)))


def describe(message: Message, context: Context) -> Message:
    """Answer ``query.describe``: resources and number of examples, or why this node cannot take part."""
    record: dict[str, Any] = {"name": node_name(context), "version": __version__}
    try:
        config = _config(context)
        _, examples = _load(config, context)
        device = _device(config)
        record |= {
            "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            "cpus": len(os.sched_getaffinity(0)),
            "memory-bytes": _memory_bytes(device),
            NUM_EXAMPLES: len(examples),
        }
        if config.data.share_label_counts and config.task == "sequence-classification":
            counts = label_counts(config, *_partition(context), _node_file(context))
            record |= {"label-names": list(counts), "label-counts": list(counts.values())}
    except FedLLMError as error:
        record["error"] = str(error)
    return Message(RecordDict({CONFIG: ConfigRecord(record)}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Answer ``train``: run the update rule that the message names on the adapter that it carries."""
    started = time.perf_counter()
    config = _config(context)
    bundle, examples = _load(config, context)
    request = message.content[CONFIG]
    assert isinstance(request, ConfigRecord)
    server_round, name = int(_number(request, SERVER_ROUND)), node_name(context)
    start = decode(only_arrays(message))
    bundle.load_adapter_state(start)
    seed = derive_seed(int(_number(request, SEED)), server_round, name)
    # Dropout draws from torch's global generator.
    torch.manual_seed(seed)
    if bundle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bundle.device)
    update: ClientUpdate = registry.build(
        "clients", str(request[CLIENT]), json.loads(str(request[CLIENT_PARAMETERS]))
    )
    result = update.run(
        TrainJob(bundle, get_task(config.task), examples, config.train, seed, server_round, name, start)
    )
    codec: Any = request[UPLOAD_CODEC]
    content = RecordDict({ARRAYS: encode(result.arrays, codec, start)})
    for record_name, tensors in result.extras.items():
        content[record_name] = encode(tensors)
    content[METRICS] = MetricRecord(
        {
            **result.metrics,
            NUM_EXAMPLES: result.num_examples,
            "loss": result.loss,
            "seconds": time.perf_counter() - started,
            "peak-bytes": _peak_bytes(bundle.device),
        }
    )
    return Message(content, reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Answer ``evaluate``: metrics of the adapter on the client's own examples."""
    started = time.perf_counter()
    config = _config(context)
    bundle, examples = _load(config, context)
    bundle.load_adapter_state(decode(only_arrays(message)))
    metrics = get_task(config.task).evaluate(
        bundle.model,
        examples,
        config.server.evaluate_batch_size,
        bundle.tokenizer.pad_token_id,
        bundle.device,
    )
    record = MetricRecord({**metrics, NUM_EXAMPLES: len(examples), "seconds": time.perf_counter() - started})
    return Message(RecordDict({METRICS: record}), reply_to=message)


def _load(config: RunConfig, context: Context) -> tuple[ModelBundle, Encoded]:
    _use_own_cpus()
    labels = label_names(config) if config.task == "sequence-classification" else ()
    bundle = load_bundle(config, labels)
    examples = client_examples(config, bundle.tokenizer, *_partition(context), _node_file(context))
    if len(examples) == 0:
        raise DataError(f"node {node_name(context)} has no training examples")
    return bundle, examples


def _config(context: Context) -> RunConfig:
    overrides = {"model.device": device} if (device := context.node_config.get("device")) else {}
    return _parse_config(json.dumps({**context.run_config, **overrides}))


@cache
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


@cache
def _use_own_cpus() -> None:
    """Use as many torch threads as the process has CPUs: Ray's share in simulation, else those it may run on."""
    cpus = float(len(os.sched_getaffinity(0)))
    if "RAY_JOB_ID" in os.environ or "RAY_RAYLET_PID" in os.environ:
        import ray

        if ray.is_initialized():
            assigned = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
            cpus = assigned.get("CPU", cpus)
    torch.set_num_threads(max(int(cpus), 1))


def _device(config: RunConfig) -> torch.device:
    name = config.model.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def _peak_bytes(device: torch.device) -> int:
    """Peak memory: of this job on a GPU, of the process since its start on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _number(record: ConfigRecord, key: str) -> float:
    value = record[key]
    if not isinstance(value, int | float):
        raise FedLLMError(f"the server sent {key}={value!r}, expected a number")
    return value
