"""The data of a run as the apps see it: class names, examples of every client, test examples, a check before.

Everything is a function of the configuration and the files, and cached in the process: a process that serves
many clients reads and tokenises once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.config import RunConfig
from fedllm.encoded import Encoded
from fedllm.generation import check_generation
from fedllm.rows import Rows
from fedllm.run_rows import (
    clear_row_caches,
    inputs_of,
    known_labels,
    node_rows,
    partition,
    partitions,
    test_rows,
    train_rows,
)
from fedllm.tasks import get_task
from fedllm.token_cache import clear_memory, encode_cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataSummary:
    """What the check of the data found.

    Attributes:
        origin: file or dataset of the training rows.
        rows: training rows.
        test_rows: test rows; 0: none.
        labels: class name → training rows; empty for a task without classes.
        majority_share: share of the most frequent class among the test rows (without them, the training
            rows): the accuracy of a model that learned nothing else; None for a task without classes.
        client_rows: training rows of every client.
    """

    origin: str
    rows: int
    test_rows: int
    labels: dict[str, int]
    majority_share: float | None
    client_rows: tuple[int, ...]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Heading and text of every line that a person wants to see before the run starts."""
        yield "data", f"{self.origin}: {self.rows:,} training rows, {self.test_rows:,} test rows"
        if self.majority_share is not None:
            counts = ", ".join(f"{name} {count:,}" for name, count in list(self.labels.items())[:12])
            more = f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else ""
            judged = "test" if self.test_rows else "training"
            yield "classes", f"{counts}{more} (largest: {self.majority_share:.1%} of the {judged} rows)"
        smallest, largest = min(self.client_rows), max(self.client_rows)
        rows = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
        yield "clients", f"{len(self.client_rows)} with {rows} rows each"


def label_names(config: RunConfig) -> tuple[str, ...]:
    """Class names in order of their ids; empty for causal-lm.

    They are ``data.labels`` or, without that, what the source declares, or the sorted labels of its training
    rows.

    Raises:
        DataError: the source cannot be read, a row has no label, or there are not two different classes.
    """
    return known_labels(inputs_of(config))


def client_examples(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    partition_id: int,
    num_partitions: int,
    node_file: str = "",
) -> Encoded:
    """The tokenised training examples of a client.

    Args:
        config: of the run.
        tokenizer: of the base model.
        partition_id: which client, from 0.
        num_partitions: number of clients.
        node_file: the node's own file, all of whose rows are its own; empty: its partition of the source.

    Raises:
        DataError: see :func:`load_client_rows`; or a label or the tokenizer does not fit.
    """
    inputs = inputs_of(config, node_file)
    task, labels = get_task(config.task), label_names(config)
    if node_file:
        return encode_cached(task, node_rows(inputs, node_file), tokenizer, config.data, labels)
    indices = partition(inputs, partition_id, num_partitions)
    return encode_cached(task, train_rows(inputs), tokenizer, config.data, labels).select(indices)


def load_client_rows(config: RunConfig, partition_id: int, num_partitions: int, node_file: str = "") -> Rows:
    """The training rows of a client; arguments as :func:`client_examples`.

    Raises:
        DataError: the source or the node's file is missing, unreadable or lacks columns; a label is missing
            or unknown; the rows cannot be dealt; a node has its own file and ``data.labels`` is not set.
    """
    inputs = inputs_of(config, node_file)
    if node_file:
        return node_rows(inputs, node_file)
    return train_rows(inputs).select(partition(inputs, partition_id, num_partitions))


def test_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Encoded | None:
    """The tokenised test examples of the server, or None if the configuration asks for none.

    Raises:
        DataError: test rows are missing, unreadable or have unknown labels.
    """
    rows = test_rows(inputs_of(config))
    if rows is None:
        return None
    return encode_cached(get_task(config.task), rows, tokenizer, config.data, label_names(config))


test_examples.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def partition_sizes(config: RunConfig, num_clients: int) -> list[int]:
    """Training rows of every client.

    Raises:
        DataError: see :func:`load_client_rows`.
    """
    return [len(part) for part in partitions(inputs_of(config), num_clients)]


def label_counts(
    config: RunConfig, partition_id: int, num_partitions: int, node_file: str = ""
) -> dict[str, int]:
    """Class name → training rows of a client, for all classes in order of their ids; empty for causal-lm.

    Raises:
        DataError: see :func:`load_client_rows`.
    """
    if config.task != "sequence-classification":
        return {}
    rows = load_client_rows(config, partition_id, num_partitions, node_file)
    return _count(rows, config.data.label_column, label_names(config))


def check_data(config: RunConfig, num_clients: int) -> DataSummary:
    """Read and deal the rows as the run will, without a tokenizer or a model.

    Raises:
        DataError: anything about the data that would stop the run.
        ConfigError: generation metrics are asked for and cannot be computed.
    """
    check_generation(config)
    inputs = inputs_of(config)
    labels = label_names(config)
    rows, test = train_rows(inputs), test_rows(inputs)
    counts = _count(rows, config.data.label_column, labels) if labels else {}
    judged = _count(test, config.data.label_column, labels) if labels and test is not None else counts
    return DataSummary(
        origin=rows.origin,
        rows=len(rows),
        test_rows=len(test) if test is not None else 0,
        labels=counts,
        majority_share=max(judged.values()) / sum(judged.values()) if labels else None,
        client_rows=tuple(partition_sizes(config, num_clients)),
    )


def clear_data_caches() -> None:
    """Forget everything that this process has read, dealt and tokenised; files of the token cache stay."""
    clear_row_caches()
    clear_memory()


def _count(rows: Rows, label_column: str, labels: tuple[str, ...]) -> dict[str, int]:
    counts = Counter(rows.columns[label_column])
    return {name: counts[name] for name in labels}
