"""Gradient modes against plain back-propagation, directional derivatives and formulas by hand."""

from dataclasses import replace

import pytest
import torch
from fedllm.clients.backprop import Backprop
from fedllm.clients.backprop_checkpointed import BackpropCheckpointed
from fedllm.clients.backprop_top_k import BackpropTopK, top_names
from fedllm.clients.fwdllm import FwdLLM, most_similar, paced_mean
from fedllm.clients.local import batch_of, owned_parameters, steps_of, training
from fedllm.clients.zeroth_order import ZerothOrder, directional_slope, directions, perturb

from fedllm.errors import TrainError
from fedllm.records import DIRECTION
from tests.unit.test_strategy_contract import job


@pytest.fixture
def task(monkeypatch):
    """A job of one step without dropout, with adapters that are not zero."""

    def build(**train):
        found = job(**{"local_steps": 1} | train)
        for module in found.bundle.model.modules():
            if isinstance(module, torch.nn.Dropout):
                monkeypatch.setattr(module, "p", 0.0)
        generator = torch.Generator().manual_seed(3)
        state = {
            k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in sorted(found.start.items())
        }
        found.bundle.load_adapter_state({name: state[name] for name in found.start})
        return replace(found, start=found.bundle.adapter_state())

    return build


def gradient_by_backprop(job):
    """The gradient of the first batch with respect to every trainable tensor."""
    parameters = job.bundle.trainable()
    _, indices = next(steps_of(job))
    loss = job.task.loss(job.bundle.model, batch_of(job, indices))
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def step_of(update, job):
    """How far one step of SGD moved every tensor, as a gradient."""
    arrays = update.run(job).arrays
    return {name: (job.start[name] - value) / job.train.learning_rate for name, value in arrays.items()}


# ------------------------------------------------------------- checkpointed


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"offload": True}])
def test_checkpointed_gradient_is_the_plain_one(task, options):
    expected = gradient_by_backprop(task())
    update = BackpropCheckpointed(optimizer="sgd", max_grad_norm=0.0, **options)
    found = step_of(update, task())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("device", "offload", "expected"), [("cuda", True, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_block_inputs_go_to_the_host_where_they_are_not_there_anyway(
    task, monkeypatch, device, offload, expected
):
    """Moving them is transformers' work; what it is asked for is ours."""
    found = task()
    base, asked = found.bundle.model.get_base_model(), []
    enable = base.activation_checkpointing_enable

    def record(**options):
        asked.append(options["offload"])
        enable(**options | {"offload": False})

    monkeypatch.setattr(base, "activation_checkpointing_enable", record)
    monkeypatch.setattr(found.bundle, "device", torch.device(device))
    with found.bundle.gradient_checkpointing(offload=offload):
        pass
    assert asked == [expected]


def saved_bytes(job, parameters, checkpointing=False):
    """Bytes that autograd saves in one forward pass, without weights and without what checkpoints hide."""
    weights = {p.untyped_storage().data_ptr() for p in job.bundle.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    _, indices = next(steps_of(job))
    with (
        training(job, parameters),
        job.bundle.gradient_checkpointing(checkpointing),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        job.task.loss(job.bundle.model, batch_of(job, indices))
    return sum(storage.nbytes() for storage in kept.values())


def test_checkpointing_keeps_less_for_the_backward_pass(task):
    """The inputs of the blocks are saved instead of all that they compute."""
    found = task()
    everything = found.bundle.trainable()
    assert saved_bytes(found, everything, checkpointing=True) < saved_bytes(found, everything) / 3


def test_checkpointing_leaves_nothing_behind(task):
    """transformers makes the embeddings' output need a gradient; afterwards top-k would keep all blocks."""
    found = task()
    top = top_names(list(found.bundle.trainable()), 1)
    parameters = {name: p for name, p in found.bundle.trainable().items() if name in top}
    before = saved_bytes(found, parameters)
    BackpropCheckpointed().run(found)
    assert saved_bytes(found, parameters) == before


# -------------------------------------------------------------------- top k


def test_top_k_gradients_are_the_plain_ones_and_the_rest_stays(task):
    expected = gradient_by_backprop(task())
    top = top_names(list(expected), 1)
    found = step_of(BackpropTopK(blocks=1, optimizer="sgd", max_grad_norm=0.0), task())
    assert set(found) == set(expected)
    trained = {name for name in expected if name in top or task().bundle.is_head(name)}
    assert {name for name in found if found[name].any()} == trained
    assert any("layer.0." in name for name in set(expected) - trained)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)


def test_top_k_saves_nothing_below(task):
    """One of two blocks: about half of what both need."""
    found = task()
    everything = found.bundle.trainable()
    top = top_names(list(everything), 1)
    of_top = saved_bytes(found, {name: p for name, p in everything.items() if name in top})
    assert of_top < 0.6 * saved_bytes(found, everything)


def test_top_names_take_what_comes_after_the_blocks_and_not_what_comes_before():
    names = ["m.embed.a", "m.layer.0.a", "m.layer.1.a", "m.layer.10.a", "m.out.a"]
    assert top_names(names, 1) == {"m.layer.10.a", "m.out.a"}
    assert top_names(names, 2) == {"m.layer.1.a", "m.layer.10.a", "m.out.a"}
    assert top_names(names, 3) == set(names)
    assert top_names(names, 0) == set()


def test_without_blocks_the_head_alone_is_trained(task):
    found = task()
    arrays = BackpropTopK(blocks=0).run(found).arrays
    moved = {name for name in arrays if not torch.equal(arrays[name], found.start[name])}
    assert moved == {name for name in arrays if found.bundle.is_head(name)}


def test_top_k_says_when_it_owns_nothing_there(task):
    found = task()
    low = [name for name in found.start if "layer.0." in name]
    with pytest.raises(TrainError, match="the top 1 blocks"):
        BackpropTopK(blocks=1).run(replace(found, owned=tuple(low)))


# -------------------------------------------------------------- zeroth order


def test_slope_is_the_directional_derivative_and_the_weights_come_back(task):
    found = task()
    gradient = gradient_by_backprop(found)
    parameters = owned_parameters(found)
    _, indices = next(steps_of(found))
    with torch.no_grad():
        for seed in range(5):
            expected = sum(float((z * gradient[name]).sum()) for name, _, z in directions(parameters, seed))
            slope, _ = directional_slope(found, parameters, batch_of(found, indices), seed, 1e-2)
            assert slope == pytest.approx(expected, rel=0.02, abs=0.02)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), found.start[name], rtol=0, atol=1e-6)


def test_a_direction_is_standard_normal_and_the_same_again():
    parameters = {name: torch.nn.Parameter(torch.zeros(60, 50)) for name in "ab"}
    first = {name: z for name, _, z in directions(parameters, 7)}
    assert all(torch.equal(z, first[name]) for name, _, z in directions(parameters, 7))
    everything = torch.cat([z.flatten() for z in first.values()])
    assert abs(float(everything.mean())) < 0.06
    assert abs(float(everything.std()) - 1) < 0.04
    with torch.no_grad():
        perturb(parameters, 7, 0.5)
    assert torch.equal(parameters["b"].detach(), 0.5 * first["b"])


def test_zeroth_order_step_goes_along_its_direction(task):
    """With one perturbation the step is a multiple of z, and the multiple is the slope."""
    found = task()
    moved = step_of(ZerothOrder(epsilon=1e-2), found)
    flat = torch.cat([value.flatten() for value in moved.values()])
    gradient = gradient_by_backprop(task())
    slope_of_step = float((flat * torch.cat([gradient[name].flatten() for name in moved])).sum())
    # g_hat = s z, so <g_hat, g> = s <z, g> = s² up to the finite difference.
    assert slope_of_step > 0
    assert float(flat.square().sum()) == pytest.approx(slope_of_step * len(flat), rel=0.1)


def test_zeroth_order_keeps_no_graph_and_no_copy(task):
    """Autograd saves nothing, and no gradient is left behind."""
    found = task(local_steps=2)

    def pack(tensor):
        raise AssertionError("zeroth-order training must not save activations")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ZerothOrder(perturbations=2).run(found)
    assert all(parameter.grad is None for parameter in found.bundle.trainable().values())


# -------------------------------------------------------------------- FwdLLM


def noisy(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    taken = []

    def sample(number):
        taken.append(number)
        return {"w": torch.ones(100) + noise * torch.randn(100, generator=generator)}

    return sample, taken


def test_pacing_stops_at_the_threshold():
    """The variance of the mean of n samples is 100 noise²/n: about n = 100 noise²/threshold are needed."""
    sample, taken = noisy(1.0)
    mean, number = paced_mean(sample, 5.0, least=2, most=1000)
    assert taken == list(range(1, number + 1))
    assert 14 <= number <= 30
    assert float((mean["w"] - 1).square().sum()) < 3 * 5.0
    sample, _ = noisy(0.1)
    assert paced_mean(sample, 5.0, least=2, most=1000)[1] == 2
    sample, _ = noisy(100.0)
    assert paced_mean(sample, 5.0, least=2, most=7)[1] == 7


@pytest.mark.parametrize("most", [4, 5])
def test_the_mean_is_that_of_all_samples(most):
    sample, _ = noisy(3.0)
    again, _ = noisy(3.0)
    mean, number = paced_mean(sample, 1e-9, least=2, most=most)
    torch.testing.assert_close(mean["w"], torch.stack([again(k)["w"] for k in range(1, number + 1)]).mean(0))


def test_the_variance_estimate_is_right_on_average():
    """E‖m₁ − m₂‖²/4 is the trace of the covariance of the mean: 100/8 for eight samples."""
    from fedllm.clients.fwdllm import _variance

    estimates = []
    for seed in range(200):
        sample, _ = noisy(1.0, seed)
        halves = tuple({"w": sum(sample(k)["w"] for k in range(4))} for _ in range(2))
        estimates.append(_variance(halves, 8))
    assert sum(estimates) / 200 == pytest.approx(100 / 8, rel=0.05)


def test_discriminative_sampling_takes_the_most_similar_draw():
    direction = torch.randn(50, generator=torch.Generator().manual_seed(1))
    chosen = most_similar(direction, direction, 20, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(50, generator=generator) for _ in range(20)]
    cosines = [abs(float(torch.cosine_similarity(draw, direction, dim=0))) for draw in draws]
    assert torch.equal(chosen, draws[max(range(20), key=cosines.__getitem__)])
    for without in (None, torch.zeros(50)):
        assert torch.equal(most_similar(direction, without, 20, torch.Generator().manual_seed(2)), draws[0])


def test_fwdllm_follows_the_servers_direction(task):
    """Steered by the true gradient, the step has a far larger cosine with it."""
    gradient = gradient_by_backprop(task())

    def cosine(inputs, candidates):
        update = FwdLLM(candidates=candidates, max_perturbations=4, variance=1e-9, finite_difference=1e-3)
        moved = step_of(update, replace(task(), inputs=inputs))
        flat = torch.cat([moved[name].flatten() for name in gradient])
        return float(
            torch.cosine_similarity(flat, torch.cat([g.flatten() for g in gradient.values()]), dim=0)
        )

    assert cosine({DIRECTION: gradient}, 50) > 1.5 * cosine({}, 1) > 0


def test_fwdllm_takes_more_perturbations_for_a_smaller_variance(task):
    def taken(variance):
        update = FwdLLM(variance=variance, max_perturbations=12)
        return update.run(task()).metrics["perturbations"]

    assert taken(1e9) == 2
    assert taken(1e-9) == 12


# ------------------------------------------------------------ owned tensors

MODES = {
    "backprop": Backprop,
    "checkpointed": BackpropCheckpointed,
    "zeroth-order": ZerothOrder,
    "fwdllm": lambda: FwdLLM(max_perturbations=2),
    "top-k": lambda: BackpropTopK(blocks=1),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_client_trains_and_returns_only_what_it_owns(task, mode):
    found = task(local_steps=2)
    owned = [name for name in found.start if "layer.1." in name][:2]
    owned += [name for name in found.start if found.bundle.is_head(name)]
    result = MODES[mode]().run(replace(found, owned=tuple(reversed(owned))))
    assert list(result.arrays) == owned
    assert any(not torch.equal(result.arrays[name], found.start[name]) for name in owned)
    now = found.bundle.adapter_state()
    for name in set(found.start) - set(owned):
        assert torch.equal(now[name], found.start[name]), name
    assert all(parameter.requires_grad for parameter in found.bundle.trainable().values())


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_name_is_refused_by_name(task, mode):
    with pytest.raises(TrainError, match=r"'nowhere\.lora_A\.weight'"):
        MODES[mode]().run(replace(task(), owned=("nowhere.lora_A.weight",)))


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_names_step_and_client(task, mode):
    found = task()
    state = {name: value.clone() for name, value in found.start.items()}
    state[next(name for name in state if found.bundle.is_head(name))].fill_(3e38)
    found.bundle.load_adapter_state(state)
    with pytest.raises(TrainError, match="client 0, round 1: the loss of step 1 is"):
        MODES[mode]().run(found)
