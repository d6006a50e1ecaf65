"""From a table as it was found to the rows that are used: checked, cleaned, held out and limited."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedllm.data_sources import Table
from fedllm.errors import DataError
from fedllm.seeding import derive_seed
from fedllm.tasks import class_ids, label_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rows:
    """Clean rows.

    Attributes:
        columns: column name → values, all of one length: texts are not blank, labels are class names.
        origin: file or dataset, for messages.
    """

    columns: dict[str, list[Any]]
    origin: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def select(self, indices: Sequence[int]) -> Rows:
        """The rows at the indices, in their order."""
        columns = {name: [values[index] for index in indices] for name, values in self.columns.items()}
        return Rows(columns, self.origin)

    @cached_property
    def digest(self) -> str:
        """Hash of the content, whatever file it came from."""
        digest = hashlib.sha256()
        for name, values in self.columns.items():
            for value in (name, str(len(values)), *map(str, values)):
                encoded = value.encode("utf-8", errors="surrogatepass")
                digest.update(len(encoded).to_bytes(8))
                digest.update(encoded)
        return digest.hexdigest()


def find_labels(table: Table, label_column: str) -> tuple[str, ...]:
    """Class names of a table: those that its source declares, else all that occur, sorted (numbers by value).

    Raises:
        DataError: a row has no label, or there is only one class.
    """
    require_values(table, label_column, "data.label-column")
    labels = table.class_names
    if not labels:
        found = {label_text(value) for value in table.columns[label_column]}
        numeric = all(name.isdecimal() for name in found)
        labels = tuple(sorted(found, key=int) if numeric else sorted(found))
    return check_labels(labels, f"column {label_column!r} of {table.origin}")


def check_labels(labels: tuple[str, ...], origin: str) -> tuple[str, ...]:
    """Return class names that can be learned.

    Raises:
        DataError: there are fewer than two, or one occurs twice.
    """
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise DataError(f"{origin}: the class {twice[0]!r} occurs more than once in {', '.join(labels)}")
    if len(labels) < 2:
        raise DataError(f"{origin}: expected at least two classes, found {', '.join(labels) or 'none'}")
    return labels


def clean(
    table: Table, text_columns: Iterable[str], label_column: str | None, labels: tuple[str, ...]
) -> Rows:
    """Drop rows without text and turn labels into class names.

    Args:
        table: rows as they were found.
        text_columns: columns that must not be blank; the log counts the rows that are dropped for it.
        label_column: column of the class, or None.
        labels: class names in order of their ids.

    Raises:
        DataError: a label is missing or unknown, or no row is left.
    """
    columns = dict(table.columns)
    if label_column is not None:
        require_values(table, label_column, "data.label-column")
        ids = class_ids(columns[label_column], labels, table.origin)
        columns[label_column] = [labels[index] for index in ids]
    texts = [columns[name] for name in text_columns]
    kept = [row for row, values in enumerate(zip(*texts, strict=True)) if not any(map(_is_missing, values))]
    rows = Rows(columns, table.origin)
    dropped = len(rows) - len(kept)
    if not kept:
        raise DataError(f"{table.origin}: all {dropped} rows are blank in {' or '.join(text_columns)}")
    if dropped:
        names = " or ".join(text_columns)
        log.warning("%s: left out %d rows that are blank in %s", table.origin, dropped, names)
    return rows.select(kept) if dropped else rows


def require_values(table: Table, column: str, key: str) -> None:
    """Check that a column has a value in every row.

    Raises:
        DataError: it has not; names the first row (from 1) and how many there are.
    """
    missing = [row for row, value in enumerate(table.columns[column], start=1) if _is_missing(value)]
    if missing:
        raise DataError(
            f"{table.origin}: row {missing[0]} has no value in column {column!r} ({key}), and so have "
            f"{len(missing)} rows in all: fill them in or remove the rows"
        )


def hold_out(rows: Rows, fraction: float, seed: int, stratify_by: str | None) -> tuple[list[int], list[int]]:
    """Split rows at random into those for training and those held out for testing.

    Args:
        rows: at least two.
        fraction: share that is held out, in (0, 1).
        seed: decides which.
        stratify_by: column whose values are to have the same shares in both, as far as rounding allows.

    Returns:
        Indices for training and for testing, both ascending and not empty.
    """
    if len(rows) < 2:
        raise DataError(f"{rows.origin}: one row cannot be split into training and test rows")
    order = np.random.default_rng(derive_seed(seed, "hold out")).permutation(len(rows))
    if stratify_by is not None:
        _, codes = np.unique(np.asarray(rows.columns[stratify_by]), return_inverse=True)
        # The place of a row within its class, as a share of the class: the smallest are taken, so that every
        # class gives its share and the total is right even where a class is too small to give a whole row.
        counts = np.bincount(codes)
        place = np.empty(len(rows))
        for code, count in enumerate(counts):
            place[order[codes[order] == code]] = (np.arange(count) + 0.5) / count
        order = order[np.argsort(place[order], kind="stable")]
    held_out = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def limit_per_label(rows: Rows, label_column: str, most: int, seed: int) -> Rows:
    """At most so many rows of a class, drawn at random, in their order."""
    order = np.random.default_rng(derive_seed(seed, "rows per label")).permutation(len(rows))
    labels, taken = rows.columns[label_column], Counter[str]()
    kept = []
    for row in order.tolist():
        taken[labels[row]] += 1
        if taken[labels[row]] <= most:
            kept.append(row)
    return rows.select(sorted(kept))


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())
