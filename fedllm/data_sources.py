"""Where rows come from: the packaged corpus, a local file, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.chatterbot import question_answers, topic_texts
from fedllm.config import DataConfig
from fedllm.errors import DataError
from fedllm.progress_bars import no_progress_bars

if TYPE_CHECKING:
    import datasets

FILE_TYPES = (".csv", ".jsonl", ".json", ".parquet")

_HUB_SECONDS = 5.0
_ALTERNATIVES = f"without the hub use packaged:chatterbot or a local file ({', '.join(FILE_TYPES)})"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were found.

    Attributes:
        columns: column name → values, all of one length, at least one.
        origin: file or dataset, for messages.
        class_names: names of the classes in order where the source itself knows them, else empty.
    """

    columns: dict[str, list[Any]]
    origin: str
    class_names: tuple[str, ...] = ()


def source_file(source: str) -> Path | None:
    """The absolute path if a source is a file, None if it is packaged or on the hub.

    Raises:
        DataError: it is meant as a path, but there is no such file or its type is unknown.
    """
    if source.startswith("packaged:"):
        return None
    path = Path(source).expanduser().absolute()
    if path.suffix.lower() in FILE_TYPES:
        return path
    meant_as_path = path.exists() or source.startswith((".", "~", "/")) or source.count("/") > 1
    if meant_as_path:
        raise DataError(f"data file {path}: expected one of the types {', '.join(FILE_TYPES)}")
    return None


def read_source(data: DataConfig, task: str, split: str, wanted: Sequence[str]) -> Table:
    """Read columns of ``data.source``.

    Args:
        data: the source and its subset.
        task: name of the task, which decides what the packaged corpus looks like.
        split: split of a Hugging Face dataset; nothing else has any.
        wanted: names of the columns to read.

    Raises:
        DataError: the source is missing, unreadable or empty, or has no column of one of the names.
    """
    if path := source_file(data.source):
        return read_file(path, wanted, data)
    if data.source.startswith("packaged:"):
        return _read_packaged(data, task, wanted)
    return _read_hub(data, split, wanted)


def read_file(path: Path, wanted: Sequence[str], data: DataConfig) -> Table:
    """Read columns of a csv, jsonl, json (an array of objects) or parquet file; csv values are always text.

    Args:
        path: an absolute path.
        wanted: names of the columns to read.
        data: the keys that the names of the columns come from, for messages.

    Raises:
        DataError: the file is missing, of an unknown type, malformed or empty, or lacks a column.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data file {path}: expected one of the types {', '.join(FILE_TYPES)}")
    try:
        columns = reader(path, wanted, data)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # decoding, CSV, JSON and Arrow errors are ValueErrors
        raise DataError(f"data file {path} cannot be read: {type(error).__name__}: {error}") from error
    if not next(iter(columns.values())):
        raise DataError(f"data file {path} has no rows")
    return Table(columns, str(path))


def _read_csv(path: Path, wanted: Sequence[str], data: DataConfig) -> dict[str, list[Any]]:
    import pandas as pd

    try:
        header = pd.read_csv(path, nrows=0, dtype=str, encoding="utf-8-sig").columns
    except pd.errors.EmptyDataError:
        raise DataError(f"data file {path} is empty") from None
    _require_columns(wanted, list(header), str(path), data)
    with warnings.catch_warnings():
        # Rows with more fields than the header would otherwise move into the wrong columns.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            frame = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False, index_col=False)
        except pd.errors.ParserWarning:
            raise DataError(
                f"data file {path} has rows with more fields than its header: quote texts with commas"
            ) from None
    return {name: frame[name].tolist() for name in wanted}


def _read_jsonl(path: Path, wanted: Sequence[str], data: DataConfig) -> dict[str, list[Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"data file {path}, line {number}: not a JSON object: {error}") from None
    return _columns_of(rows, path, wanted, data)


def _read_json(path: Path, wanted: Sequence[str], data: DataConfig) -> dict[str, list[Any]]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list):
        raise DataError(f"data file {path}: expected an array of objects, found {type(content).__name__}")
    return _columns_of(content, path, wanted, data)


def _columns_of(rows: list[Any], path: Path, wanted: Sequence[str], data: DataConfig) -> dict[str, list[Any]]:
    if not rows:
        raise DataError(f"data file {path} has no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"data file {path}, row {number}: expected an object, found {type(row).__name__}")
    _require_columns(wanted, list(dict.fromkeys(name for row in rows for name in row)), str(path), data)
    return {name: [row.get(name) for row in rows] for name in wanted}


def _read_parquet(path: Path, wanted: Sequence[str], data: DataConfig) -> dict[str, list[Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _require_columns(wanted, file.schema_arrow.names, str(path), data)
        return dict(file.read(columns=list(wanted)).to_pydict())


def _read_packaged(data: DataConfig, task: str, wanted: Sequence[str]) -> Table:
    if data.source != "packaged:chatterbot":
        raise DataError(f"data.source: expected packaged:chatterbot, found {data.source!r}")
    columns = question_answers(data.labels) if task == "causal-lm" else topic_texts(data.labels)
    _require_columns(wanted, list(columns), data.source, data)
    return Table({name: columns[name] for name in wanted}, data.source)


def _read_hub(data: DataConfig, split: str, wanted: Sequence[str]) -> Table:
    import datasets

    origin = f"dataset {data.source!r}" + (f" ({data.subset})" if data.subset else "") + f", split {split!r}"
    _ask_hub(data.source)
    try:
        with no_progress_bars():
            dataset = datasets.load_dataset(data.source, name=data.subset or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{origin} cannot be loaded: {error}; see data.source, data.subset, data.train-split and "
            f"data.test-split; {_ALTERNATIVES}"
        ) from error
    _require_columns(wanted, dataset.column_names, origin, data)
    if len(dataset) == 0:
        raise DataError(f"{origin} has no rows")
    columns = {name: _hub_column(dataset, name) for name in wanted}
    label = dataset.features.get(data.label_column) if data.label_column in wanted else None
    return Table(columns, origin, tuple(getattr(label, "names", ())))


def _hub_column(dataset: datasets.Dataset, name: str) -> list[Any]:
    values = list(dataset[name])
    names = getattr(dataset.features[name], "names", None)  # of a ClassLabel
    if names is None:
        return values
    return [names[value] if value is not None and value >= 0 else None for value in values]


def _ask_hub(name: str) -> None:
    """Find out in seconds whether the dataset can be had; ``load_dataset`` tries for half a minute."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if huggingface_hub.constants.is_offline_mode():
        return  # load_dataset then takes it from its cache or says at once that it is not there
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except HFValidationError:
        reason = "is neither a file nor of the form of a Hugging Face id (owner/name)"
    except GatedRepoError:
        reason = "is gated on the Hugging Face hub; ask for access there and run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a file nor on the Hugging Face hub, or private there (`hf auth login`)"
    except (httpx.HTTPError, OSError) as error:
        reason = (
            f"cannot be had: the Hugging Face hub cannot be reached ({type(error).__name__}: {error}); "
            "if the dataset is in the local cache, set HF_HUB_OFFLINE=1"
        )
    else:
        return
    raise DataError(f"data.source={name!r} {reason}; {_ALTERNATIVES}")


def _require_columns(wanted: Iterable[str], found: list[str], origin: str, data: DataConfig) -> None:
    for column in wanted:
        if column in found:
            continue
        by_lower = {str(name).lower(): str(name) for name in found}
        near = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.5)
        hint = f"; did you mean {by_lower[near[0]]!r}?" if near else ""
        raise DataError(
            f"{origin} has no column {column!r} ({_key_of(column, data)}); "
            f"found {', '.join(map(str, found))}{hint}"
        )


def _key_of(column: str, data: DataConfig) -> str:
    keys = ("text_column", "label_column", "prompt_column", "response_column", "id_column")
    return " or ".join(f"data.{key.replace('_', '-')}" for key in keys if getattr(data, key) == column)
