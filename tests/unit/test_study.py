"""Runs of a comparison: which command is run, and when none is. The simulation itself is invented."""

from types import SimpleNamespace

import pytest

from fedllm import registry, study
from fedllm.errors import ConfigError, FedLLMError
from tests.sample_run import Script, finished_run, save
from tests.tiny_app import write_app

CONFIG = registry.config_from_flat(
    {
        "rounds": 3,
        "model.name": "tiny-random:bert",
        "lora.rank": 4,
        "run.name": "a",
        "server.min-nodes": 9,
    }
).to_flat()


@pytest.fixture
def app(tmp_path):
    return write_app(tmp_path / "app", 'rounds = 3\nmodel.name = "tiny-random:bert"\n')


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """Commands that were run; each leaves what ``outcome`` says in the folder."""
    said = SimpleNamespace(commands=[], code=0, events=finished_run().events)

    def run(command, check):
        said.commands.append(command)
        save(said.events, tmp_path / "runs" / "a", CONFIG)
        return SimpleNamespace(returncode=said.code)

    monkeypatch.setattr(study.subprocess, "run", run)
    return said


def test_a_run_is_made_once(app, tmp_path, simulated):
    for _ in range(2):
        history = study.finished_run(app, tmp_path / "runs" / "a", "lora.rank=4")
        assert history.status == "finished"
        assert history.metric("accuracy", "server")[-1] == (3, 0.7)
    (command,) = simulated.commands
    assert command[3:5] == ["simulate", str(app)]
    assert command[5:7] == ["--name", "a"]
    assert "lora.rank=4" in command
    assert f'run.root="{tmp_path / "runs"}"' in command


@pytest.mark.parametrize("settings", ["lora.rnk=4", 'attack="adaptive"', 'attack="sing-flip"'])
def test_what_cannot_be_run_is_refused_before_any_run(app, settings):
    assert study.checked(app, "lora.rank=4").lora.rank == 4
    with pytest.raises(FedLLMError, match=r"unknown configuration key|defence is 'none'|sign-flip"):
        study.checked(app, settings)


def test_a_run_that_was_cut_short_is_resumed(app, tmp_path, simulated):
    begun = Script()
    begun.start()
    save(begun.events, tmp_path / "runs" / "a", CONFIG)
    assert study.finished_run(app, tmp_path / "runs" / "a", "lora.rank=4").status == "finished"
    assert simulated.commands[0][5:7] == ["--resume", "a"]


@pytest.mark.parametrize("settings", ["lora.rank=8", "", "lora.rank=4 rounds=5"])
def test_a_run_with_another_configuration_is_not_taken_for_this_one(app, tmp_path, simulated, settings):
    save(simulated.events, tmp_path / "runs" / "a", CONFIG)
    key = "rounds = 3, and 5" if "rounds" in settings else "lora.rank = 4, and "
    with pytest.raises(ConfigError, match=key):
        study.finished_run(app, tmp_path / "runs" / "a", settings)
    assert not simulated.commands


@pytest.mark.parametrize("free", ["vert.keep=2", "server.node-timeout=9.0", 'run.sinks="tensorboard"'])
def test_keys_that_decide_no_number_may_differ(app, tmp_path, simulated, free):
    """Also the table of a plug-in that takes no part."""
    save(simulated.events, tmp_path / "runs" / "a", CONFIG)
    assert study.finished_run(app, tmp_path / "runs" / "a", f"lora.rank=4 {free}").status == "finished"
    assert not simulated.commands


def test_a_wrong_key_is_refused_before_anything_starts(app, tmp_path, simulated):
    with pytest.raises(ConfigError, match=r"lora\.rang"):
        study.finished_run(app, tmp_path / "runs" / "b", "lora.rang=4")
    assert not simulated.commands


def test_a_simulation_that_fails_is_named(app, tmp_path, simulated):
    simulated.code = 1
    with pytest.raises(FedLLMError, match="a ended with exit code 1"):
        study.finished_run(app, tmp_path / "runs" / "a", "lora.rank=4")
