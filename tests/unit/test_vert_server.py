"""Defences and attacks by configuration, with the real client code."""

import json

import pytest

from fedllm import registry
from fedllm.errors import ConfigError, PlanError, RegistryError
from fedllm.events import read_events
from fedllm.report import load_run
from tests.unit.test_server import flat, run  # noqa: F401  # the fixture is used by name


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setenv("RAY_JOB_ID", "01")


def verdicts(tmp_path):
    events = read_events(tmp_path / "runs" / "r" / "events.jsonl")
    return [event for event in events if event["event"] == "verdict"]


def test_a_guarded_run_names_the_attacker(flat, tmp_path, simulated):  # noqa: F811
    run(
        flat, rounds=4, defence="vert", attack="sign-flip", attack_fraction=0.34, attack_from_round=3, seed=1,
        train__local_steps=8, train__learning_rate=1e-3,
    )  # fmt: skip
    judged = verdicts(tmp_path)
    assert [sum(v["kept"].values()) for v in judged] == [3, 3, 2, 2]
    assert {n for n, k in judged[2]["kept"].items() if not k} == {
        n for n, k in judged[3]["kept"].items() if not k
    }
    assert "<h2>Verdicts</h2>" in (tmp_path / "runs/r/report.html").read_text()
    assert load_run(tmp_path / "runs" / "r").config["attack"] == "sign-flip"


def test_trusted_rows_settle_an_attack_from_the_start(flat, tmp_path, simulated):  # noqa: F811
    run(
        flat, rounds=2, defence="vert", vert__root_examples=24, attack="scaling", scaling__factor=-1.0,
        attack_fraction=0.67, seed=1, train__local_steps=20, train__learning_rate=1e-2,
    )  # fmt: skip
    judged = verdicts(tmp_path)
    assert [sum(v["kept"].values()) for v in judged] == [1, 1]
    assert not [e for e in read_events(tmp_path / "runs/r/events.jsonl") if e["event"] == "warning"]


def test_colluders_by_configuration(flat, tmp_path, simulated):  # noqa: F811
    run(flat, rounds=3, defence="vert", attack="ipm", attack_fraction=0.34, attack_from_round=3)
    assert [sum(v["kept"].values()) for v in verdicts(tmp_path)] == [3, 3, 2]


@pytest.mark.parametrize(
    "defence",
    ["vert", "vert-paper", "fltrust", "fldetector", "flanders", "centred-clipping", "geometric-median"],
)
def test_every_defence_runs_and_resumes(flat, tmp_path, defence):  # noqa: F811
    keys = {"defence": defence, "fltrust__root_examples": 16}
    run(flat, rounds=2, **keys)
    run(flat, rounds=3, run__resume=True, **keys)
    assert len(verdicts(tmp_path)) == 3


def test_an_attack_outside_of_a_simulation_is_refused(flat, monkeypatch):  # noqa: F811
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    with pytest.raises(PlanError, match="is not simulated: attacks are for simulations only"):
        run(flat, attack="sign-flip")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"defence": "vertt"}, RegistryError, "did you mean 'vert'"),
        ({"attack": "sign-flop"}, RegistryError, "did you mean 'sign-flip'"),
        ({"defence": "vert", "vert__warmup": 3}, ConfigError, r"did you mean vert\.warm-up"),
        ({"defence": "vert", "vert__keep": "none"}, ConfigError, r"vert\.keep: expected auto"),
        ({"defence": "vert", "vert__inner": "x"}, ConfigError, r"unknown configuration key vert\.inner"),
        ({"attack": "sign-flip", "attack_fraction": 1.5}, ConfigError, "attack-fraction"),
        ({"defence": "vert", "vert__root_examples": 5000}, ConfigError, "there are 24 test rows"),
    ],
)
def test_bad_keys_are_refused(flat, changes, error, message):  # noqa: F811
    with pytest.raises(error, match=message):
        run(flat, **changes)


def test_parameters_reach_the_attack(flat, simulated):  # noqa: F811
    config = registry.config_from_flat({**flat, "attack": "scaling", "scaling.factor": 3.0})
    registry.check(config)
    assert json.dumps(config.plugins["scaling"]) == '{"factor": 3.0}'
