"""The command line: exit codes, messages, and what each command prints."""

import json
import subprocess
import sys
from operator import attrgetter

import pytest

from fedllm import cli, doctor, registry, simulate
from fedllm.config import RunConfig
from fedllm.doctor import Check
from fedllm.errors import RoundError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line as the console script does; gives exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        captured = capsys.readouterr()
        return leave.value.code or 0, captured.out, captured.err

    return run


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['fedllm', '--help']\n"
        "from fedllm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'flwr', 'peft', 'datasets', 'pydantic', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "simulate" in result.stdout


@pytest.mark.parametrize("command", ["simulate", "report", "merge", "list", "new", "doctor"])
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage" in out


def test_an_expected_error_is_one_message_on_stderr_and_exit_code_1(run, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RoundError("round 3: nobody replied")

    monkeypatch.setattr(simulate, "prepare", fail)
    code, out, err = run("simulate", tmp_path)
    assert (code, out) == (1, "")
    assert err == "error: round 3: nobody replied\n"


def test_a_configuration_error_has_exit_code_2(run, tmp_path):
    code, _, err = run("simulate", tmp_path / "none")
    assert code == 2
    assert "fedllm new" in err
    assert "Traceback" not in err


def test_a_wrong_command_line_has_exit_code_2(run):
    assert run("simulate")[0] == 2
    assert run("simulate", "x", "--name", "a", "--resume", "b")[0] == 2


def test_a_bug_is_named_and_shown_in_full_only_with_debug(run, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr(simulate, "prepare", fail)
    code, _, err = run("simulate", tmp_path)
    assert code == 1
    assert "KeyError" in err
    assert "--debug" in err
    assert "Traceback" not in err
    monkeypatch.setattr(sys, "argv", ["fedllm", "simulate", str(tmp_path), "--debug"])
    with pytest.raises(KeyError):
        cli.main()


def test_messages_with_brackets_are_shown_as_they_are(run, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RoundError("expected [red]x[/red]")

    monkeypatch.setattr(simulate, "prepare", fail)
    assert "expected [red]x[/red]" in run("simulate", tmp_path)[2]


def test_simulate_passes_its_options_on_and_returns_the_runs_exit_code(run, monkeypatch, tmp_path):
    seen = {}

    class Job:
        config = RunConfig()

    def prepare(folder, overrides, **options):
        seen.update(options, folder=folder, overrides=overrides)
        return Job()

    monkeypatch.setattr(simulate, "prepare", prepare)
    monkeypatch.setattr(simulate, "check_inputs", lambda config: None)
    monkeypatch.setattr(simulate, "simulate", lambda job, console, quiet: 1 if quiet else 0)
    code, _, _ = run(
        "simulate", tmp_path, "-c", "a=1", "-c", "b=2", "--clients", 3, "--rounds", 2, "-q", "--resume", "r",
        "--ray-address", "head:6379",
    )  # fmt: skip
    assert code == 1
    assert seen == {
        "folder": tmp_path, "overrides": ["a=1", "b=2"], "name": None, "resume": "r", "clients": 3, "rounds": 2,
        "ray_address": "head:6379",
    }  # fmt: skip


def test_list_names_the_built_in_plugins_and_tasks(run):
    code, out, _ = run("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert "fedavg" in found["strategies"]
    assert "backprop" in found["clients"]
    assert found["tasks"].keys() == {"sequence-classification", "causal-lm"}
    assert all(line for kind in found.values() for line in kind.values())
    assert "fedavg" in run("list")[1]


def test_list_keys_has_every_key_of_the_configuration_and_of_the_plugins(run):
    keys = {entry["key"]: entry for entry in json.loads(run("list", "--keys", "--json")[1])}
    assert RunConfig.keys().keys() <= keys.keys()
    assert all(entry["description"] for entry in keys.values())
    assert keys["wire.upload-codec"]["choices"] == ["fp32", "bf16", "fp16", "int8"]
    assert keys["lora.rank"]["default"] == 8
    assert keys["fedadam.eta"]["type"] == "float"
    assert "fedadam.fraction-train" not in keys
    assert "[server]" in run("list", "--keys")[1]


def test_list_keys_tells_what_is_used_and_what_is_inherited(run):
    from fedllm.strategies.second_order.fagh import FAGH

    keys = {entry["key"]: entry for entry in json.loads(run("list", "--keys", "--json")[1])}
    fagh = {key.removeprefix("fagh."): entry for key, entry in keys.items() if key.startswith("fagh.")}
    assert fagh["metric"]["choices"] == ["identity", "second-moment"]
    assert fagh["rho"]["type"] == "float"
    used, listed = (
        FAGH(**given).server_optimizer.update
        for given in ({}, {key.replace("-", "_"): entry["default"] for key, entry in fagh.items()})
    )
    assert all(entry["default"] is not None for entry in fagh.values())
    for name in ("eta", "rho", "adaptive", "secants", "_memory.capacity", "_memory.beta", "_metric.tau"):
        assert attrgetter(name)(used) == attrgetter(name)(listed), name
    assert used._momentum.beta == listed._momentum.beta == fagh["beta1"]["default"]

    assert {f"fagh-opt.{key}" for key in fagh} | {"fagh-opt.local-scale"} == {
        key for key in keys if key.startswith("fagh-opt.")
    }
    assert keys["fagh-opt.rho"] == keys["fagh.rho"] | {"key": "fagh-opt.rho"}
    assert keys["backprop-and-hessian-row.optimizer"]["choices"] == ["adamw", "sgd"]


def test_list_keys_has_those_of_defences_and_attacks(run):
    keys = {entry["key"]: entry for entry in json.loads(run("list", "--keys", "--json")[1])}
    defaults = {
        "vert.keep": "auto", "vert.root-examples": 0, "vert-paper.keep": 1, "krum.attackers": 0.2,
        "fltrust.root-examples": 100, "nnm.rule": "trimmed-mean", "ipm.scale": 0.5, "scaling.factor": 10.0,
        "backdoor.target": 0, "min-max.direction": "unit",
    }  # fmt: skip
    assert {key: keys[key]["default"] for key in defaults} == defaults
    assert keys["vert.keep"]["type"] == "str | int | float"
    assert "mixed-geometric-median" in keys["vert.rule"]["choices"]
    for kind in ("defences", "attacks"):
        for name in registry.available(kind):
            own = {key.partition(".")[2]: entry for key, entry in keys.items() if key.startswith(f"{name}.")}
            assert not own.keys() & {"inner", "root", "seed", "fraction", "from-round", "spool-bytes"}
            assert not [e for e in own.values() if "see the documentation of" in e["description"]], name
            given = {key: entry["default"] for key, entry in own.items()}
            assert registry.check_parameters(kind, name, given).keys() == {k.replace("-", "_") for k in given}
    assert "vert-paper.keep = 1" in run("list", "--keys")[1]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_only_on_a_failure(run, monkeypatch, status, code):
    monkeypatch.setattr(doctor, "run_checks", lambda: [Check("thing", status, "found this", "do that")])
    assert run("doctor")[0] == code
    shown = run("doctor", "--json")
    assert shown[0] == code
    assert json.loads(shown[1]) == [
        {"name": "thing", "status": status, "found": "found this", "advice": "do that"}
    ]


def test_report_and_merge_name_a_folder_that_is_no_run(run, tmp_path):
    for command in ("report", "merge"):
        code, _, err = run(command, tmp_path)
        assert code == 2
        assert str(tmp_path) in err


def test_merge_takes_a_run_folder_and_never_overwrites(run, monkeypatch, tmp_path):
    from fedllm import models

    calls = []
    monkeypatch.setattr(models, "merge_adapter", lambda adapter, out: calls.append((adapter, out)))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert run("merge", tmp_path)[0] == 0
    assert run("merge", tmp_path / "adapter")[0] == 0
    assert calls == [(tmp_path / "adapter", tmp_path / "merged")] * 2
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model").touch()
    code, _, err = run("merge", tmp_path)
    assert code == 2
    assert "--out" in err


def test_version(run):
    assert run("--version")[1].startswith("fedllm ")
