"""Atomic, resumable server state: safetensors for tensors, JSON for the rest, a hash over both.

``checkpoints/round-000003/`` holds ``arrays.safetensors`` (the global adapter), ``strategy.safetensors`` and
``state.json`` (round, strategy values, history, fingerprint, file hashes). A checkpoint is written to a temporary
folder, flushed to the disk and renamed, so that a crash leaves either the whole of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy

from fedllm.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 1
_ARRAYS, _STRATEGY, _STATE = "arrays.safetensors", "strategy.safetensors", "state.json"
_TENSOR = "__tensor__"


@dataclass(frozen=True)
class ServerState:
    """Everything that the round loop needs to go on.

    Attributes:
        round: the last finished round.
        arrays: the global model after it.
        strategy: the strategy's ``state_dict``: nested dicts and lists of tensors, arrays and JSON values.
        history: metrics by kind and round, JSON values only.
    """

    round: int
    arrays: ArrayRecord
    strategy: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created when first needed.
        fingerprint: of the run's configuration; a checkpoint of another fingerprint is refused.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._keep = keep

    def save(self, state: ServerState) -> Path:
        """Write a checkpoint and forget the oldest ones.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        CheckpointError: the strategy's state holds something that cannot be stored; its place is named.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"round-{state.round:06d}"
        temporary = self._folder / f".{target.name}.{os.getpid()}"
        for torn in self._folder.glob(".round-*"):  # what a killed process left behind
            shutil.rmtree(torn, ignore_errors=True)
        try:
            temporary.mkdir()
            self._write(temporary, state)
            # After a resume the same round is written again; a directory cannot be renamed onto a full one.
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            _flush_folder(self._folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._found()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _write(self, folder: Path, state: ServerState) -> None:
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        values = _strip_tensors(state.strategy, "", tensors)
        save_numpy({name: array.numpy() for name, array in state.arrays.items()}, folder / _ARRAYS)
        save_numpy(tensors, folder / _STRATEGY)
        content = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "round": state.round,
            "array-names": list(state.arrays),
            "strategy": values,
            "history": state.history,
            "sha256": {name: _sha256(folder / name) for name in (_ARRAYS, _STRATEGY)},
        }
        body = json.dumps(content, indent=1)
        (folder / _STATE).write_text(json.dumps({"sha256": _text_hash(body), "body": body}), encoding="utf-8")
        for name in (_ARRAYS, _STRATEGY, _STATE):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def _found(self) -> list[Path]:
        """Folders of checkpoints, newest first."""
        return sorted(self._folder.glob("round-[0-9]*"), reverse=True)

    def latest(self) -> tuple[ServerState, Path] | None:
        """The newest checkpoint that is whole; damaged ones are named in the log and skipped.

        Returns:
            None if there has never been a checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is usable, or the newest belongs to another configuration.
        """
        found = self._found()
        reasons = []
        for folder in found:
            try:
                return self._read(folder), folder
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                reasons.append(f"{folder.name}: {error}")
                logger.warning("checkpoint %s is damaged and is skipped: %s", folder, error)
        if found:
            raise CheckpointError(f"no usable checkpoint in {self._folder}: {'; '.join(reasons)}")
        return None

    def _read(self, folder: Path) -> ServerState:
        envelope = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if _text_hash(envelope["body"]) != envelope["sha256"]:
            raise ValueError(f"{_STATE} does not match its hash")
        content = json.loads(envelope["body"])
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {content['format']}, expected {FORMAT}; resume it with the "
                                  "version of fedllm that wrote it")  # fmt: skip
        if content["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"{folder} belongs to another configuration (fingerprint {content['fingerprint']}, expected "
                f"{self._fingerprint}); resume with the run's own config.json or use a new run.name"
            )
        for name, expected in content["sha256"].items():
            if _sha256(folder / name) != expected:
                raise ValueError(f"{name} does not match its hash")
        arrays = load_numpy(folder / _ARRAYS)
        tensors = load_numpy(folder / _STRATEGY)
        return ServerState(
            round=content["round"],
            arrays=ArrayRecord({name: Array(arrays[name]) for name in content["array-names"]}),
            strategy=_restore_tensors(content["strategy"], tensors),
            history=content["history"],
        )


def _strip_tensors(value: Any, path: str, tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    """JSON values with every tensor replaced by a reference to ``tensors``."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        # NumPy has no bfloat16; its bits travel as integers.
        words = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        tensors[path] = words.numpy()
        return {_TENSOR: path, "kind": "bfloat16" if words is not value else "torch"}
    if isinstance(value, np.ndarray):
        # ascontiguousarray would turn a scalar array into a vector.
        tensors[path] = np.ascontiguousarray(value).reshape(value.shape)
        return {_TENSOR: path, "kind": "numpy"}
    if isinstance(value, Mapping):
        return {str(key): _strip_tensors(entry, f"{path}/{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strip_tensors(entry, f"{path}/{index}", tensors) for index, entry in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the strategy's state has a {type(value).__name__} at {path!r}; a checkpoint keeps tensors, arrays, numbers, "
        "text, lists and mappings"
    )


def _restore_tensors(value: Any, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            array = tensors[value[_TENSOR]]
            if value["kind"] == "numpy":
                return array
            tensor = torch.from_numpy(array.copy())
            return tensor.view(torch.bfloat16) if value["kind"] == "bfloat16" else tensor
        return {key: _restore_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restore_tensors(entry, tensors) for entry in value]
    return value


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
