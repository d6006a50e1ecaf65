"""`fedllm doctor --model … --memory …`: the gradient modes that a node can afford; no weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedllm.base_models import head_names, resolve_device
from fedllm.config import ModelConfig
from fedllm.errors import ConfigError
from fedllm.lora.memory import MemoryModel
from fedllm.lora.modes import LADDER, Mode, StepShape, mode_memory
from fedllm.lora.spec import ModelSpec
from fedllm.model_sources import quiet_transformers, resolve_model
from fedllm.model_spec import kept_attention, model_spec
from fedllm.narration import format_bytes
from fedllm.planned import base_bits, compute_bytes

_UNITS = {"": 1.0, "B": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Advice:
    """One gradient mode on a node.

    Attributes:
        mode: name of the client update.
        micro_batch: examples in memory at once.
        bytes: predicted peak, weights included.
        fits: whether that is within the node's memory.
        setting: configuration that asks for it.
    """

    mode: Mode
    micro_batch: int
    bytes: int
    fits: bool
    setting: str


def parse_bytes(text: str) -> float:
    """Bytes in a size such as ``8GB``, ``7.5 GiB`` or ``600M``.

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--memory: expected a size such as 8GB, 7.5GiB or 600MB, found {text!r}")
    number, prefix, binary = match.groups()
    factor = _UNITS[prefix.upper()]
    if binary:
        factor = {1e3: 2.0**10, 1e6: 2.0**20, 1e9: 2.0**30, 1e12: 2.0**40}.get(factor, factor)
    return float(number) * factor


def available_bytes(text: str | None, device: str) -> float:
    """The size that was given, else the memory of this machine's device."""
    if text is not None:
        return parse_bytes(text)
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        return float(torch.cuda.mem_get_info(chosen)[1])
    return float(psutil.virtual_memory().total)


def advise(
    model: ModelConfig,
    task: str,
    available: float,
    *,
    rank: int,
    batch: int,
    length: int,
    targets: str = "",
    labels: int = 2,
) -> list[Advice]:
    """Every gradient mode with its predicted peak, from the best gradient downwards.

    Args:
        model: source, dtype, quantisation, attention and device.
        task: ``sequence-classification`` or ``causal-lm``.
        available: the node's memory in bytes.
        rank: of the adapter.
        batch: examples in a step.
        length: tokens of the longest example.
        targets: ends of the names of the linear layers that have an adapter, with commas; empty: all of the blocks.
        labels: classes, for sequence classification.

    Raises:
        ModelError: the model is not there, or has no list of blocks.
    """
    spec, attention = _spec(model, task, labels)
    memory = MemoryModel(attention=attention, quantized_compute=compute_bytes(model))
    ends = tuple(f".{end.strip()}" for end in targets.split(",")) if targets else ("",)
    ranks = {weight.name: rank for weight in spec.weights if weight.name.endswith(ends)}
    shape = StepShape(ranks, base_bits(model), batch, length)
    found = []
    for mode, size in _variants(batch):
        needed = mode_memory(mode, spec, replace(shape, micro_batch=size), memory).total
        found.append(Advice(mode, size or batch, needed, needed <= available, _setting(mode, size)))
    return found


def _spec(model: ModelConfig, task: str, labels: int) -> tuple[ModelSpec, str]:
    source = resolve_model(model)
    at = {"revision": source.revision} if source.revision else {}
    attention = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    options = {"num_labels": labels} if task == "sequence-classification" else {}
    config: Any = AutoConfig.from_pretrained(source.path, **at, **options)
    auto: Any = AutoModelForSequenceClassification if options else AutoModelForCausalLM
    with torch.device("meta"), quiet_transformers():
        built = auto.from_config(config, **attention)
    heads = head_names(config) if options else ()
    return model_spec(type(built), config, heads), kept_attention(built.config, resolve_device(model.device))


def _variants(batch: int) -> Sequence[tuple[Mode, int]]:
    """The ladder with micro-batches: 0, the mode's own choice, and where a rung can cut a batch, one example."""
    whole = [(mode, 0) for mode in LADDER]
    if batch == 1:
        return whole
    position = LADDER.index("backprop-checkpointed") + 1
    return [
        *whole[:position],
        ("backprop-checkpointed", 1),
        *whole[position:-1],
        ("forward-ad", 1),
        whole[-1],
    ]


def _setting(mode: Mode, micro_batch: int) -> str:
    setting = f'client="{mode}"'
    if micro_batch == 0:
        return setting
    return f"{setting} {mode}.micro-batch-size={micro_batch}"


def render(advice: Sequence[Advice], available: float, title: str, console: Console) -> None:
    """Print the advice as a table with the first mode that fits as the verdict."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("gradient mode", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    for line in advice:
        mark = Text("fits", style="green") if line.fits else Text("too large", style="red")
        cut = "" if line.micro_batch == advice[0].micro_batch else f", {line.micro_batch} example at a time"
        table.add_row(mark, f"{line.mode}{cut}", format_bytes(line.bytes))
    console.print(table)
    best = next((line for line in advice if line.fits), None)
    if best is None:
        console.print(
            f"nothing fits {format_bytes(available)}: take a smaller model, model.quantization 4bit, or shorter "
            "examples"
        )
    else:
        console.print(f"best that fits {format_bytes(available)}: -c '{best.setting}'", soft_wrap=True)
