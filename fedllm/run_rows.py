"""Which rows a run trains and tests on, and who gets which.

Rows are read, cleaned, held out, limited and dealt, in this order::

    source → clean → max-rows-per-label → hold out test rows → train-rows → partition

Every step is a function of :class:`Inputs`, by which it is cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig, RunConfig
from fedllm.data_sources import Table, read_file, read_source, source_file
from fedllm.errors import DataError
from fedllm.partition import BY_ID, BY_LABEL, partition_rows
from fedllm.rows import Rows, check_labels, clean, find_labels, hold_out, limit_per_label, require_values
from fedllm.tasks import get_task

Stamp = tuple[str, int, int]  # path, size, time of the last change: a file of another stamp is read again


@dataclass(frozen=True)
class Inputs:
    """Everything that decides which rows there are and who gets them; the key of the caches."""

    task: str
    data: DataConfig
    seed: int
    stamps: tuple[Stamp, ...]

    @property
    def label_column(self) -> str | None:
        """The column of the class, for the task that has classes."""
        return self.data.label_column if self.task == "sequence-classification" else None

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that must not be blank."""
        return tuple(name for name in get_task(self.task).columns(self.data) if name != self.label_column)


def inputs_of(config: RunConfig, node_file: str = "") -> Inputs:
    """What decides the rows of a run or, with a file of its own, of a node.

    Raises:
        DataError: ``data.source`` or ``data.test-file`` is a path of an unknown type.
    """
    if node_file:
        files = [_node_path(node_file)]
    else:
        source = source_file(config.data.source)
        test = source_file(config.data.test_file) if config.data.test_file else None
        files = [path for path in (source, test) if path is not None]
    return Inputs(config.task, config.data, config.seed, tuple(map(_stamp, files)))


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except (
        OSError
    ):  # told by whoever reads it; a run with a test file and given labels need not have the source
        return (str(path), -1, -1)
    return (str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _source_rows(inputs: Inputs) -> tuple[Rows, tuple[str, ...]]:
    """All clean rows of the training source, and the class names."""
    data = inputs.data
    wanted = list(get_task(inputs.task).columns(data))
    if data.partitioner in BY_LABEL:
        wanted.append(data.label_column)
    if data.partitioner in BY_ID:
        if not data.id_column:
            raise DataError("the natural-id partitioner needs data.id-column, the column of a row's owner")
        wanted.append(data.id_column)
    table = read_source(data, inputs.task, data.train_split, list(dict.fromkeys(wanted)))
    labels: tuple[str, ...] = ()
    if inputs.label_column is not None:
        labels = known_labels(inputs) if data.labels else find_labels(table, data.label_column)
    elif data.partitioner in BY_LABEL:
        require_values(table, data.label_column, "data.label-column")
    if data.partitioner in BY_ID:
        require_values(table, data.id_column, "data.id-column")
    return _clean(inputs, table, labels), labels


@lru_cache(maxsize=4)
def _train_and_test(inputs: Inputs) -> tuple[Rows, Rows | None]:
    """The training rows, and the test rows if they are held out of the same source."""
    data = inputs.data
    rows, _ = _source_rows(inputs)
    if data.max_rows_per_label and inputs.label_column is not None:
        rows = limit_per_label(rows, inputs.label_column, data.max_rows_per_label, inputs.seed)
    test = None
    if data.test_fraction > 0 and not data.test_file and not _has_test_split(data):
        kept, held_out = hold_out(rows, data.test_fraction, inputs.seed, inputs.label_column)
        rows, test = rows.select(kept), rows.select(held_out)
    return _first(rows, data.train_rows), test


def train_rows(inputs: Inputs) -> Rows:
    """The training rows of all clients together.

    Raises:
        DataError: the source cannot be read, or a label is missing or unknown.
    """
    return _train_and_test(inputs)[0]


def test_rows(inputs: Inputs) -> Rows | None:
    """The test rows, from their own file or split or held out of the source; None if there are to be none.

    Raises:
        DataError: their source cannot be read, or a label is missing or unknown.
    """
    data = inputs.data
    if data.test_file or _has_test_split(data):
        rows: Rows | None = _read_test_rows(inputs)
    else:
        rows = _train_and_test(inputs)[1]
    return None if rows is None else _first(rows, data.test_rows)


@lru_cache(maxsize=4)
def _read_test_rows(inputs: Inputs) -> Rows:
    data = inputs.data
    wanted = get_task(inputs.task).columns(data)
    if data.test_file:
        table = read_file(Path(data.test_file).expanduser().absolute(), wanted, data)
    else:
        table = read_source(data, inputs.task, data.test_split, wanted)
    return _clean(inputs, table, known_labels(inputs))


def known_labels(inputs: Inputs) -> tuple[str, ...]:
    """Class names in order of their ids, read from the source if not configured; empty for causal-lm.

    Raises:
        DataError: the source cannot be read, a row has no label, or there are not two different classes.
    """
    if inputs.label_column is None:
        return ()
    if inputs.data.labels:
        return check_labels(inputs.data.labels, "data.labels")
    return _source_rows(inputs)[1]


def _node_path(node_file: str) -> Path:
    return Path(node_file).expanduser().absolute()


def node_rows(inputs: Inputs, node_file: str) -> Rows:
    """The rows of a node's own file.

    Args:
        inputs: of that file.
        node_file: the file, for the message.

    Raises:
        DataError: ``data.labels`` is not set, or the file cannot be read or has unknown labels.
    """
    if inputs.label_column is not None and not inputs.data.labels:
        raise DataError(
            f"a node has its own data file ({node_file}), which need not have all classes: set data.labels "
            "to the class names in order, the same for all nodes"
        )
    return _read_node_rows(inputs)


@lru_cache(maxsize=4)
def _read_node_rows(inputs: Inputs) -> Rows:
    ((path, _, _),) = inputs.stamps
    table = read_file(Path(path), get_task(inputs.task).columns(inputs.data), inputs.data)
    return _clean(inputs, table, inputs.data.labels)


@lru_cache(maxsize=8)
def partitions(inputs: Inputs, num_partitions: int) -> list[list[int]]:
    """Indices of the training rows of every client.

    Raises:
        DataError: see :func:`train_rows` and :func:`fedllm.partition.partition_rows`.
    """
    data, rows = inputs.data, train_rows(inputs)
    column = {**dict.fromkeys(BY_LABEL, data.label_column), **dict.fromkeys(BY_ID, data.id_column)}
    name = column.get(data.partitioner)
    keys: list[Any] = rows.columns[name] if name else list(range(len(rows)))
    return partition_rows(data, keys, num_partitions, inputs.seed)


def partition(inputs: Inputs, partition_id: int, num_partitions: int) -> list[int]:
    """Indices of the training rows of one client.

    Raises:
        DataError: there is no such partition; or as :func:`partitions`.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition-id must be from 0 to num-partitions - 1 = {num_partitions - 1}, found {partition_id}"
        )
    return partitions(inputs, num_partitions)[partition_id]


def _clean(inputs: Inputs, table: Table, labels: tuple[str, ...]) -> Rows:
    return clean(table, inputs.text_columns, inputs.label_column, labels)


def _has_test_split(data: DataConfig) -> bool:
    on_hub = source_file(data.source) is None and not data.source.startswith("packaged:")
    return on_hub and data.test_split != ""


def _first(rows: Rows, count: int) -> Rows:
    return rows.select(range(count)) if 0 < count < len(rows) else rows


def clear_row_caches() -> None:
    """Forget all rows that this process has read and dealt."""
    for function in (_source_rows, _train_and_test, _read_test_rows, _read_node_rows, partitions):
        function.cache_clear()
