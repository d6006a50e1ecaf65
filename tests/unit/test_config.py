"""Configuration: round trips, bounds, and errors that name the key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import RunConfig, kebab
from fedllm.errors import ConfigError

TABLES = frozenset({"fedadam", "backprop"})


def read(**flat):
    return RunConfig.from_flat(
        {key.replace("__", ".").replace("_", "-"): value for key, value in flat.items()}, TABLES
    )


def test_every_key_has_a_description_and_a_default():
    for key, field in RunConfig.keys().items():
        assert field.description, key
        assert not field.is_required(), key


def test_flat_round_trip():
    config = read(
        lora__rank=4,
        lora__rank_pattern="query=2,value=8",
        data__sizes="1,2,3.5",
        data__labels="a, b",
        fedadam__eta=0.1,
        train__learning_rate=3e-3,
    )
    assert config.lora.rank_pattern == {"query": 2, "value": 8}
    assert config.data.sizes == (1.0, 2.0, 3.5)
    assert config.data.labels == ("a", "b")
    assert config.plugins == {"fedadam": {"eta": 0.1}}
    assert RunConfig.from_flat(config.to_flat(), TABLES) == config


@given(rank=st.integers(1, 64), rate=st.floats(1e-6, 10), seed=st.integers(0, 2**62))
def test_numbers_survive(rank, rate, seed):
    config = read(lora__rank=rank, train__learning_rate=rate, seed=seed)
    assert RunConfig.from_flat(config.to_flat(), TABLES) == config


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lora.rnk", "lora.rank"),
        ("rank", "lora.rank"),
        ("train.learning_rate", "train.learning-rate"),
        ("trian.batch-size", "train.batch-size"),
        ("learning-rate", "train.learning-rate"),
        ("fedadm.eta", "fedadam.eta"),
        ("round", "rounds"),
    ],
)
def test_unknown_key_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f"unknown configuration key {key!r}; did you mean {near!r}"):
        RunConfig.from_flat({key: 1}, TABLES)


def test_a_wholly_unknown_key_points_to_the_list():
    with pytest.raises(ConfigError, match="fedllm list --keys"):
        RunConfig.from_flat({"zzz": 1}, TABLES)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"lora.rank": 0}, r"lora.rank.*greater than or equal to 1 \(found 0\)"),
        ({"train.learning-rate": -1}, r"train.learning-rate.*greater than 0"),
        ({"train.learning-rate": float("nan")}, r"train.learning-rate"),
        ({"server.quorum": 1.5}, r"server.quorum.*less than or equal to 1"),
        ({"rounds": "many"}, r"rounds.*valid integer.*'many'"),
        ({"task": "regression"}, r"task.*'sequence-classification' or 'causal-lm'"),
        ({"lora.rank-pattern": "query"}, r"lora.rank-pattern.*expected name=value, found 'query'"),
        ({"lora.rank-pattern": "query=0"}, r"rank of 'query' must be at least 1"),
        ({"server.deadline": 9000}, r"server.deadline \(9000 s\) must not exceed server.round-timeout"),
        ({"model.quantization": "3bit"}, r"model.quantization"),
    ],
)
def test_out_of_bounds_names_the_key(flat, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat(flat)


def test_fingerprint_changes_with_what_decides_the_numbers_only():
    base = read().fingerprint()
    assert (
        read(rounds=99, run__name="x", server__deadline=5.0, simulation__gpus_per_client=0.5).fingerprint()
        == base
    )
    for change in (
        {"seed": 1},
        {"lora__rank": 2},
        {"strategy": "fedadam"},
        {"fedadam__eta": 0.5},
        {"data__alpha": 2.0},
        {"simulation__clients": 3},
    ):
        assert read(**change).fingerprint() != base, change


@pytest.mark.parametrize(
    ("task", "best"), [("causal-lm", "accuracy"), ("sequence-classification", "perplexity")]
)
def test_the_best_metric_is_one_of_the_task(task, best):
    with pytest.raises(ConfigError, match=rf"evaluation.best is {best}, but {task} measures"):
        RunConfig.from_flat({"task": task, "evaluation.best": best})


def test_kebab():
    assert kebab("TrimmedMean") == "trimmed-mean"
    assert kebab("head_learning_rate") == "head-learning-rate"


def test_sizes_survive_to_the_last_digit():
    config = read(data__sizes="1234567,20000001,0.33333333")
    assert RunConfig.from_flat(config.to_flat()).data.sizes == (1234567.0, 20000001.0, 0.33333333)


@pytest.mark.parametrize(
    "flat",
    [
        {"lora.alpha": float("inf")},
        {"server.node-timeout": float("inf")},
        {"server.fraction-train": 0.0},
        {"run.name": "../../etc/x"},
        {"run.name": "/etc/x"},
        {"run.name": ".hidden"},
    ],
)
def test_values_that_could_only_do_harm(flat):
    with pytest.raises(ConfigError, match=next(iter(flat))):
        RunConfig.from_flat(flat)
