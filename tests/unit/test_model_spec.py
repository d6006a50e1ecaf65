"""The planner's view of a model against the loaded model, and its predicted memory against an allocator's count."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2ForCausalLM,
)

from fedllm.base_models import load_base
from fedllm.config import ModelConfig
from fedllm.lora.memory import MemoryModel, calibrated
from fedllm.lora_targets import linear_layers
from fedllm.model_sources import resolve_model
from fedllm.model_spec import kept_attention, model_spec

CPU = torch.device("cpu")


def config_of(name, **extra):
    return AutoConfig.from_pretrained(resolve_model(ModelConfig(name=name)).path, **extra)


def llama_config():
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    )


FAMILIES = [
    ("tiny-random:llama", LlamaForCausalLM, ()),
    ("tiny-random:qwen2", Qwen2ForCausalLM, ()),
    ("tiny-random:gpt2", GPT2LMHeadModel, ()),
    ("tiny-random:bert", BertForSequenceClassification, ("classifier",)),
    ("tiny-random:llama", LlamaForSequenceClassification, ("score",)),
    ("packaged:minilm", BertForSequenceClassification, ("classifier", "bert.pooler")),
]


@pytest.mark.parametrize(("name", "kind", "heads"), FAMILIES)
def test_a_spec_counts_what_the_loaded_model_has(name, kind, heads):
    config = config_of(name, num_labels=4) if heads else config_of(name)
    spec = model_spec(kind, config, heads)
    model = kind(config)
    trained = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
    assert spec.head_parameters == trained
    assert spec.parameters == sum(p.numel() for p in model.parameters()) - trained
    assert spec.num_blocks == config.num_hidden_layers
    assert spec.vocabulary == (0 if heads else config.vocab_size)
    inside = [n for n in linear_layers(model, heads) if any(part.isdecimal() for part in n.split("."))]
    assert [weight.name for weight in spec.weights] == inside
    for weight in spec.weights:
        layer = model.get_submodule(weight.name)
        width = layer.weight.shape[1] if kind is GPT2LMHeadModel else layer.weight.shape[0]
        assert (weight.rows, weight.rows * weight.cols) == (width, layer.weight.numel())
        assert f".{weight.block}." in weight.name
    assert {weight.block for weight in spec.weights} == set(range(spec.num_blocks))


@pytest.mark.parametrize(("bits", "quantization"), [(8, "8bit"), (4, "4bit")])
def test_the_bytes_of_a_quantised_base_are_those_that_bitsandbytes_takes(bits, quantization):
    pytest.importorskip("bitsandbytes")
    model = ModelConfig(name="packaged:minilm", dtype="bfloat16", quantization=quantization)
    base = load_base(model, "sequence-classification", ("no", "yes"), CPU, seed=0)
    spec = model_spec(type(base.model), base.model.config, ("classifier", "bert.pooler"))
    taken = 0
    for name, parameter in base.model.named_parameters():
        if name.startswith(("classifier", "bert.pooler")):
            continue
        taken += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            taken += state.absmax.numel() * state.absmax.element_size()
        if parameter.dtype == torch.int8:
            taken += parameter.SCB.numel() * parameter.SCB.element_size()
    assert MemoryModel().base_bytes(spec, bits) == pytest.approx(taken, rel=0.002)


def adapted(kind, config, heads, dtype):
    """A model as :mod:`fedllm.models` builds it: base in ``dtype``, adapters and heads in float32."""
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    names = [name for name in linear_layers(model, heads) if any(p.isdecimal() for p in name.split("."))]
    settings = LoraConfig(
        r=8,
        target_modules=names,
        modules_to_save=list(heads) or None,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
    )
    model = get_peft_model(model, settings)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
            module.modules_to_save["default"].register_forward_pre_hook(
                lambda _module, inputs: tuple(x.float() for x in inputs)
            )
    return model.train(), dict.fromkeys(names, 8)


def measured_peak(model, batch, length, classify):
    """Largest number of tensor bytes alive during a training step, as torch's allocator reports them."""
    ids = torch.arange(batch * length).reshape(batch, length) % 200
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True)

    def step():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not classify:
            logits, labels = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        else:
            labels = torch.zeros(batch, dtype=torch.int64)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the optimiser's state exists from here on
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return held + most


BERT = (BertForSequenceClassification, lambda: config_of("packaged:minilm", num_labels=4), ("classifier",))
LLAMA = (LlamaForCausalLM, llama_config, ())


@pytest.mark.parametrize(
    ("kind", "config", "heads", "attention", "shape"),
    [
        (*BERT, "sdpa", (4, 64)),
        (*BERT, "sdpa", (16, 32)),
        (*BERT, "sdpa", (32, 32)),
        (*BERT, "eager", (8, 64)),
        (*LLAMA, "sdpa", (4, 64)),
        (*LLAMA, "sdpa", (32, 32)),
        (*LLAMA, "eager", (16, 64)),
    ],
)
def test_predicted_peak_at_16_bits_is_within_5_percent_of_the_measured(kind, config, heads, attention, shape):
    config = config()
    config._attn_implementation = attention
    spec = model_spec(kind, config, heads)
    model, ranks = adapted(kind, config, heads, torch.bfloat16)
    memory = MemoryModel(attention=kept_attention(model.config, CPU))
    predicted = memory.predict(spec, ranks, 16, *shape).total
    assert predicted == pytest.approx(measured_peak(model, *shape, bool(heads)), rel=0.05)


@pytest.mark.parametrize(("kind", "config", "heads"), [BERT, LLAMA])
def test_predicted_peak_at_32_bits_errs_on_the_safe_side(kind, config, heads):
    config = config()
    spec = model_spec(kind, config, heads)
    model, ranks = adapted(kind, config, heads, torch.float32)
    memory = MemoryModel(attention=kept_attention(model.config, CPU))
    measured = measured_peak(model, 16, 32, bool(heads))
    assert 1 <= memory.predict(spec, ranks, 32, 16, 32).total / measured < 1.2
    fitted = calibrated(memory, spec, measured, ranks=ranks, bits=32, batch=16, length=32)
    other = measured_peak(model, 4, 32, bool(heads))
    assert fitted.predict(spec, ranks, 32, 4, 32).total == pytest.approx(other, rel=0.05)


def test_predicted_peak_with_checkpointing_is_within_15_percent_of_the_measured():
    spec = model_spec(LlamaForCausalLM, llama_config())
    model, ranks = adapted(LlamaForCausalLM, llama_config(), (), torch.bfloat16)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    predicted = MemoryModel(checkpointing=True).predict(spec, ranks, 16, 16, 64).total
    assert predicted == pytest.approx(measured_peak(model, 16, 64, False), rel=0.15)


def test_predicted_peak_counts_nothing_below_the_lowest_adapted_block():
    spec = model_spec(LlamaForCausalLM, llama_config())
    model, ranks = adapted(LlamaForCausalLM, llama_config(), (), torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".layers.2." not in name:
            parameter.requires_grad_(False)
    full = MemoryModel().predict(spec, ranks, 16, 16, 64).total
    # Rank 8 everywhere is held, but only the top block is trained.
    frozen = sum(4 * weight.adapter_parameters(8) for weight in spec.weights if weight.block < 2)
    top = {name: rank for name, rank in ranks.items() if ".layers.2." in name}
    predicted = MemoryModel().predict(spec, top, 16, 16, 64).total + frozen
    assert predicted == pytest.approx(measured_peak(model, 16, 64, False), rel=0.15)
    assert predicted < 0.8 * full


@pytest.mark.parametrize(
    ("attention", "dropout", "device", "kept"),
    [
        ("eager", 0.1, "cpu", "eager"),
        ("sdpa", 0.1, "cpu", "math"),
        ("sdpa", 0.0, "cpu", "sdpa"),
        ("sdpa", 0.1, "cuda", "sdpa"),
    ],
)
def test_what_attention_keeps(attention, dropout, device, kept):
    config = llama_config()
    config._attn_implementation, config.attention_dropout = attention, dropout
    assert kept_attention(config, torch.device(device)) == kept
