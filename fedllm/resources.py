"""What a node has: memory, speed and link, as an operator or a simulation set it, else as measured.

A node's ``--node-config`` has the keys below (memory also as ``memory-megabytes``); for simulated nodes the same keys
stand in the table ``simulation``, one value for each client or one for all. Speed is floating-point operations a
second, rates are bytes a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cache
from typing import get_args

import psutil
import torch

from fedllm.config import RunConfig
from fedllm.errors import PlanError
from fedllm.lora.modes import Rung

MEMORY, SPEED, UPLOAD, DOWNLOAD = "memory-bytes", "flops-per-second", "upload-rate", "download-rate"
GRADIENT_MODE = "gradient-mode"
"""In a node's ``--node-config``: how it is to get its gradients, whatever the run has for the others."""
DEFAULT_RATE = 12.5e6
"""Bytes a second of a link of which nothing is known: 100 Mbit/s."""

_MEGABYTES = "memory-megabytes"
_SIDE, _SECONDS = 384, 0.05


def node_resources(
    node_config: Mapping[str, object], config: RunConfig, device: torch.device, node: str
) -> dict[str, int | float]:
    """What this node has, for its description: its own settings first, then the simulation's, then what is measured.

    Args:
        node_config: the node's ``--node-config``.
        config: of the run; its table ``simulation`` speaks for simulated nodes.
        device: where the model runs.
        node: the node's name, for messages.

    Raises:
        PlanError: a setting is not a positive finite number, or memory is given twice; node and key are named.
    """
    return {
        MEMORY: memory_budget(node_config, config, device, node),
        SPEED: _configured(SPEED, node_config, config, node) or measured_speed(device),
        UPLOAD: _configured(UPLOAD, node_config, config, node) or DEFAULT_RATE,
        DOWNLOAD: _configured(DOWNLOAD, node_config, config, node) or DEFAULT_RATE,
    }


def memory_budget(
    node_config: Mapping[str, object], config: RunConfig, device: torch.device, node: str
) -> int:
    """Bytes that this node lets a training take; without a setting all the memory of its device.

    Raises:
        PlanError: as :func:`node_resources`.
    """
    if MEMORY in node_config and _MEGABYTES in node_config:
        raise PlanError(f"node {node}: its node-config has {MEMORY} and {_MEGABYTES}; give one of them")
    if MEMORY in node_config:
        return int(_positive(node_config[MEMORY], node, MEMORY))
    megabytes = _configured(_MEGABYTES, node_config, config, node)
    if megabytes is not None:
        return int(megabytes * 1e6)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def gradient_mode(node_config: Mapping[str, object], node: str) -> dict[str, str]:
    """The gradient mode that this node's operator has chosen for it, for its description; empty without one.

    Raises:
        PlanError: there is no such mode; node, key and the known ones are named.
    """
    if GRADIENT_MODE not in node_config:
        return {}
    if (mode := node_config[GRADIENT_MODE]) not in get_args(Rung):
        raise PlanError(
            f"node {node}: {GRADIENT_MODE} is {mode!r}, expected one of {', '.join(get_args(Rung))}"
        )
    return {GRADIENT_MODE: str(mode)}


@cache
def measured_speed(device: torch.device) -> float:
    """Floating-point operations a second of float32 matrix products; measured once in a process, in about 0.1 s."""
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    torch.mm(matrix, matrix)  # the first product pays for start-up
    _synchronise(device)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        for _ in range(8):
            torch.mm(matrix, matrix)
        _synchronise(device)
        count += 8
    return 2.0 * _SIDE**3 * count / elapsed


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _configured(key: str, node_config: Mapping[str, object], config: RunConfig, node: str) -> float | None:
    if key in node_config:
        return _positive(node_config[key], node, key)
    values: tuple[float, ...] = getattr(config.simulation, key.replace("-", "_"))
    if len(values) <= 1:
        return values[0] if values else None
    client = int(str(node_config.get("partition-id", len(values))))
    if client >= len(values):
        raise PlanError(
            f"node {node}: simulation.{key} has {len(values)} values, but none for this node; give one value for every "
            f"client, a single one for all, or the node's own {key} in its node-config"
        )
    return values[client]


def _positive(value: object, node: str, key: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise PlanError(f"node {node}: {key} is {value!r}, expected a positive number")
    return float(value)
