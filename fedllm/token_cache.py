"""Tokenised rows, kept in memory for this process and on disk for all.

A cached set is found by what went into it: the content of the rows, the tokenizer, the chat template and the
settings of the task. So a changed file or model is never served from an old entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from safetensors import SafetensorError

import fedllm
from fedllm.config import DataConfig
from fedllm.encoded import Encoded
from fedllm.errors import DataError
from fedllm.kept import Kept
from fedllm.rows import Rows
from fedllm.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_KEPT_IN_MEMORY = 4  # sets: the training and the test rows, and those of one run before
SETS: Kept[Encoded] = Kept(
    "tokenised set", lambda encoded: encoded.input_ids.nbytes + encoded.offsets.nbytes + encoded.labels.nbytes
)
"""The tokenised rows that this process has in memory."""
_fingerprints: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, str]] = WeakKeyDictionary()


def encode_cached(
    task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: tuple[str, ...]
) -> Encoded:
    """What ``task.encode`` returns, from memory or disk where it has been done before.

    A damaged cache file is rebuilt with a warning; a folder that cannot be written costs time, not the run.

    Raises:
        DataError: as ``task.encode``.
    """
    key = cache_key(task, rows, tokenizer, data, labels)
    return SETS.get(
        key, lambda: _from_disk_or_encode(key, task, rows, tokenizer, data, labels), _KEPT_IN_MEMORY
    )


def clear_memory() -> None:
    """Forget the sets in memory; files stay."""
    SETS.clear()


def cache_folder(data: DataConfig) -> Path:
    """Folder of the cached sets: ``data.cache-dir``, or a folder in the user's cache."""
    from fedllm.model_sources import cache_dir

    return Path(data.cache_dir).expanduser().absolute() if data.cache_dir else cache_dir() / "tokens"


def cache_key(
    task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: tuple[str, ...]
) -> str:
    """Hash of everything that the tokenised rows depend on."""
    parts = {
        "version": fedllm.__version__,
        "task": task.name,
        "columns": task.columns(data),
        "rows": rows.digest,
        "labels": labels,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max-length": data.max_length,
        "system-prompt": data.system_prompt,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does to text: vocabulary, merges, rules, special tokens, chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    mutable = json.dumps([len(tokenizer), tokenizer.chat_template, special], sort_keys=True, default=str)
    known = _fingerprints.get(tokenizer)
    if known is not None and known[0] == mutable:
        return known[1]
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # The last call's padding and truncation, which every call sets anew.
        content["padding"] = content["truncation"] = None
    else:
        content = tokenizer.get_vocab()
    identity = json.dumps([type(tokenizer).__name__, mutable, content], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    _fingerprints[tokenizer] = (mutable, fingerprint)
    return fingerprint


def _from_disk_or_encode(
    key: str,
    task: Task,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    labels: tuple[str, ...],
) -> Encoded:
    path = cache_folder(data) / f"{key}.safetensors"
    if (found := _read(path, len(rows))) is not None:
        return found
    with _exclusive(path) as usable:
        # Another process may have tokenised the same rows while this one waited for the lock.
        if usable and (found := _read(path, len(rows), quiet=True)) is not None:
            return found
        log.info("tokenising %d rows of %s", len(rows), rows.origin)
        encoded = task.encode(rows.columns, tokenizer, data, labels)
        if usable:
            _write(encoded, path)
    return encoded


def _read(path: Path, rows: int, *, quiet: bool = False) -> Encoded | None:
    try:
        encoded = Encoded.load(path)
        if len(encoded) != rows:
            raise DataError(f"{path} has {len(encoded)} examples instead of {rows}")
    except FileNotFoundError:
        return None
    except (DataError, OSError) as error:
        if not quiet:
            log.warning("tokenising again: %s", error)
        return None
    return encoded


def _write(encoded: Encoded, path: Path) -> None:
    temporary = path.with_suffix(".tmp")  # one name will do under the lock, and a kill leaves no litter
    try:
        encoded.save(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("tokenised rows were not kept in %s: %s; set data.cache-dir", path.parent, error)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Lock a cache file, so that of several processes one does the work; false if its folder is unusable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        log.warning("tokenised rows cannot be kept in %s: %s; set data.cache-dir", path.parent, error)
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
