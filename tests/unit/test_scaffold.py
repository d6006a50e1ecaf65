"""A new app folder: valid for Flower and fedllm, explained, never over something that exists."""

import tomllib

import pytest

from fedllm import simulate
from fedllm.app_config import read_app
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.scaffold import app_name, comment, create_app


def test_a_new_app_is_ready_to_be_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = create_app(tmp_path / "My App")
    assert {file.name for file in files} == {"pyproject.toml", "README.md", ".gitignore"}
    job = simulate.prepare(tmp_path / "My App")
    assert job.app.name == "my-app"
    assert job.config.server.min_nodes == job.config.simulation.clients
    assert job.run_dir.parent == tmp_path / "runs"


def test_every_key_has_its_description_and_default_above_it(tmp_path):
    create_app(tmp_path / "app")
    lines = (tmp_path / "app" / "pyproject.toml").read_text().splitlines()
    fields, defaults = RunConfig.keys(), RunConfig().to_flat()
    for key in read_app(tmp_path / "app").config:
        explanation = f"# {comment(fields[key])} (default: "
        above = next(line for line in lines if line.startswith(explanation))
        default = tomllib.loads("x = " + above.removeprefix(explanation).removesuffix(")"))["x"]
        assert default == defaults[key]
        assert lines[lines.index(above) + 1].startswith(f"{key.rpartition('.')[2]} = ")


def test_the_project_has_what_flower_wants(tmp_path):
    create_app(tmp_path / "app")
    project = read_app(tmp_path / "app").pyproject
    assert project["project"]["dependencies"] == []
    assert project["tool"]["flwr"]["app"]["publisher"]
    assert project["tool"]["flwr"]["app"]["components"]["serverapp"] == "fedllm.server_app:app"


def test_what_exists_is_never_overwritten(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="not an empty folder"):
            create_app(path)
    (tmp_path / "empty").mkdir()
    assert create_app(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot write"):
        create_app(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("My App_2", "my-app-2"),
        ("2024", "app-2024"),
        ("é", "app"),
        ("a" * 40, "a" * 32),
        ("x" * 31 + "-yy", "x" * 31),
    ],
)
def test_names_are_what_flower_accepts(text, name):
    assert app_name(text) == name
