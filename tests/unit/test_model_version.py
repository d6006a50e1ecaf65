import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm import model_sources
from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.model_sources import resolve_model
from fedllm.model_version import model_version


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    built = resolve_model(ModelConfig(name="tiny-random:llama")).path
    return shutil.copytree(built, tmp_path / "model")


def version(folder):
    model_version.cache_clear()
    return model_version(str(folder), "main")


def test_is_that_of_the_weights_whatever_the_name_and_the_files_they_are_spread_over(folder, tmp_path):
    before = version(folder)
    assert before == model_version("tiny-random:llama", "main")
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, folder / f"part-{number}.safetensors")
    where = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    assert version(folder) == before


@pytest.mark.parametrize("change", ["values", "dtype", "shape", "name"])
def test_differs_where_weights_differ(change, folder):
    before = version(folder)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "down_proj" in name)
    if change == "values":
        state[name] += 1e-3
    elif change == "dtype":
        state[name] = state[name].half()
    elif change == "shape":
        state[name] = state[name][:-1].clone()
    else:
        state["other." + name] = state.pop(name)
    save_file(state, folder / "model.safetensors")
    assert version(folder) != before


def test_reads_scalars_and_empty_tensors(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "scale": torch.tensor(2.0), "none": torch.zeros(0, 3)}, path)
    two = version(folder)
    save_file({**load_file(path), "scale": torch.tensor(3.0)}, path)
    assert version(folder) != two


def test_a_hub_model_has_its_commit_cached_or_not(monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(model_sources, "_cached_snapshot", lambda model: tmp_path / commit)
    assert version("owner/name") == "commit 0123456789ab"
    monkeypatch.setattr(model_sources, "_cached_snapshot", lambda model: None)
    monkeypatch.setattr(model_sources, "_ask_hub", lambda model: commit)
    assert version("owner/name") == "commit 0123456789ab"


def test_unreadable_weights_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"weights in .*model cannot be read"):
        version(folder)
