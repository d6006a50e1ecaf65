"""Which weights stand behind the name of a base model: how a server and its nodes find out that theirs differ."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.model_sources import hub_commit, resolve_model, weight_files

_DIGITS = 12


@lru_cache(maxsize=16)
def model_version(name: str, revision: str) -> str:
    """The version of a base model's weights, without loading them.

    A model of the Hugging Face hub has the commit that its revision stands for. For any other it is a hash over the
    name, type and shape of every tensor and two of its rows, which a model fine-tuned from another does not share; how
    the tensors are spread over files does not matter.

    Returns:
        ``commit …`` or ``weights …``.

    Raises:
        ModelError: the model is not there, or its weights cannot be read.
    """
    model = ModelConfig(name=name, revision=revision)
    if commit := hub_commit(model):
        return f"commit {commit[:_DIGITS]}"
    folder = Path(resolve_model(model).path)
    try:
        return f"weights {_digest(folder)[:_DIGITS]}"
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.name={name!r}: weights in {folder} cannot be read: {error}") from error


def _digest(folder: Path) -> str:
    tensors: dict[str, tuple[str, list[int], list[bytes]]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: _sample(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    digest = hashlib.sha256()
    for name, (dtype, shape, rows) in sorted(tensors.items()):
        digest.update(json.dumps([name, dtype, shape]).encode())
        for row in rows:
            digest.update(row)
    return digest.hexdigest()


def _sample(tensor: Any) -> tuple[str, list[int], list[bytes]]:
    """Type, shape, and the bytes of the first and the middle row of a tensor in a file."""
    shape = tensor.get_shape()
    rows = [tensor[at : at + 1] for at in (0, shape[0] // 2)] if shape else [tensor[...]]
    contents = [row.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for row in rows]
    return tensor.get_dtype(), shape, contents
