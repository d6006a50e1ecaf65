"""Who gets which rows: flwr-datasets' partitioners behind one function of row indices.

Rows are shuffled from the seed before they are dealt, so that the partitioners that deal contiguous blocks
(iid, sizes) do not hand out the order of the file. Every row goes to exactly one client, unless data.sizes
adds up to less than there is.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm.config import DataConfig
from fedllm.errors import DataError
from fedllm.progress_bars import no_progress_bars
from fedllm.seeding import derive_seed

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

log = logging.getLogger(__name__)

BY_LABEL = frozenset({"dirichlet", "pathological", "shard"})  # partitioners that look at the label of a row
BY_ID = frozenset({"natural-id"})

_PATHOLOGICAL_DRAWS = 20
_SHOWN_SIZES = 20


def partition_rows(data: DataConfig, keys: Sequence[Any], num_partitions: int, seed: int) -> list[list[int]]:
    """Deal rows to clients.

    Args:
        data: the partitioner and its parameters.
        keys: one sortable value a row: its label for the partitioners in :data:`BY_LABEL`, its owner for
            natural-id; only their number counts for the others.
        num_partitions: number of clients, at least 1.
        seed: decides everything random.

    Returns:
        Row indices of every client, disjoint, at least one each.

    Raises:
        DataError: the rows cannot be dealt so that every client gets one; names the client, the sizes and the
            key to change.
    """
    rows = len(keys)
    if num_partitions < 1:
        raise DataError(f"the number of partitions must be at least 1, found {num_partitions}")
    if rows < num_partitions:
        raise DataError(
            f"{rows} training rows cannot be dealt to {num_partitions} clients, one row each at least: use "
            "more rows (data.train-rows, data.max-rows-per-label, data.test-fraction) or fewer clients"
        )
    order = np.random.default_rng(derive_seed(seed, "row order")).permutation(rows)
    names, codes = np.unique(np.asarray(keys), return_inverse=True)
    match data.partitioner:
        case "iid":
            parts = _iid(codes[order], num_partitions)
        case "sizes":
            parts = _sizes(data, codes[order], num_partitions)
        case "natural-id":
            parts = _natural_id(data, codes[order], num_partitions, names)
        case "shard":
            parts = _shard(data, codes[order], num_partitions, seed)
        case "pathological":
            parts = _pathological(data, codes[order], num_partitions, seed, names)
        case "dirichlet":
            parts = _dirichlet(data, codes[order], num_partitions, seed)
    _check_sizes(parts, data)
    return [order[part].tolist() for part in parts]


def _iid(codes: np.ndarray, clients: int) -> list[list[int]]:
    from flwr_datasets.partitioner import IidPartitioner

    return _deal(IidPartitioner(num_partitions=clients), codes, clients)


def _sizes(data: DataConfig, codes: np.ndarray, clients: int) -> list[list[int]]:
    from flwr_datasets.partitioner import SizePartitioner

    if len(data.sizes) != clients:
        raise DataError(
            f"data.sizes must have one size for each of the {clients} clients, found {len(data.sizes)}"
        )
    sizes = _row_counts(data.sizes, len(codes))
    _check_sizes([range(size) for size in sizes], data)
    if sum(sizes) < len(codes):
        log.warning("data.sizes leaves %d of %d training rows unused", len(codes) - sum(sizes), len(codes))
    return _deal(SizePartitioner(partition_sizes=sizes), codes, clients)


def _natural_id(data: DataConfig, codes: np.ndarray, clients: int, ids: np.ndarray) -> list[list[int]]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    if len(ids) != clients:
        raise DataError(
            f"column {data.id_column!r} (data.id-column) has {len(ids)} different ids, and there are "
            f"{clients} clients: natural-id needs one client for each id; set the number of clients "
            f"to {len(ids)}"
        )
    return _deal(NaturalIdPartitioner(partition_by="key"), codes, clients)


def _shard(data: DataConfig, codes: np.ndarray, clients: int, seed: int) -> list[list[int]]:
    from flwr_datasets.partitioner import ShardPartitioner

    size = math.ceil(len(codes) / (clients * data.shards_per_client))
    if math.ceil(len(codes) / size) < clients:  # rounded up, the shards would not go round
        size -= 1
    # The last shard is kept although it may be smaller, for no row is to be lost; with that, flwr-datasets
    # wants the size of a shard instead of their number.
    partitioner = ShardPartitioner(
        clients, "key", shard_size=size, keep_incomplete_shard=True, seed=derive_seed(seed, "shard")
    )
    return _deal(partitioner, codes, clients)


def _pathological(
    data: DataConfig, codes: np.ndarray, clients: int, seed: int, labels: np.ndarray
) -> list[list[int]]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    per_client = data.classes_per_client
    if per_client > len(labels):
        raise DataError(
            f"data.classes-per-client is {per_client}, but the training rows have {len(labels)} classes"
        )
    if per_client * clients < len(labels):
        raise DataError(
            f"{clients} clients of {per_client} classes each cannot hold all {len(labels)} classes: "
            "raise data.classes-per-client or the number of clients"
        )
    problem = ""
    for draw in range(_PATHOLOGICAL_DRAWS):
        partitioner = PathologicalPartitioner(
            clients, "key", per_client, "first-deterministic", seed=derive_seed(seed, "pathological", draw)
        )
        try:
            parts = _deal(partitioner, codes, clients)
        except ValueError as error:
            problem = str(error).partition(". ")[0]
            continue
        missing = set(range(len(labels))) - {int(codes[index]) for part in parts for index in part}
        if not missing:
            return parts
        problem = f"class {labels[min(missing)]} belongs to no client"
    raise DataError(
        f"the pathological partitioner found no way in {_PATHOLOGICAL_DRAWS} draws to deal {len(codes)} rows "
        f"of {len(labels)} classes to {clients} clients with {per_client} classes each (last: {problem}): "
        "change data.classes-per-client, the number of clients or the seed"
    )


def _dirichlet(data: DataConfig, codes: np.ndarray, clients: int, seed: int) -> list[list[int]]:
    from flwr_datasets.partitioner import DirichletPartitioner

    wanted = max(1, data.min_partition_size)

    def deal(minimum: int) -> list[list[int]]:
        partitioner = DirichletPartitioner(
            clients, "key", float(data.alpha), minimum, seed=derive_seed(seed, "dirichlet")
        )
        return _deal(partitioner, codes, clients)

    try:
        return deal(wanted)
    except ValueError:
        sizes = [len(part) for part in deal(0)]
    smallest = int(np.argmin(sizes))
    raise DataError(
        f"the Dirichlet partitioner drew 11 times, and each time a client had fewer than {wanted} of "
        f"{len(codes)} rows; in the first draw client {smallest} had {sizes[smallest]} (all: "
        f"{_show(sizes)}): raise data.alpha (now {data.alpha:g}), lower data.min-partition-size "
        f"(now {data.min_partition_size}) or use fewer clients"
    )


def _deal(partitioner: Partitioner, codes: np.ndarray, clients: int) -> list[list[int]]:
    """Run a partitioner on a data set that carries nothing but positions and keys."""
    from datasets import Dataset

    with no_progress_bars(), warnings.catch_warnings(action="ignore"):  # warnings tell of repeated draws
        partitioner.dataset = Dataset.from_dict({"position": np.arange(len(codes)), "key": codes})
        return [list(partitioner.load_partition(client)["position"]) for client in range(clients)]


def _row_counts(sizes: Sequence[float], rows: int) -> list[int]:
    total = sum(sizes)
    if min(sizes) < 0:
        raise DataError(f"data.sizes must not be negative, found {_show(sizes)}")
    if total <= 1 + 1e-9:
        # Cumulative rounding: the counts add up to the rounded total, none is off by more than one row.
        return [int(count) for count in np.diff(np.rint(np.cumsum([0.0, *sizes]) * rows))]
    if any(size != int(size) for size in sizes):
        raise DataError(
            "data.sizes must be whole numbers of rows, or shares that add up to at most 1; found "
            f"{_show(sizes)}, which add up to {total:g}"
        )
    if total > rows:
        raise DataError(
            f"data.sizes asks for {total:g} rows ({_show(sizes)}), but there are {rows} training rows"
        )
    return [int(size) for size in sizes]


def _check_sizes(parts: Sequence[Sequence[int]], data: DataConfig) -> None:
    sizes = [len(part) for part in parts]
    if min(sizes) == 0:
        raise DataError(
            f"client {sizes.index(0)} of {len(sizes)} would have no training rows (rows of all: "
            f"{_show(sizes)}): change data.partitioner (now {data.partitioner}) or its parameters, use more "
            "rows or fewer clients"
        )


def _show(sizes: Sequence[float]) -> str:
    shown = ", ".join(f"{size:g}" for size in sizes[:_SHOWN_SIZES])
    return f"{shown}, …" if len(sizes) > _SHOWN_SIZES else shown
