"""Forward mode against back-propagation, finite differences and counted operations."""

import dataclasses
import math
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from fedllm.clients.forward_ad import ForwardAD
from fedllm.clients.forward_ad import client as module_under_test
from fedllm.clients.forward_ad.adapted import AdaptedLinear, adapted_linear
from fedllm.clients.forward_ad.attention import NAME, Attention, chunked_attention
from fedllm.clients.forward_ad.check import check_derivative, check_loss_agrees, short_batch
from fedllm.clients.forward_ad.estimator import ControlVariate
from fedllm.clients.forward_ad.exchange import exchanged
from fedllm.clients.forward_ad.jvp import dual_pass
from fedllm.clients.forward_ad.linear import frozen_linear
from fedllm.clients.forward_ad.norm import frozen_layer_norm
from fedllm.clients.forward_ad.setting import forward_mode
from fedllm.clients.forward_ad.token_loss import has_plain_output
from fedllm.clients.forward_ad.weights import FrozenWeight, Products, weight_of
from fedllm.clients.local import pieces_of
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from fedllm import registry
from fedllm.encoded import IGNORED, Encoded
from fedllm.errors import ConfigError, ModelError, TrainError
from fedllm.lora_targets import linear_layers
from fedllm.models import load_bundle
from fedllm.records import DIRECTION, SCALARS, encode, wire_bytes
from fedllm.tangents import draw, from_scalars, project, regenerate
from fedllm.tasks import get_task
from fedllm.update import TrainJob
from tests.unit.test_strategy_contract import job

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="fedllm[quantization] is missing"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_of(family, **changes):
    sizes = {**SIZES, **TOKENS, **changes}
    wide = {"intermediate_size": 64}
    if family == "bert":
        return transformers.BertConfig(**sizes, **wide)
    if family == "roberta":
        return transformers.RobertaConfig(**sizes, **wide)
    if family == "distilbert":
        narrow = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        return transformers.DistilBertConfig(vocab_size=99, pad_token_id=0, **narrow)
    if family == "gpt2":
        narrow = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4}
        return transformers.GPT2Config(vocab_size=99, **TOKENS, **narrow)
    if family == "opt":
        return transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=16, **sizes)
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    return kind(num_key_value_heads=2, **sizes, **wide)


HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "llama-classifier": ["score"],
}
FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "opt", "llama", "qwen2", "llama-classifier"]


def quantise(model, names, bits):
    """Hold the named linear layers in 4 or 8 bits."""
    import bitsandbytes

    for name in names:
        layer = model.get_submodule(name)
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == "4bit":
            packed = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False
        else:
            packed = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        packed.load_state_dict(layer.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.requires_grad_(False).to("cpu"))


class Case:
    """An adapted model with a batch, its trainable parameters and the gradient by back-propagation."""

    def __init__(self, family, rows=3, length=10, bits="", **changes):
        torch.manual_seed(0)
        heads = HEADS.get(family, [])
        auto = transformers.AutoModelForSequenceClassification if heads else transformers.AutoModelForCausalLM
        base = auto.from_config(config_of(family.removesuffix("-classifier"), **changes)).eval()
        base.config.use_cache = False
        targets = linear_layers(base, heads)
        if bits:
            quantise(base, targets, bits)
        settings = peft.LoraConfig(
            r=4,
            target_modules=targets,
            modules_to_save=heads or None,
            fan_in_fan_out=family == "gpt2",
        )
        self.model = peft.get_peft_model(base, settings).eval()
        self.task = get_task("sequence-classification" if heads else "causal-lm")
        ids = torch.randint(3, 99, (rows, length))
        mask = torch.ones_like(ids)
        mask[1, -3:], ids[1, -3:] = 0, 0
        labels = torch.arange(rows) % 2 if heads else ids.masked_fill(mask == 0, IGNORED)
        self.batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.factors = {n: p for n, p in self.parameters.items() if "lora_" in n}
        self.heads = {n: p for n, p in self.parameters.items() if n not in self.factors}
        with torch.no_grad():
            for name, parameter in self.factors.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    def point(self):
        return {name: parameter.detach() for name, parameter in self.factors.items()}

    def tangents(self, count):
        return [{n: torch.randn_like(p) for n, p in self.factors.items()} for _ in range(count)]

    def gradient(self):
        """Loss and gradient by back-propagation."""
        loss = self.task.loss(self.model, self.batch)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return loss.item(), dict(zip(self.parameters, gradients, strict=True))

    def dual(self, tangents, at_once=1):
        with forward_mode(self.model, self.task, self.parameters) as loss:
            return dual_pass(loss.at(self.batch), self.point(), tangents, self.heads, self.model, at_once)


def product(gradient, tangent):
    return sum(float((gradient[name].double() * value).sum()) for name, value in tangent.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_jvp_is_the_product_with_the_gradient(family):
    case = Case(family)
    loss, gradient = case.gradient()
    tangents = case.tangents(3)
    for at_once in (1, 2, 3):
        found = case.dual(tangents, at_once)
        assert found.loss == pytest.approx(loss, rel=1e-6)
        for value, tangent in zip(found.jvps.tolist(), tangents, strict=True):
            assert value == pytest.approx(product(gradient, tangent), rel=1e-4)
        assert set(found.heads) == set(case.heads)
        for name, value in found.heads.items():
            torch.testing.assert_close(value, gradient[name], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in case.parameters.values())


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_forward_gradients_of_a_model_are_unbiased(distribution):
    """1,000 seeds of real dual passes, K = 1 and K = 4, against back-propagation along seven directions.

    If the estimates are unbiased, a mean is off by more than 5 standard errors in one direction with probability
    5.7e-7, and in any of the 14 with 8e-6 at most (Bonferroni; normal approximation). Along the gradient itself, the
    first direction, the standard error is 4.5 %, so that a bias of a quarter is seen. The variance must fall to a
    quarter, which samples of 1,000 hold to a fifth.
    """
    case = Case("bert", rows=2, length=4)
    _, gradient = case.gradient()
    exact = torch.cat([gradient[name].flatten() for name in case.factors]).double()
    generator = torch.Generator().manual_seed(5)
    along = torch.stack([exact, *torch.randn(6, len(exact), generator=generator, dtype=torch.float64)])
    along /= along.norm(dim=1, keepdim=True)
    estimates = []
    for first in range(0, 4000, 200):
        tangents = [
            {n: draw(first + k, 1, 1, n, p.shape, distribution) for n, p in case.factors.items()}
            for k in range(200)
        ]
        flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in tangents]).double()
        estimates.append(case.dual(tangents, 200).jvps[:, None] * (flat @ along.T))
    singles = torch.cat(estimates)  # 4,000 seeds of ⟨s v, u⟩ for every direction u
    variances = []
    for samples in (singles[:1000], singles.reshape(1000, 4, -1).mean(1)):
        error = (samples.mean(0) - along @ exact) / (samples.std(0) / math.sqrt(1000))
        assert error.abs().max() < 5
        variances.append(samples.var(0).mean())
    assert float(variances[0] / variances[1]) == pytest.approx(4, rel=0.2)


def bundle_job(family="llama", rows=8, **keys):
    flat = {"model.name": f"tiny-random:{family}", "lora.rank": 2, "train.batch-size": 4, **keys}
    classes = family == "bert"
    flat["task"] = "sequence-classification" if classes else "causal-lm"
    config = registry.config_from_flat(flat)
    bundle = load_bundle(config, ("a", "b") if classes else ())
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 50, (6,), generator=generator).tolist() for _ in range(rows)]
    examples = Encoded.from_lists(tokens, [i % 2 for i in range(rows)] if classes else tokens)
    start = {
        name: draw(1, 1, 1, name, value.shape, "gaussian") * 0.1 if "lora_B" in name else value
        for name, value in bundle.initial_state.items()
    }
    bundle.load_adapter_state(start)
    return TrainJob(bundle, get_task(config.task), examples, config.train, 1, 1, "0", start)


def dense_layers(used):
    """An exchange of quantised layers for ordinary ones with the dequantised weights, which ``used`` collects."""

    def dense(module):
        if not type(module).__module__.startswith("bitsandbytes"):
            return None
        weight = weight_of(module).dense().float()
        used.append(weight)
        return lambda x: F.linear(x, weight, module.bias)

    return dense


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "opt", "llama", "qwen2"])
def test_jvp_on_quantised_layers_of_every_family(family, bits):
    """The oracle: back-propagation through dense layers. GPT-2, whose layers are no ``nn.Linear``: the next test."""
    case, used = Case(family, bits=bits), []
    with exchanged(case.model, dense_layers(used)):
        loss, gradient = case.gradient()
    assert len(used) == sum("lora_A" in name for name in case.factors)
    tangents = case.tangents(2)
    for at_once in (1, 2):
        found = case.dual(tangents, at_once)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        expected = [product(gradient, tangent) for tangent in tangents]
        assert found.jvps.tolist() == pytest.approx(expected, rel=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_jvp_on_quantised_bases(family, bits):
    """As loaded by fedllm; the oracle is back-propagation through dense layers."""
    task = bundle_job(family, **{"model.quantization": bits})
    bundle = task.bundle
    parameters = {n: p for n, p in bundle.trainable().items() if not bundle.is_head(n)}
    batch, _ = next(pieces_of(task, range(4), 4))
    tangent = {n: draw(2, 1, 1, n, p.shape, "gaussian") for n, p in parameters.items()}
    quantised = []
    with exchanged(bundle.model, dense_layers(quantised)):
        loss = task.task.loss(bundle.model, batch)
        gradient = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert len(quantised) == sum("lora_A" in name for name in parameters)
    with forward_mode(bundle.model, task.task, parameters) as objective:
        point = {name: parameter.detach() for name, parameter in parameters.items()}
        found = dual_pass(objective.at(batch), point, [tangent])
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert float(found.jvps) == pytest.approx(product(gradient, tangent), rel=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights_are_unpacked_by_rows(monkeypatch, bits):
    """64 inputs a row: one block of scales in 4 bits."""
    import bitsandbytes

    torch.manual_seed(0)
    kinds = {
        "4bit": lambda: bitsandbytes.nn.Linear4bit(
            64, 10, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
        ),
        "8bit": lambda: bitsandbytes.nn.Linear8bitLt(64, 10, has_fp16_weights=False),
    }
    layer = kinds[bits]().requires_grad_(False).to("cpu")
    whole = weight_of(layer).dense().float()
    assert whole.shape == (10, 64)
    monkeypatch.setattr("fedllm.clients.forward_ad.weights._UNPACKED", 3 * 64)
    cut = weight_of(layer)
    assert cut.step == 3
    products, x = Products(cut, torch.float32), torch.randn(2, 64)
    torch.testing.assert_close(products.forward(x, layer.bias), F.linear(x, whole, layer.bias))
    torch.testing.assert_close(products.backward(torch.ones(2, 10)), torch.ones(2, 10) @ whole)
    many = torch.randn(4, 2, 64)
    found = torch.vmap(lambda v: torch.func.jvp(frozen_linear(layer), (x,), (v,))[1])(many)
    torch.testing.assert_close(found, many @ whole.t(), rtol=1e-4, atol=1e-5)


def linear_case(kind):
    torch.manual_seed(1)
    layer = Conv1D(5, 7) if kind == "conv1d" else nn.Linear(7, 5, bias=kind != "no bias")
    layer.requires_grad_(False)
    return layer, frozen_linear(layer), torch.randn(4, 3, 7), torch.randn(4, 3, 7)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_frozen_linear_under_both_interfaces_and_vmap(kind):
    layer, fast, x, tangent = linear_case(kind)
    value, slope = torch.func.jvp(fast, (x,), (tangent,))
    wanted, wanted_slope = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close((value, slope), (wanted, wanted_slope))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(fast(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close((dual.primal, dual.tangent), (wanted, wanted_slope))
    many = torch.randn(6, *x.shape)
    slopes = torch.vmap(lambda v: torch.func.jvp(fast, (x,), (v,))[1])(many)
    torch.testing.assert_close(slopes, torch.stack([torch.func.jvp(layer, (x,), (v,))[1] for v in many]))
    torch.testing.assert_close(fast(x), layer(x))


def test_frozen_linear_with_a_trainable_bias():
    layer, _, x, tangent = linear_case("linear")
    bias, along = layer.bias.detach(), torch.randn(5)

    def value(x, bias):
        return F.linear(x, layer.weight, bias)

    def fast(x, bias):
        return torch.func.functional_call(Swapped(layer), {"layer.bias": bias}, (x,))

    class Swapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return frozen_linear(self.layer)(x)

    for inputs, tangents in [((x, bias), (tangent, along)), ((x, bias), (torch.zeros_like(x), along))]:
        torch.testing.assert_close(
            torch.func.jvp(fast, inputs, tangents), torch.func.jvp(value, inputs, tangents)
        )
    only = torch.func.jvp(lambda b: fast(x, b), (bias,), (along,))[1]
    torch.testing.assert_close(only, along.expand(4, 3, 5))


def test_frozen_linear_goes_backwards_too():
    layer, fast, x, _ = linear_case("linear")
    layer.bias.requires_grad_(True)
    x.requires_grad_(True)
    found = torch.autograd.grad(fast(x).square().sum(), (x, layer.bias))
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    torch.testing.assert_close(found, wanted)


def test_a_trained_layer_keeps_its_own_rule():
    assert frozen_linear(nn.Linear(2, 2)) is None
    assert frozen_linear(nn.LayerNorm(2).requires_grad_(False)) is None


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_dual_pass_costs_at_most_2_2_inferences(family):
    """All blocks perturbed; rank 1, as in the paper, so that the factors themselves weigh little."""
    case = Case(family, hidden_size=128, num_attention_heads=4)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        case.task.loss(case.model, case.batch)
    with FlopCounterMode(display=False) as dual:
        case.dual(case.tangents(1))
    ratio = dual.get_total_flops() / inference.get_total_flops()
    assert 1.6 < ratio <= 2.2  # the first block's input has no tangent
    with FlopCounterMode(display=False) as shared:
        case.dual(case.tangents(4), at_once=4)
    assert shared.get_total_flops() <= 5.5 * inference.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_head", [True, False])
def test_chunked_attention_is_attention(monkeypatch, groups, per_head):
    monkeypatch.setattr("fedllm.clients.forward_ad.attention._SCORES", 2 * groups * 6 * 5)
    torch.manual_seed(0)
    query = torch.randn(2, 3 * groups, 6, 8)
    key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.randn(2, 3 * groups if per_head else 1, 6, 5)
    found, _ = chunked_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    many = [tensor.repeat_interleave(groups, dim=1) for tensor in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *many, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def checks(function, *inputs):
    """Backward, forward and batched forward derivatives against finite differences, in float64."""
    return torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True
    )


def doubles(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("extras", [True, False])
def test_attention_has_its_derivatives(extras):
    query, key, value = doubles((2, 3, 2, 4, 5), (2, 3, 1, 6, 5), (2, 3, 1, 6, 5))
    mask = torch.randn(2, 1, 1, 4, 6, dtype=torch.float64) if extras else None
    kept = F.dropout(torch.ones(2, 3, 2, 4, 6, dtype=torch.float64), 0.3) if extras else None
    assert checks(lambda *qkv: Attention.apply(*qkv, mask, kept, 0.4)[0], query, key, value)


def test_adapted_linear_has_its_derivatives():
    x, a, b, bias, weight = doubles((2, 3, 5), (2, 5), (4, 2), (4,), (4, 5))
    held = Products(FrozenWeight(4, 3, lambda first, last: weight.detach()[first:last]), torch.float64)

    def whole(x, a, b, bias):
        return AdaptedLinear.apply(x, 2 * x, a, b, bias, held, 1.5)

    assert checks(whole, x, a, b, bias)
    for index in range(4):  # one tangent at a time
        inputs = [value.detach() for value in (x, a, b, bias)]
        inputs[index].requires_grad_(True)
        assert checks(whole, *inputs)
    expected = x @ weight.t() + bias + 1.5 * (2 * x @ a.t()) @ b.t()
    torch.testing.assert_close(whole(x, a, b, bias), expected)


def test_layer_norm_has_its_derivatives():
    layer = nn.LayerNorm(6).double().requires_grad_(False)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    (x,) = doubles((3, 6))
    fast = frozen_layer_norm(layer)
    torch.testing.assert_close(fast(x), layer(x))
    assert checks(fast, x)
    assert frozen_layer_norm(nn.LayerNorm(6)) is None
    assert frozen_layer_norm(nn.LayerNorm(6, elementwise_affine=False)) is None


def test_layer_norm_of_small_values_does_not_overflow_in_float16():
    layer = nn.LayerNorm(8).half().requires_grad_(False)
    x, tangent = torch.randn(2, 8) * 1e-3, torch.randn(2, 8)
    found = torch.func.jvp(frozen_layer_norm(layer), (x.half(),), (tangent.half(),))[1]
    wanted = torch.func.jvp(layer.float(), (x.half().float(),), (tangent.half().float(),))[1]
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=0.1)


def test_plain_adapters_only_are_fused():
    case = Case("llama")
    layers = [m for m in case.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert not any(adapted_linear(layer) for layer in case.model.modules() if layer not in layers)
    assert all(adapted_linear(layer) for layer in layers)
    case.model.add_adapter("second", case.model.peft_config["default"])
    case.model.base_model.set_adapter(["default", "second"])
    assert not any(adapted_linear(layer) for layer in layers)


def test_unknown_kinds_of_attention_are_refused():
    tensors = [torch.zeros(1, 1, 2, 2)] * 3
    with pytest.raises(ModelError, match="Identity: forward mode has no attention with softcap"):
        chunked_attention(nn.Identity(), *tensors, None, softcap=30.0)


def test_a_model_bound_to_a_kernel_without_derivative_is_refused(monkeypatch):
    case = Case("bert")
    base = case.model.get_base_model()
    monkeypatch.setattr(type(base), "_can_set_attn_implementation", classmethod(lambda cls: False))
    base.config._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(ModelError, match=r"BertForSequenceClassification.*flash_attention_2.*model.attention"),
        forward_mode(case.model, case.task, case.parameters),
    ):
        pass


def test_the_model_is_restored_also_after_an_error():
    case = Case("llama")
    before = case.model.config._attn_implementation
    module = case.model.get_base_model().lm_head
    own = module.__dict__["forward"] = type(module).forward.__get__(module)

    def inside():
        with forward_mode(case.model, case.task, case.parameters):
            assert case.model.config._attn_implementation == NAME
            assert module.__dict__["forward"] is not own
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    assert case.model.config._attn_implementation == before
    assert module.__dict__["forward"] is own
    assert not any("forward" in m.__dict__ for m in case.model.modules() if m is not module)
    assert not any(m._forward_pre_hooks for m in case.model.modules())


def test_a_language_models_loss_without_its_logits(monkeypatch):
    monkeypatch.setattr("fedllm.clients.forward_ad.token_loss._LOGITS", 99 * 4)
    case = Case("llama")
    assert has_plain_output(case.model.get_base_model())
    loss, gradient = case.gradient()
    tangent = case.tangents(1)
    found = case.dual(tangent)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert float(found.jvps) == pytest.approx(product(gradient, tangent[0]), rel=1e-4)


def test_scaled_logits_are_not_a_plain_output():
    base = Case("llama").model.get_base_model()
    base.config.final_logit_softcapping = 30.0
    assert not has_plain_output(base)


# --------------------------------------------------------------------- start-up check


def checked(case, dtype=torch.float32):
    with forward_mode(case.model, case.task, case.parameters) as loss:
        check_derivative(loss, short_batch(case.batch), case.point(), dtype, "model")


def test_the_check_passes_and_leaves_no_gradient():
    case = Case("llama")
    checked(case)
    assert all(parameter.grad is None for parameter in case.parameters.values())


class Forgetful(torch.autograd.Function):
    """A layer that loses its tangent, as stock ``Linear4bit`` does on a CPU."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_the_check_names_both_numbers_when_a_tangent_is_lost():
    case = Case("llama")
    layer = case.model.get_base_model().model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: Forgetful.apply(own(x))
    with pytest.raises(
        ModelError, match=r"model: the forward-mode derivative of the loss is .* central diff"
    ):
        checked(case)


def test_the_check_compares_the_losses():
    check_loss_agrees(1.0, 1.0009, 0.001, "model")
    with pytest.raises(ModelError, match=r"the loss in forward mode is 1.1, but that of the model is 1 "):
        check_loss_agrees(1.1, 1.0, 0.001, "model")
    with pytest.raises(ModelError):
        check_loss_agrees(math.nan, 1.0, 0.001, "model")


def test_a_model_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module_under_test, "check_derivative", lambda *args: calls.append(args))
    module_under_test._CHECKED.clear()
    for _ in range(2):
        ForwardAD().run(job(local_steps=1))
    assert len(calls) == 1


def test_the_check_covers_what_the_first_job_does_not_own():
    """A client that owns the top block only would not see that a lower layer loses its tangent."""
    task = bundle_job("llama")
    layer = task.bundle.model.get_base_model().model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: Forgetful.apply(own(x))
    top = tuple(name for name in task.bundle.trainable() if ".layers.1." in name)
    module_under_test._CHECKED.clear()
    try:
        with pytest.raises(ModelError, match="central differences"):
            ForwardAD().run(dataclasses.replace(task, owned=top))
    finally:
        del layer.forward


def test_the_exchange_of_attention_is_told_once(caplog):
    module_under_test._CHECKED.clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            ForwardAD().run(job(local_steps=1))
    assert sum("forward-ad replaces its attention" in record.message for record in caplog.records) == 1


# --------------------------------------------------------------------- client


def by_hand(task, rate, head_rate, steps, count, b_only=False):
    """SGD along regenerated forward gradients whose scalars come from back-propagation."""
    parameters = task.bundle.trainable()
    bundle = task.bundle
    from fedllm.batches import train_batches

    for step, indices in enumerate(train_batches(task.examples, task.train, task.seed), start=1):
        if step > steps:
            break
        batch = task.task.collate(task.examples, indices, bundle.tokenizer.pad_token_id)
        loss = task.task.loss(bundle.model, batch)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        factors = {
            n: g for n, g in gradients.items() if not bundle.is_head(n) and ("lora_B" in n or not b_only)
        }
        scalars = project(task.seed, step, count, factors, "rademacher")
        shapes = {name: gradient.shape for name, gradient in factors.items()}
        estimate = regenerate(task.seed, step, scalars, shapes, "rademacher")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if bundle.is_head(name):
                    parameter -= head_rate * gradients[name]
                elif name in estimate:
                    parameter -= rate * estimate[name]
    return bundle.adapter_state()


@pytest.mark.parametrize("b_only", [False, True])
def test_local_steps_are_sgd_along_forward_gradients(b_only):
    make = lambda: job(local_steps=3, head_learning_rate=0.05)  # noqa: E731
    expected = by_hand(make(), 1e-2, 0.05, 3, 2, b_only)
    found = ForwardAD(tangents=2, b_only=b_only).run(make()).arrays
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"tangent_chunk": 1}])
def test_pieces_change_nothing(settings):
    whole = ForwardAD(tangents=3).run(job(local_steps=2))
    cut = ForwardAD(tangents=3, **settings).run(job(local_steps=2))
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, value in whole.arrays.items():
        torch.testing.assert_close(cut.arrays[name], value, rtol=1e-4, atol=1e-6)


def test_only_owned_tensors_are_trained_and_returned():
    task = job(local_steps=2)
    names = list(task.start)
    owned = tuple(names[2:4])
    result = ForwardAD().run(dataclasses.replace(task, owned=owned))
    assert tuple(result.arrays) == owned
    after = task.bundle.adapter_state()
    for name in names:
        assert torch.equal(after[name], task.start[name]) == (
            name not in owned or not bool((result.arrays[name] - task.start[name]).any())
        )
    assert any(not torch.equal(result.arrays[name], task.start[name]) for name in owned)
    assert all(parameter.requires_grad for parameter in task.bundle.trainable().values())


def test_the_server_rebuilds_the_clients_gradient_bit_for_bit():
    """One SGD step of length 1 from zero is minus the gradient that the client used."""
    task = job(local_steps=1)
    task = dataclasses.replace(task, train=task.train.model_copy(update={"learning_rate": 1.0}))
    zero = {name: torch.zeros_like(v) if "lora_B" in name else v for name, v in task.start.items()}
    task.bundle.load_adapter_state(zero)
    sent = ForwardAD(tangents=3, upload="scalars").run(task)
    assert all(torch.equal(v, zero[name]) for name, v in task.bundle.adapter_state().items())
    moved = ForwardAD(tangents=3, b_only=False).run(task).arrays
    adapter = {name: v.shape for name, v in zero.items() if not task.bundle.is_head(name)}
    heads = {name: v.shape for name, v in zero.items() if task.bundle.is_head(name)}
    scalars = sent.arrays[SCALARS]
    assert scalars.shape == (3 + 8,)
    rebuilt = from_scalars(task.seed, 1, scalars, adapter, heads, 3, "rademacher")
    for name in adapter:
        if "lora_B" in name:
            assert torch.equal(0 - rebuilt[name], moved[name])
    exact = {name: (zero[name] - moved[name]).double() for name in heads}
    along = project_double(exact, rebuilt)
    assert along > 0  # ⟨g, ĝ⟩ = mean of squares


def project_double(left, right):
    return sum(float((left[name] * right[name].double()).sum()) for name in left)


def test_scalars_take_less_than_100_bytes():
    result = ForwardAD(tangents=4, upload="scalars").run(job())
    assert wire_bytes(encode(result.arrays, "raw")) == 4 * (4 + 8) < 100


def test_no_head_no_projections():
    task = job()
    owned = tuple(name for name in task.start if not task.bundle.is_head(name))[:2]
    result = ForwardAD(tangents=4, upload="scalars").run(dataclasses.replace(task, owned=owned))
    assert result.arrays[SCALARS].shape == (4,)


def test_a_client_may_own_nothing_but_a_head():
    task = job(local_steps=2)
    owned = tuple(name for name in task.start if task.bundle.is_head(name))
    result = ForwardAD().run(dataclasses.replace(task, owned=owned))
    assert all(not torch.equal(result.arrays[name], task.start[name]) for name in owned)


def test_a_client_without_anything_to_train_is_told():
    task = job()
    owned = (next(name for name in task.start if "lora_A" in name),)
    with pytest.raises(TrainError, match="client 0, round 1: none of its 1 tensors is trained"):
        ForwardAD(b_only=True).run(dataclasses.replace(task, owned=owned))


def test_the_paper_perturbs_heads_too():
    task = job(seed=3, local_steps=1)
    result = ForwardAD(exact_heads=False, distribution="gaussian", upload="scalars", tangents=2).run(task)
    batch_loss = by_hand_gradient(task)
    scalars = project(task.seed, 1, 2, batch_loss, "gaussian")
    torch.testing.assert_close(result.arrays[SCALARS], scalars, rtol=1e-3, atol=1e-6)


def by_hand_gradient(task):
    from fedllm.batches import train_batches

    parameters = task.bundle.trainable()
    indices = next(train_batches(task.examples, task.train, task.seed))
    batch = task.task.collate(task.examples, indices, task.bundle.tokenizer.pad_token_id)
    gradients = torch.autograd.grad(task.task.loss(task.bundle.model, batch), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def test_dropout_is_off_unless_asked_for():
    quiet = [ForwardAD().run(job(local_steps=1)).loss for _ in range(2)]
    torch.manual_seed(5)
    noisy = ForwardAD(dropout=True).run(job(local_steps=1)).loss
    assert quiet[0] == quiet[1] != noisy


def test_control_variate_is_unbiased_and_less_noisy():
    """h with cosine 0.9 to g leaves 1 − 0.81 of the squared error once c has been learnt."""
    size, runs = 200, 400
    true = draw(1, 1, 1, "g", (size,), "gaussian")
    other = draw(2, 1, 1, "g", (size,), "gaussian")
    other -= true * (other @ true) / (true @ true)
    direction = -5 * (0.9 * true / true.norm() + math.sqrt(1 - 0.81) * other / other.norm())
    control, errors, plain, estimates = ControlVariate({"g": direction}), [], [], []
    for step in range(1, runs + 1):
        jvp = project(1, step, 1, {"g": true}, "rademacher")
        along = project(1, step, 1, {"g": direction}, "rademacher")
        share, rest = control.split(jvp, along)
        found = regenerate(1, step, rest, {"g": (size,)}, "rademacher")["g"] + share * direction
        without = regenerate(1, step, jvp, {"g": (size,)}, "rademacher")["g"]
        if step > 50:
            estimates.append(found)
            errors.append(float((found - true).square().sum()))
            plain.append(float((without - true).square().sum()))
    assert sum(errors) / sum(plain) == pytest.approx(1 - 0.81, abs=0.08)
    stacked = torch.stack(estimates)
    deviation = (stacked.mean(0) - true).abs() / (stacked.std(0) / len(stacked) ** 0.5)
    assert deviation.max() < 5


def test_control_variate_needs_the_servers_step():
    plain = ForwardAD(control_variate=True).run(job(local_steps=2)).arrays
    direction = {name: -torch.ones_like(value) for name, value in job().start.items()}
    task = dataclasses.replace(job(local_steps=2), inputs={DIRECTION: direction})
    known = ForwardAD(control_variate=True).run(task).arrays
    assert any(not torch.equal(plain[name], known[name]) for name in plain)
    with pytest.raises(ConfigError, match="control-variate needs"):
        ForwardAD(control_variate=True, upload="scalars")


def test_overflow_in_half_precision_names_step_and_tensor():
    task = bundle_job("llama", **{"model.dtype": "float16", "train.local-steps": 1})
    name = next(name for name in task.start if "layers.1.mlp.up_proj.lora_B" in name)
    owner = task.bundle.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    state = {key: torch.zeros_like(v) if "lora_B" in key else v for key, v in task.start.items()}
    task.bundle.load_adapter_state(state)
    task = dataclasses.replace(task, owned=(next(iter(task.start)), name))
    ForwardAD().run(task)  # finite as it is, and the check is done
    task.bundle.load_adapter_state(state)
    owner.scaling["default"], before = 1e6, owner.scaling["default"]
    try:
        with pytest.raises(
            TrainError, match=rf"the derivative of step 1 along tangent 1 is .*{name}.*float16"
        ):
            ForwardAD().run(task)
    finally:
        owner.scaling["default"] = before


def test_a_loss_that_is_not_finite_is_named():
    task = job()
    state = {name: value.clone() for name, value in task.start.items()}
    head = next(name for name in state if task.bundle.is_head(name))
    state[head].fill_(3e38)
    task.bundle.load_adapter_state(state)
    with pytest.raises(TrainError, match="client 0, round 1: the loss of step 1 is"):
        ForwardAD().run(task)
