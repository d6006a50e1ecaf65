"""Which modules of a model are adapted and with which rank: names are checked before peft sees them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.config import LoraConfig
from fedllm.errors import ModelError

_TASK_TYPES = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def build_peft_config(lora: LoraConfig, task: str, model: Any, heads: Sequence[str]) -> peft.LoraConfig:
    """Turn the adapter's configuration into peft's for this very model.

    alpha/r is the same for every module whatever its own rank, so that a rank is a capacity and no step size.

    Args:
        lora: rank, alpha, dropout, target modules and rank pattern.
        task: ``sequence-classification`` or ``causal-lm``.
        model: the transformers model that will be adapted.
        heads: module names that are trained in full.

    Raises:
        ModelError: a target module or rank pattern matches no linear layer outside the heads.
    """
    candidates = linear_layers(model, heads)
    targets = _select(lora.target_modules, candidates) if lora.target_modules else candidates
    _check_patterns(lora.rank_pattern, targets)
    alpha = lora.alpha or 2.0 * lora.rank
    return peft.LoraConfig(
        task_type=_TASK_TYPES[task],
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides by r; nothing needs an integer
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={pattern: alpha / lora.rank * rank for pattern, rank in lora.rank_pattern.items()},
        modules_to_save=list(heads) or None,
        # Conv1D (GPT-2) keeps its weight as (in, out).
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )


def linear_layers(model: Any, heads: Iterable[str]) -> list[str]:
    """Full names of the linear layers outside the heads and the output embedding, in the model's order."""
    output = model.get_output_embeddings()
    kept_whole = tuple(heads)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not any(name == head or name.startswith(f"{head}.") for head in kept_whole)
    ]


def _select(wanted: Sequence[str], candidates: Sequence[str]) -> list[str]:
    for target in wanted:
        if not any(_matches(target, name) for name in candidates):
            raise ModelError(
                f"lora.target-modules: {target!r} names no linear layer outside the heads; "
                f"{_near(target, candidates)}"
            )
    return [name for name in candidates if any(_matches(target, name) for target in wanted)]


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_patterns(patterns: Iterable[str], targets: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            expression = re.compile(rf"(.*\.)?({pattern})$")  # as peft matches it
        except re.error as error:
            raise ModelError(f"lora.rank-pattern: {pattern!r} is no regular expression: {error}") from None
        if not any(expression.match(name) for name in targets):
            raise ModelError(
                f"lora.rank-pattern: {pattern!r} matches no adapted module; {_near(pattern, targets)}"
            )


def _near(wanted: str, names: Sequence[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = difflib.get_close_matches(wanted, [*leaves, *names], n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(leaves)}"
