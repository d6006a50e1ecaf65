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


WHOLE = ["median", "trimmed-mean", "bulyan", "centred-clipping", "nnm", "vert-paper"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"defence": name, "lora__client_ranks": "1,2,4"},
             f"defence is '{name}', which needs adapters of one form, but lora.client-ranks is 1,2,4: .* krum, .* vert")
            for name in WHOLE
        ),
        ({"defence": "vert", "vert__rule": "nnm", "lora__client_ranks": "1,2,4"},
         "vert.rule is 'nnm', .* lora.client-ranks .*mean, geometric-median, mixed-geometric-median"),
        ({"attack": "ipm", "lora__client_ranks": "1,2,4"}, "attack is 'ipm', .* lora.client-ranks .*sign-flip"),
        ({"attack": "adaptive"}, "attack is 'adaptive', .* defence is 'none': set defence = \"vert\""),
        ({"attack": "adaptive", "defence": "vert-paper"}, "attack is 'adaptive', .* defence is 'vert-paper'"),
        ({"attack": "backdoor", "backdoor__trigger": "a,b"}, "backdoor.trigger: .*token ids.* \\(found 'a,b'\\)"),
        ({"attack": "backdoor", "backdoor__trigger": "5,"}, "backdoor.trigger: .*token ids"),
        ({"attack": "backdoor", "backdoor__trigger": -3}, "backdoor.trigger: .*token ids.* \\(found -3\\)"),
        ({"attack": "label-flip", "task": "causal-lm"}, "attack is 'label-flip', .* task is 'causal-lm'"),
        ({"defence": "fltrust", "strategy": "hsplitlora"},
         "fltrust.root-examples is 100, .* 'hsplitlora' train together .*FLTrust\\(inner, root=…\\)"),
        ({"defence": "vert", "vert__root_examples": 5, "strategy": "hsplitlora"},
         "vert.root-examples is 5, .* set it to 0, or .*VERT\\(inner, root=…\\)"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_run(flat, tmp_path, simulated, changes, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run(flat, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"defence": "vert", "strategy": "hsplitlora"},
        {"defence": "krum", "lora.client-ranks": "1,2,4"},
        {"defence": "vert", "vert.rule": "geometric-median", "lora.client-ranks": "1,2,4"},
        {"defence": "median", "lora.client-ranks": "2,2"},
        {"attack": "sign-flip", "defence": "vert", "lora.client-ranks": "1,2,4"},
        {"attack": "adaptive", "defence": "vert"},
        {"attack": "backdoor", "backdoor.trigger": 1000},
    ],
)
def test_what_goes_together_is_not_refused(keys):
    registry.check(registry.config_from_flat(keys))


@pytest.mark.parametrize("defence", ["vert", "krum"])
def test_defences_on_sketches_go_with_mixed_ranks(flat, tmp_path, defence):  # noqa: F811
    run(flat, rounds=1, defence=defence, lora__client_ranks="1,2,4")
    assert len(verdicts(tmp_path)[0]["kept"]) == 3


def test_a_backdoor_for_a_class_that_is_not_there_stops_the_run(flat, tmp_path, simulated):  # noqa: F811
    keys = {"attack": "backdoor", "attack_from_round": 2, "attack_fraction": 0.34}
    with pytest.raises(ConfigError, match=r"backdoor\.target is 3, .* 3 classes: expected 0 to 2"):
        run(flat, backdoor__target=3, **keys)
    events = [event["event"] for event in read_events(tmp_path / "runs/r/events.jsonl")]
    assert "round-finished" not in events
    assert "run-failed" in events


def test_parameters_reach_the_attack(flat, simulated):  # noqa: F811
    config = registry.config_from_flat({**flat, "attack": "scaling", "scaling.factor": 3.0})
    registry.check(config)
    assert json.dumps(config.plugins["scaling"]) == '{"factor": 3.0}'
