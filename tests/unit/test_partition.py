"""Partitioning: disjoint, covering, never empty, the same for a seed; errors that say what to change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedllm.config import DataConfig
from fedllm.errors import DataError
from fedllm.partition import partition_rows


def labels(rows: int, classes: int, seed: int = 0) -> list[str]:
    return [f"class {code}" for code in np.random.default_rng(seed).integers(0, classes, rows)]


def assert_covers(parts: list[list[int]], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert all(parts)
    assert sorted(index for part in parts for index in part) == list(range(rows))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    partitioner=st.sampled_from(["iid", "dirichlet", "pathological", "shard", "natural-id", "sizes"]),
    rows=st.integers(1, 120),
    classes=st.integers(1, 6),
    clients=st.integers(1, 12),
    per_client=st.integers(1, 4),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_rows_are_dealt_completely_or_refused(partitioner, rows, classes, clients, per_client, alpha, seed):
    keys = labels(rows, classes, seed % 1000)
    if partitioner == "natural-id":
        clients = len(set(keys))
    data = DataConfig(
        partitioner=partitioner,
        alpha=alpha,
        classes_per_client=per_client,
        shards_per_client=per_client,
        id_column="owner",
        sizes=(1 / clients,) * clients,
    )
    try:
        parts = partition_rows(data, keys, clients, seed)
    except DataError:
        # Only these can fail although there is a row for everyone.
        assume(partitioner not in ("dirichlet", "pathological"))
        assert rows < clients
        return
    assert_covers(parts, rows, clients)
    assert parts == partition_rows(data, keys, clients, seed)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "pathological", "shard", "sizes"])
def test_seed_decides(partitioner):
    data, keys = DataConfig(partitioner=partitioner, sizes=(0.5, 0.5)), labels(200, 4)
    assert partition_rows(data, keys, 2, 0) == partition_rows(data, keys, 2, 0)
    assert partition_rows(data, keys, 2, 0) != partition_rows(data, keys, 2, 1)


def test_iid_shuffles_a_sorted_file():
    parts = partition_rows(DataConfig(), ["a"] * 500 + ["b"] * 500, 5, 0)
    for part in parts:
        assert 60 < sum(index < 500 for index in part) < 140  # 100 expected, standard deviation 6.3


def test_dirichlet_follows_alpha():
    keys = labels(4000, 4)

    def share_of_largest_class(alpha: float) -> float:
        parts = partition_rows(DataConfig(partitioner="dirichlet", alpha=alpha), keys, 10, 0)
        shares = [
            max(np.unique([keys[i] for i in part], return_counts=True)[1]) / len(part) for part in parts
        ]
        return float(np.mean(shares))

    assert share_of_largest_class(1000.0) < 0.35  # 0.25 is uniform
    assert share_of_largest_class(0.1) > 0.7


def test_pathological_gives_so_many_classes_and_leaves_none_out():
    keys = labels(600, 6)
    for seed in range(10):
        parts = partition_rows(DataConfig(partitioner="pathological", classes_per_client=2), keys, 4, seed)
        assert [len({keys[index] for index in part}) for part in parts] == [2, 2, 2, 2]
        assert_covers(parts, 600, 4)


def test_shards_are_runs_of_one_label():
    keys = ["a"] * 100 + ["b"] * 100 + ["c"] * 100 + ["d"] * 100
    parts = partition_rows(DataConfig(partitioner="shard", shards_per_client=2), keys, 2, 3)
    assert [len(part) for part in parts] == [200, 200]
    assert all(len({keys[index] for index in part}) <= 2 for part in parts)


def test_shards_go_round_even_if_rows_are_scarce():
    for clients in range(1, 12):
        data = DataConfig(partitioner="shard", shards_per_client=1)
        assert_covers(partition_rows(data, labels(11, 3), clients, 0), 11, clients)


def test_natural_id_gives_each_owner_its_rows():
    owners = ["zoe", "adam", "zoe", "bea", "adam", "zoe"]
    data = DataConfig(partitioner="natural-id", id_column="owner")
    parts = partition_rows(data, owners, 3, 0)
    assert [{owners[index] for index in part} for part in parts] == [{"adam"}, {"bea"}, {"zoe"}]
    with pytest.raises(DataError, match=r"'owner'.*3 different ids.*5 clients.*to 3"):
        partition_rows(data, owners, 5, 0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((10, 20, 5), [10, 20, 5]), ((0.5, 0.25, 0.25), [50, 25, 25]), ((1, 1, 1), [1, 1, 1])],
)
def test_sizes_are_rows_or_shares(sizes, expected):
    parts = partition_rows(DataConfig(partitioner="sizes", sizes=sizes), labels(100, 2), 3, 0)
    assert [len(part) for part in parts] == expected
    assert len({index for part in parts for index in part}) == sum(expected)


def test_unused_rows_are_told(caplog):
    partition_rows(DataConfig(partitioner="sizes", sizes=(10, 20)), labels(100, 2), 2, 0)
    assert "70 of 100" in caplog.text


@pytest.mark.parametrize(
    ("options", "rows", "clients", "message"),
    [
        ({}, 3, 5, r"3 training rows.*5 clients"),
        ({}, 3, 0, r"at least 1, found 0"),
        ({"partitioner": "sizes", "sizes": (5, 5)}, 100, 3, r"each of the 3 clients, found 2"),
        ({"partitioner": "sizes", "sizes": (60, 50)}, 100, 2, r"asks for 110 rows.*100 training rows"),
        ({"partitioner": "sizes", "sizes": (0.7, 0.7)}, 100, 2, r"add up to 1.4"),
        ({"partitioner": "sizes", "sizes": (-0.5, 1.5)}, 100, 2, r"negative"),
        ({"partitioner": "sizes", "sizes": (10, 0)}, 100, 2, r"client 1 of 2 .*10, 0.*data\.partitioner"),
        ({"partitioner": "pathological", "classes_per_client": 9}, 100, 5, r"is 9, but .* have 4 classes"),
        ({"partitioner": "pathological", "classes_per_client": 1}, 100, 2, r"cannot hold all 4 classes"),
        ({"partitioner": "pathological", "classes_per_client": 4}, 30, 20, r"no way in 20 draws"),
        ({"partitioner": "dirichlet", "alpha": 0.01}, 40, 20, r"than 1 of 40.*client \d+ had 0"),
        ({"partitioner": "dirichlet", "min_partition_size": 30}, 100, 4, r"fewer than 30.*\(now 30\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_is_refused(options, rows, clients, message):
    with pytest.raises(DataError, match=message):
        partition_rows(DataConfig(**options), labels(rows, 4), clients, 0)


def test_nothing_is_printed(capfd, recwarn):
    keys = labels(200, 4)
    data = DataConfig(partitioner="natural-id", id_column="owner")
    partition_rows(data, keys, 4, 0)
    with pytest.raises(DataError):
        partition_rows(DataConfig(partitioner="dirichlet", alpha=0.01), keys, 50, 0)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
