"""Reading an app's configuration: overrides, paths, saved runs and the staged copy."""

import json
import tomllib

import pytest

from fedllm.app_config import flatten, nest, parse_overrides, read_app, read_saved, resolve, stage
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from tests.tiny_app import write_app

CONFIG = """
rounds = 3
data.source = "rows.csv"
[tool.flwr.app.config.lora]
rank = 4
"""


@pytest.fixture
def folder(tmp_path):
    return write_app(tmp_path / "demo", CONFIG)


def test_pairs_are_toml_values_separated_by_spaces():
    given = parse_overrides(
        ["rounds=5 data.alpha=0.1 run.resume=true", "strategy=\"fedadam\" model.name='a b'"]
    )
    assert given == {
        "rounds": 5, "data.alpha": 0.1, "run.resume": True, "strategy": "fedadam", "model.name": "a b"
    }  # fmt: skip


def test_later_pairs_win():
    assert parse_overrides(["rounds=5", "rounds=6"]) == {"rounds": 6}


def test_pairs_read_as_flower_reads_them():
    flower = pytest.importorskip("flwr.common.config")
    texts = ['a=1 b.c=2.5 d="x y"', "e='z' f=true"]
    assert parse_overrides(texts) == flower.parse_config_args(texts)


@pytest.mark.parametrize(
    ("text", "named"), [("strategy=fedadam", "quotes"), ("rounds 5", "rounds 5"), ("x=[1,2]", "commas")]
)
def test_malformed_pairs_are_rejected_with_a_hint(text, named):
    with pytest.raises(ConfigError, match=named):
        parse_overrides([text])


def test_a_toml_file_gives_overrides(tmp_path):
    path = tmp_path / "more.toml"
    path.write_text("rounds = 7\n[lora]\nrank = 2\n")
    assert parse_overrides([str(path)]) == {"rounds": 7, "lora.rank": 2}
    with pytest.raises(ConfigError, match="not both"):
        parse_overrides([str(path), "rounds=1"])
    with pytest.raises(ConfigError, match="no such file"):
        parse_overrides([str(tmp_path / "none.toml")])


def test_overrides_replace_the_apps_values(folder):
    flat = resolve(read_app(folder), ["rounds=9"])
    assert (flat["rounds"], flat["lora.rank"]) == (9, 4)


def test_paths_of_the_app_count_from_its_folder_and_overrides_from_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "rows.csv").write_text("text,label\n")
    (tmp_path / "here.csv").write_text("text,label\n")
    app = read_app(folder)
    flat = resolve(app, ['data.test-file="here.csv" model.name="org/model" run.root="out"'])
    assert flat["data.source"] == str(folder / "rows.csv")
    assert flat["data.test-file"] == str(tmp_path / "here.csv")
    assert flat["model.name"] == "org/model"
    assert flat["run.root"] == str(tmp_path / "out")
    assert resolve(app, [])["run.root"] == str(tmp_path / "runs")


def test_an_override_does_not_fall_back_to_the_apps_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "only-in-app.csv").write_text("text,label\n")
    assert resolve(read_app(folder), ['data.source="only-in-app.csv"'])["data.source"] == "only-in-app.csv"


def test_not_an_app_says_so_and_names_the_way_out(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (empty, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"{wrong.name}.*fedllm new"):
            read_app(wrong)
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'\n")
    with pytest.raises(ConfigError, match=r"components\.serverapp is missing"):
        read_app(folder)
    (folder / "pyproject.toml").write_text("[project\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_app(folder)


def test_flatten_and_nest_are_inverse():
    flat = RunConfig().to_flat()
    assert flatten(nest(flat), "x") == flat


def test_saved_configuration_of_a_run(tmp_path):
    with pytest.raises(ConfigError, match="cannot resume"):
        read_saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"rounds": 4, "lora.rank": 2}))
    assert read_saved(tmp_path) == {"rounds": 4, "lora.rank": 2}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_saved(tmp_path)


def test_the_staged_copy_has_the_whole_configuration_and_no_ballast(folder, tmp_path):
    (folder / "own.py").write_text("x = 1\n")
    for name in (".git", "runs", "__pycache__", ".venv"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    (folder / "weights.bin").write_bytes(bytes(3_000_000))
    config = RunConfig.from_flat({"rounds": 8, "fedadam.eta": 0.1}, frozenset({"fedadam"}))
    staged = stage(read_app(folder), config, tmp_path / "staged")
    assert sorted(path.name for path in staged.iterdir()) == ["own.py", "pyproject.toml"]
    app = read_app(staged)
    assert app.config == config.to_flat()
    assert app.pyproject["project"]["name"] == "tiny"
    assert (
        tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]["rounds"] == 3
    )
