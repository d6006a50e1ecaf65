"""What a node says that it has: its operator's word first, then the simulation's, then a measurement."""

import math

import psutil
import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, PlanError
from fedllm.resources import DEFAULT_RATE, measured_speed, memory_budget, node_resources

CPU = torch.device("cpu")
SIMULATED = {
    "simulation.clients": 3,
    "simulation.memory-megabytes": "400, 600,1000",
    "simulation.flops-per-second": 2e9,
    "simulation.upload-rate": "1e5,2e5,3e5",
}


def described(node_config, **flat):
    return node_resources(node_config, RunConfig.from_flat(flat), CPU, "edge")


def test_without_any_setting_the_machine_is_measured():
    found = described({})
    assert found["memory-bytes"] == psutil.virtual_memory().total
    assert found["flops-per-second"] == measured_speed(CPU) > 1e6
    assert found["upload-rate"] == found["download-rate"] == DEFAULT_RATE


def test_a_simulated_client_has_what_its_place_in_the_list_says():
    found = described({"partition-id": 2, "num-partitions": 3}, **SIMULATED)
    assert found["memory-bytes"] == 1_000_000_000
    assert found["flops-per-second"] == 2e9
    assert found["upload-rate"] == 3e5
    assert found["download-rate"] == DEFAULT_RATE


def test_the_nodes_own_settings_win():
    own = {"partition-id": 0, "memory-megabytes": 16, "flops-per-second": 5e9, "download-rate": 7}
    found = described(own, **SIMULATED)
    assert found["memory-bytes"] == 16_000_000
    assert (found["flops-per-second"], found["download-rate"], found["upload-rate"]) == (5e9, 7, 1e5)
    assert memory_budget({"memory-bytes": 123}, RunConfig.from_flat({}), CPU, "edge") == 123


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "4GB", True])
@pytest.mark.parametrize("key", ["memory-bytes", "memory-megabytes", "flops-per-second", "upload-rate"])
def test_bad_settings_name_node_and_key(key, value):
    with pytest.raises(PlanError, match=f"node edge: {key} is .*expected a positive number"):
        described({key: value})


def test_memory_given_twice_is_refused():
    with pytest.raises(PlanError, match="memory-bytes and memory-megabytes"):
        described({"memory-bytes": 1, "memory-megabytes": 1})


def test_a_node_outside_the_simulations_lists_must_say_it_itself():
    with pytest.raises(PlanError, match=r"node edge: simulation.memory-megabytes has 3 values, but none for"):
        described({"partition-id": 5}, **SIMULATED)
    with pytest.raises(PlanError, match="none for this node"):
        described({"data-file": "own.csv"}, **SIMULATED)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("400,0,600", r"simulation.memory-megabytes.1: .*greater than 0"),
        ("400,-1,600", "greater than 0"),
        ("400,nan,600", "finite"),
        ("400,600", r"has 2 values, expected 1 or 3 \(simulation.clients\)"),
        ("400,much,600", "valid number"),
    ],
)
def test_bad_lists_are_refused_before_a_run(value, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat({"simulation.clients": 3, "simulation.memory-megabytes": value})
