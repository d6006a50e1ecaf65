"""Plug-ins: by name, by entry point, by module:Class; their parameters are checked before work starts."""

from importlib.metadata import EntryPoint
from typing import Annotated

import pytest
from fedllm.strategies.fedopt import FedAdam
from flwr.serverapp.strategy import FedMedian
from pydantic import Field

from fedllm import registry
from fedllm.errors import ConfigError, RegistryError
from fedllm.strategy import BaseStrategy


class TrimmedMean(BaseStrategy):
    """Drops the extremes."""

    def __init__(self, *, trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.trim = trim


HERE = f"{__name__}:TrimmedMean"


def test_builtins_come_through_entry_points():
    assert {"fedavg", "fedavgm", "fedadam", "fedyogi"} <= set(registry.available("strategies"))
    assert "backprop" in registry.available("clients")
    assert registry.load("strategies", "fedadam") is FedAdam


def test_every_plugin_has_a_line_of_description():
    for kind in ("strategies", "clients"):
        assert all(registry.describe(kind).values())


def test_a_class_of_the_users_own():
    strategy = registry.build("strategies", HERE, {"trim": 0.2}, seed=7, unknown_to_it=1)
    assert isinstance(strategy, TrimmedMean)
    assert (strategy.trim, strategy.seed) == (0.2, 7)
    assert registry.parameter_table(HERE) == "trimmed-mean"


def test_configuration_wins_over_what_the_framework_gives():
    strategy = registry.build("strategies", "fedavg", {"fraction-train": 0.5}, fraction_train=1.0)
    assert strategy.fraction_train == 0.5


def test_flowers_own_strategies_can_be_named():
    strategy = registry.build(
        "strategies", "flwr.serverapp.strategy:FedMedian", {"min-train-nodes": 3}, seed=1
    )
    assert isinstance(strategy, FedMedian)
    assert strategy.min_train_nodes == 3


def test_parameters_of_a_plugin_in_the_run_configuration():
    config = registry.config_from_flat({"strategy": HERE, "trimmed-mean.trim": 0.3})
    assert config.plugins == {"trimmed-mean": {"trim": 0.3}}
    registry.check(config)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"strategy": "fedadam", "fedadam.etta": 1},
            "unknown configuration key fedadam.etta; did you mean fedadam.eta?",
        ),
        ({"strategy": "fedadam", "fedadam.eta": -1}, r"fedadam.eta.*greater than 0"),
        ({"strategy": HERE, "trimmed-mean.trim": 0.7}, r"trimmed-mean.trim.*less than 0.5"),
        ({"strategy": "fedadam", "fedavgm.bogus": 1}, r"unknown configuration key fedavgm.bogus"),
        ({"strategy": "fedadam", "fedadam.eta": float("inf")}, r"fedadam.eta.*finite"),
        (
            {"strategy": "flwr.serverapp.strategy:FedMedian", "wire.upload-codec": "int8"},
            r"wire.upload-codec is int8, but the strategy .* reads fp32 only",
        ),
        ({"client": "backprop", "backprop.optimizer": "lion"}, r"backprop.optimizer.*'adamw' or 'sgd'"),
    ],
)
def test_bad_parameters(flat, message):
    with pytest.raises(ConfigError, match=message):
        registry.check(registry.config_from_flat(flat))


class Lone:
    """An attack that a client runs alone, with a keyword that only looks like one of the run's."""

    def __init__(self, *, seed: int = 0):
        self.seed = seed

    def run(self, update, job):
        return update.run(job)


@pytest.mark.parametrize(
    ("plugin", "key", "instead"),
    [
        ("attack", "alie.fraction", "attack-fraction"),
        ("attack", "alie.from-round", "attack-from-round"),
        ("attack", "alie.from_round", "attack-from-round"),
        ("attack", "mimic.seed", "seed"),
        ("attack", "sign-flip.fraction", "attack-fraction"),
        ("defence", "vert.seed", "seed"),
        ("defence", "krum.seed", "seed"),
        ("defence", "krum.spool-bytes", "server.spool-megabytes"),
    ],
)
def test_a_defence_or_attack_cannot_shadow_a_key_of_the_run(plugin, key, instead):
    name = key.partition(".")[0]
    for named in ({plugin: name}, {}):
        with pytest.raises(ConfigError, match=rf"key {key} \(found 1\); set {instead} instead"):
            registry.check(registry.config_from_flat({**named, key: 1}))


def test_the_run_sets_what_is_no_key_of_a_defence_or_attack():
    wrapped = registry.build("defences", "vert", {}, BaseStrategy(), seed=7)
    assert wrapped.sketcher._seed == 7
    attack = registry.build("attacks", "alie", {"z": 2.0}, wrapped, fraction=0.3, from_round=4, seed=7)
    assert (attack._fraction, attack._from_round, attack._seed) == (0.3, 4, 7)


def test_an_attack_that_runs_alone_may_have_a_seed_of_its_own():
    assert registry.build("attacks", f"{__name__}:Lone", {"seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("fedavgg", "nothing named 'fedavgg'.*did you mean 'fedavg'.*known: .*module:Class"),
        ("no.such.module:Class", "cannot load 'no.such.module:Class'.*must be importable"),
        (f"{__name__}:Nothing", "cannot load"),
        (f"{__name__}:HERE", "expected a class"),
    ],
)
def test_unknown_plugins(ref, message):
    with pytest.raises(RegistryError, match=message):
        registry.load("strategies", ref)


def test_two_packages_with_one_name(monkeypatch):
    points = tuple(EntryPoint("mine", value, "fedllm.strategies") for value in ("a:A", "b:B"))
    monkeypatch.setattr(registry, "_entry_points", lambda kind: points)
    with pytest.raises(RegistryError, match=r"two plug-ins .* 'mine': a:A and b:B"):
        registry.available("strategies")
