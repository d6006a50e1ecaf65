"""One base model takes adapters of every rank, and of fewer modules, in place."""

import gc
import weakref
from importlib.util import find_spec

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedllm import models
from fedllm.config import RunConfig
from fedllm.errors import ModelError, PlanError
from fedllm.model_sources import resolve_model
from fedllm.models import clear_bundles, load_bundle, merge_adapter
from fedllm.planned import Planned

LABELS = ("cat", "dog", "owl")
PREFIX = "base_model.model."
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="fedllm[quantization] is missing"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_bundles():
    yield
    clear_bundles()


def config(family="bert", **keys):
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return RunConfig.from_flat({"model.name": f"tiny-random:{family}", "lora.rank": 8, **flat})


def load(family="bert", **keys):
    return load_bundle(config(family, **keys), LABELS)


def adapter(bundle, ranks, seed=0):
    """A random adapter with the given ranks by module, made without any of the code under test."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in bundle.initial_state.items():
        module = name.removeprefix(PREFIX).partition(".lora_")[0]
        if ".lora_" not in name:
            state[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        elif module in ranks:
            shape = list(tensor.shape)
            shape[0 if ".lora_A" in name else 1] = ranks[module]
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    return state


def some_ranks(bundle):
    """Ranks 1, 8, 12, 3, … for every other module."""
    return {module: (1, 8, 12, 3)[i % 4] for i, module in enumerate(list(bundle.ranks)[::2])}


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits.float()


def fresh_base(family):
    source = resolve_model(config(family).model)
    base = AutoModelForSequenceClassification.from_pretrained(source.path, num_labels=3).eval()
    base.config.pad_token_id = 0
    return base


def dense_logits(family, state, scale=2.0):
    """The oracle: products of the factors added to the base's dense weights, no LoRA layer anywhere."""
    base = fresh_base(family)
    for name in [name for name in state if ".lora_A." in name]:
        module = base.get_submodule(name.removeprefix(PREFIX).partition(".lora_A")[0])
        update = scale * state[name.replace("lora_A", "lora_B")] @ state[name]
        transposed = update.T if type(module).__name__ == "Conv1D" else update
        module.weight.data += transposed
    for name, tensor in state.items():
        if ".lora_" not in name:
            base.get_parameter(name.removeprefix(PREFIX)).data.copy_(tensor)
    return logits(base)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_adapter_of_mixed_ranks_gives_the_logits_of_the_dense_update(family):
    bundle = load(family)
    ranks = some_ranks(bundle)
    state = adapter(bundle, ranks)
    bundle.load_adapter_state(state, any_ranks=True)
    assert bundle.ranks == ranks
    assert not torch.allclose(logits(fresh_base(family)), logits(bundle.model), atol=1e-2)
    torch.testing.assert_close(logits(bundle.model), dense_logits(family, state), atol=1e-5, rtol=1e-4)


def test_state_goes_in_and_out_and_names_keep_their_order():
    bundle = load()
    state = adapter(bundle, some_ranks(bundle))
    bundle.load_adapter_state(dict(reversed(state.items())), any_ranks=True)
    out = bundle.adapter_state()
    assert list(out) == list(bundle.trainable()) == [name for name in bundle.initial_state if name in state]
    assert all(torch.equal(out[name], state[name]) for name in state)
    assert [name for name in out if bundle.is_head(name)] == [name for name in state if ".lora_" not in name]


def test_modules_that_are_absent_cost_no_compute_and_get_no_gradient():
    bundle = load()
    kept = next(iter(bundle.ranks))
    bundle.load_adapter_state(adapter(bundle, {kept: 4}), any_ranks=True)
    products = []
    for name, module in bundle.model.named_modules():
        if "lora_A" in name or "lora_B" in name:
            module.register_forward_hook(lambda *_, name=name: products.append(name))
    trained = [p for p in bundle.model.parameters() if p.requires_grad]
    bundle.model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.tensor([1])).loss.backward()
    assert {name.partition(".lora_")[0] for name in products} == {PREFIX + kept}
    assert {id(p) for p in trained} == {id(p) for p in bundle.trainable().values()}
    assert all(p.grad is not None for p in bundle.trainable().values())


def test_equal_ranks_keep_their_parameters_and_others_get_new_ones():
    bundle = load()
    first, second, *_ = bundle.ranks
    before = dict(bundle.trainable())  # held, so that no new parameter takes an old one's place in memory
    bundle.load_adapter_state(adapter(bundle, {**bundle.ranks, first: 3}), any_ranks=True)
    after = bundle.trainable()
    changed = {name for name in after if after[name] is not before[name]}
    assert {name.removeprefix(PREFIX).partition(".lora_")[0] for name in changed} == {first}
    bundle.load_adapter_state(adapter(bundle, {second: 8}), any_ranks=True)
    bundle.load_adapter_state(bundle.initial_state)
    again = bundle.trainable()
    assert {name for name in again if again[name] is not before[name]} == changed
    assert all(torch.equal(again[name], bundle.initial_state[name]) for name in again)


def test_the_configured_ranks_come_back_whatever_was_loaded_before():
    bundle = load()
    expected = logits(bundle.model)
    bundle.load_adapter_state(adapter(bundle, some_ranks(bundle)), any_ranks=True)
    bundle.load_adapter_state(bundle.initial_state)
    assert torch.equal(logits(bundle.model), expected)
    assert set(bundle.ranks.values()) == {8}


def test_training_mode_and_dropout_reach_modules_that_come_back():
    bundle = load(lora__dropout=0.5)
    first = next(iter(bundle.ranks))
    bundle.load_adapter_state(adapter(bundle, {first: 2}), any_ranks=True)
    bundle.model.train()
    bundle.load_adapter_state(bundle.initial_state)
    assert all(module.training for module in bundle.model.modules())
    bundle.model.eval()
    assert not any(module.training for module in bundle.model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_saved_adapter_of_mixed_ranks_loads_in_peft_and_merges(family, tmp_path):
    bundle = load(family)
    state = adapter(bundle, some_ranks(bundle))
    bundle.save_adapter(tmp_path / "adapter", state)  # the bundle itself still has its own ranks
    bundle.load_adapter_state(state, any_ranks=True)
    expected = logits(bundle.model)
    again = peft.PeftModel.from_pretrained(fresh_base(family), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-6)
    assert {m.r["default"] for m in again.modules() if hasattr(m, "lora_A")} == {1, 3, 8, 12}
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, t: {name: t[:, :5]}, r"shape \(4, 5\), expected \(4, 32\)"),
        (lambda name, t: {name: t[:2]}, "adapter of rank 2, expected rank 4"),
        (lambda name, t: {name: t * float("nan")}, "not finite"),
        (lambda name, t: {name: t[:0], name.replace("lora_A", "lora_B"): torch.zeros(32, 0)}, "rank 0"),
        (lambda name, t: {f"{PREFIX}other.lora_A.weight": t}, "1 unexpected"),
    ],
)
def test_bad_adapters_of_any_rank_are_refused_and_change_nothing(change, said):
    bundle = load()
    state = adapter(bundle, {next(iter(bundle.ranks)): 4})
    name = next(name for name in state if "lora_A" in name)
    with pytest.raises(ModelError, match=said):
        bundle.load_adapter_state({**state, **change(name, state[name])}, any_ranks=True)
    assert set(bundle.ranks.values()) == {8}
    assert all(torch.equal(t, bundle.initial_state[n]) for n, t in bundle.adapter_state().items())


def test_half_a_pair_and_heads_alone_are_refused():
    bundle = load()
    state = adapter(bundle, {next(iter(bundle.ranks)): 4})
    without = {name: t for name, t in state.items() if "lora_A" not in name}
    with pytest.raises(ModelError, match=r"1 missing \(.*lora_A"):
        bundle.load_adapter_state(without, any_ranks=True)
    heads = {name: t for name, t in state.items() if bundle.is_head(name)}
    with pytest.raises(ModelError, match="no factor of this model's 13 LoRA modules"):
        bundle.load_adapter_state(heads, any_ranks=True)


# ------------------------------------------------------------- bases of several widths


def planned(bits, **keys):
    return load_bundle(Planned(bits, 4).apply(config("llama", **keys)), LABELS)


@needs_bitsandbytes
def test_one_adapter_loads_on_bases_of_every_width_and_means_nearly_the_same():
    bundles = {bits: planned(bits, model__cache_bundles=4) for bits in (32, 16, 8, 4)}
    state = adapter(bundles[32], some_ranks(bundles[32]))
    found = {}
    for bits, bundle in bundles.items():
        bundle.load_adapter_state(state, any_ranks=True)
        assert all(torch.equal(bundle.adapter_state()[name], state[name]) for name in state)
        found[bits] = logits(bundle.model)
    errors = {bits: (found[bits] - found[32]).norm() / found[32].norm() for bits in (16, 8, 4)}
    assert 0 < errors[16] < errors[4] < 0.3
    assert errors[8] < errors[4]


@needs_bitsandbytes
def test_the_cache_keeps_the_widths_used_last():
    first = planned(32, model__cache_bundles=2)
    second = planned(8, model__cache_bundles=2)
    assert planned(32, model__cache_bundles=2) is first
    watched, model = weakref.ref(second), weakref.ref(second.model)
    del second
    third = planned(4, model__cache_bundles=2)
    gc.collect()
    assert len(models.BUNDLES) == 2
    assert watched() is None
    assert model() is None
    assert planned(32, model__cache_bundles=2) is first
    assert planned(4, model__cache_bundles=2) is third


# ------------------------------------------------------------------------------ plans


def test_a_plan_changes_bits_batch_and_steps_and_nothing_else():
    base = config(train__batch_size=16, train__local_epochs=3.0)
    changed = Planned(4, 2, local_steps=7).apply(base)
    flat, wanted = changed.to_flat(), base.to_flat()
    wanted |= {"model.quantization": "4bit", "train.batch-size": 2, "train.local-steps": 7}
    assert flat == wanted
    assert Planned(16, 16).apply(base).model.dtype == "bfloat16"
    assert Planned(16, 16).apply(config(model__dtype="float16")).model.dtype == "float16"
    assert Planned(32, 16).apply(config(model__dtype="float16")).model.dtype == "float32"


def test_a_plan_travels_and_bad_values_are_named():
    plan = Planned(8, 4, 0, 123)
    assert Planned.from_config(plan.to_config()) == plan
    assert Planned.from_config({"server-round": 1}) is None
    for key, value in [("plan-bits", 5), ("plan-bits", 8.0), ("plan-batch-size", 0), ("plan-bytes", True)]:
        with pytest.raises(PlanError, match=f"{key}="):
            Planned.from_config({**plan.to_config(), key: value})
    with pytest.raises(PlanError, match="plan-local-steps=None"):
        Planned.from_config({k: v for k, v in plan.to_config().items() if k != "plan-local-steps"})
