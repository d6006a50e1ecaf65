"""Loading the frozen base model and its tokenizer for a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.model_sources import ModelSource, quiet_transformers, resolve_model


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: the transformers model, in evaluation mode on its device.
        tokenizer: with a padding token.
        heads: names of the modules that belong to the task and are trained in full; empty for causal-lm.
    """

    model: Any
    tokenizer: Any
    heads: tuple[str, ...]


def resolve_device(device: str) -> torch.device:
    """Turn ``model.device`` into a torch device.

    Raises:
        ModelError: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ModelError(f"model.device: expected auto, cpu, cuda or cuda:N, found {device!r}") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu"
        )
    return resolved


def load_base(
    model: ModelConfig, task: str, labels: tuple[str, ...], device: torch.device, seed: int
) -> BaseModel:
    """Load the base model; weights that the checkpoint does not have (a new head) are drawn from the seed.

    The caller's random state is left as it was.

    Args:
        model: source, dtype, quantisation and attention implementation.
        task: ``sequence-classification`` or ``causal-lm``.
        labels: class names in order; for sequence classification at least two.
        device: where the model goes.
        seed: of the new head.

    Raises:
        ModelError: the model is not there, does not fit the task, or cannot be held as asked for.
    """
    if task == "sequence-classification" and len(labels) < 2:
        raise ModelError(
            f"sequence-classification needs at least 2 labels, found {len(labels)}: {list(labels)}"
        )
    source = resolve_model(model)
    try:
        with quiet_transformers(), seeded(seed):
            return _load(source, model, task, labels, device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0][:500]
        raise ModelError(f"model.name={model.name!r} cannot be loaded for {task}: {reason}") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the seed inside, on every device, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of a base model, with a padding token; no weight is read.

    Raises:
        ModelError: the model is not there, or its tokenizer has no token to pad with.
    """
    try:
        with quiet_transformers():
            return _tokenizer(resolve_model(model), model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:500]
        raise ModelError(f"model.name={model.name!r}: its tokenizer cannot be loaded: {reason}") from error


def _tokenizer(source: ModelSource, model: ModelConfig) -> Any:
    at = {"revision": source.revision} if source.revision else {}
    tokenizer = AutoTokenizer.from_pretrained(source.path, **at)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.name={model.name!r}: its tokenizer has neither a padding nor an end token")
    return tokenizer


def _load(
    source: ModelSource, model: ModelConfig, task: str, labels: tuple[str, ...], device: torch.device
) -> BaseModel:
    at = {"revision": source.revision} if source.revision else {}
    tokenizer = _tokenizer(source, model)
    auto: Any
    heads: list[str]
    if task == "causal-lm":
        config = AutoConfig.from_pretrained(source.path, **at)
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise ModelError(
                f"model.name={model.name!r} is an encoder ({config.model_type}) and cannot do causal-lm; "
                'use a decoder such as packaged:smollm2, or task = "sequence-classification"'
            )
        auto, heads = AutoModelForCausalLM, []
    else:
        config = AutoConfig.from_pretrained(
            source.path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            **at,
        )
        auto, heads = AutoModelForSequenceClassification, head_names(config)
    if model.blocks:
        _shorten(config, model)
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "use_safetensors": True}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if model.quantization != "none":
        options |= {"quantization_config": _quantization(model, heads), "device_map": {"": device}}
    base, report = auto.from_pretrained(
        source.path,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=bool(heads),
        **at,
        **options,
    )
    heads = heads + _new_poolers(report, heads, model.name, task)
    if model.quantization == "none":
        base = base.to(device)
    else:
        _keep_packing(base)
    base.config.use_cache = False
    base.config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(base.eval(), tokenizer, tuple(heads))


def _shorten(config: Any, model: ModelConfig) -> None:
    """Leave out all blocks but the first: transformers then reads no weight of the others from the file."""
    there = config.num_hidden_layers
    if model.blocks > there:
        raise ModelError(f"model.blocks is {model.blocks}, but {model.name} has {there} blocks")
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: model.blocks]
    config.num_hidden_layers = model.blocks


def head_names(config: Any) -> list[str]:
    """The modules beside the body of a classification model, for example ``classifier`` or ``score``."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _quantization(model: ModelConfig, heads: list[str]) -> Any:
    config: Any = BitsAndBytesConfig
    skipped = heads or None  # None lets transformers spare the output embedding
    if model.quantization == "8bit":
        return config(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        llm_int8_skip_modules=skipped,
    )


def _keep_packing(base: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first inference on a CPU with AVX512-BF16.

    Repacking rounds the block scales to bfloat16 for good, so that what a client computes would depend on
    whether the process evaluated before; and it fails where a layer's width is no multiple of the block size.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _new_poolers(report: dict[str, Any], heads: list[str], name: str, task: str) -> list[str]:
    """Poolers that the checkpoint lacks: they belong to the task as the heads do.

    Raises:
        ModelError: other weights are missing or of another shape, so the checkpoint is of another model.
    """
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    outside = sorted(key for key in absent if not key.startswith(tuple(f"{head}." for head in heads)))
    foreign = [key for key in outside if "pooler" not in key.split(".")]
    if foreign:
        raise ModelError(
            f"model.name={name!r} does not fit {task}: its checkpoint lacks {len(foreign)} weights, "
            f"among them {', '.join(foreign[:3])}"
        )
    return sorted({key.rpartition(".")[0] for key in outside})
