"""The adapter algebra against dense matrices in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.lora.factors import Factors, fold, stack
from fedllm.lora.pairs import Pair, pair_names
from fedllm.lora.stream import ProductSum
from fedllm.lora.svd import compress, dense_svd, product_svd, split

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
examples = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def cohorts(draw):
    """Clients with adapters of any rank and dtype, any weight and scale, of one random shape."""
    d, k, seed = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    clients = []
    for _ in range(draw(st.integers(1, 6))):
        rank, dtype = draw(st.integers(1, 12)), draw(st.sampled_from(DTYPES))
        lora_a = torch.randn(rank, k, generator=generator).to(dtype)
        lora_b = torch.randn(d, rank, generator=generator).to(dtype)
        if draw(st.integers(0, 5)) == 0:
            lora_b.zero_()  # a client that has not trained yet
        clients.append((draw(st.floats(0, 1e3)), lora_a, lora_b, draw(st.floats(0.1, 32))))
    return clients


def folded(clients):
    return [(weight, fold(lora_a, lora_b, scale)) for weight, lora_a, lora_b, scale in clients]


def dense(clients):
    """Σ p s B A, each product formed in float64."""
    return sum(weight * scale * (b.double() @ a.double()) for weight, a, b, scale in clients)


def close(found, expected, relative=1e-6):
    return torch.linalg.norm(found.double() - expected) <= relative * torch.linalg.norm(expected)


def random_factors(d, k, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return fold(torch.randn(r, k, generator=generator), torch.randn(d, r, generator=generator))


@given(cohorts())
@examples
def test_stack_and_its_svd_equal_the_dense_sum(clients):
    stacked, expected = stack(folded(clients)), dense(clients)
    assert close(stacked.product(), expected)
    assert close(product_svd(stacked).factors().product(), expected)


@given(cohorts(), st.randoms(use_true_random=False))
@examples
def test_the_order_of_clients_does_not_matter(clients, random):
    shuffled = list(clients)
    random.shuffle(shuffled)
    assert close(stack(folded(shuffled)).product(), stack(folded(clients)).product(), 1e-12)
    streamed, again = ProductSum(), ProductSum()
    for (weight, part), (other_weight, other) in zip(folded(clients), folded(shuffled), strict=True):
        streamed.add(part, weight)
        again.add(other, other_weight)
    assert close(again.svd().factors().product(), streamed.svd().factors().product(), 1e-12)


@given(cohorts())
@examples
def test_streaming_equals_batch(clients):
    streamed = ProductSum()
    for weight, part in folded(clients):
        streamed.add(part, weight)
    assert close(streamed.svd().factors().product(), dense(clients))
    assert streamed.error_bound == streamed.svd().discarded == 0


@given(cohorts(), st.integers(1, 30))
@examples
def test_capped_stream_is_exact_within_the_cap_and_certified_beyond_it(clients, cap):
    streamed, expected = ProductSum(max_rank=cap), dense(clients)
    for weight, part in folded(clients):
        streamed.add(part, weight)
    svd = streamed.svd()
    error = float(torch.linalg.norm(svd.factors().product() - expected))
    noise = 1e-9 * float(torch.linalg.norm(expected))
    assert svd.rank <= cap
    assert error <= svd.discarded + noise
    if sum(len(a) for _, a, _, _ in clients) <= cap:
        assert error <= noise
        assert svd.discarded <= noise


@given(cohorts(), st.integers(0, 14))
@examples
def test_truncation_error_equals_its_certificate_and_is_the_smallest_possible(clients, rank):
    expected = dense(clients)
    svd = compress(stack(folded(clients)), rank)
    norm = float(torch.linalg.norm(expected))
    error = float(torch.linalg.norm(svd.factors().product() - expected))
    best = float(torch.linalg.norm(torch.linalg.svdvals(expected)[rank:]))
    assert error == pytest.approx(svd.discarded, abs=1e-9 * norm)
    assert error == pytest.approx(best, abs=1e-9 * norm)


@given(cohorts(), st.floats(0.01, 1))
@examples
def test_energy_threshold_keeps_enough_and_no_more(clients, energy):
    expected = dense(clients)
    svd = compress(stack(folded(clients)), energy=energy)
    total = float(torch.linalg.norm(expected)) ** 2
    assert total - svd.discarded**2 >= energy * total * (1 - 1e-9)
    if svd.rank:
        assert float(svd.values[:-1].square().sum()) < energy * total * (1 + 1e-9)


@given(cohorts(), st.floats(0.1, 32))
@examples
def test_every_clients_adapter_is_a_prefix_of_one_decomposition(clients, scale):
    expected = dense(clients)
    svd = product_svd(stack(folded(clients)))
    whole_a, whole_b = split(svd, 12, scale)
    for rank in (1, 2, 5, 12):
        lora_a, lora_b = split(svd, rank, scale)
        assert torch.equal(lora_a, whole_a[:rank])
        assert torch.equal(lora_b, whole_b[:, :rank])
        error = float(torch.linalg.norm(fold(lora_a, lora_b, scale).product() - expected))
        assert error == pytest.approx(svd.tail(rank), abs=1e-9 * float(torch.linalg.norm(expected)))
        assert lora_a.norm(dim=1).numpy() == pytest.approx(lora_b.norm(dim=0).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_taken_in_double_whatever_the_adapters_dtype(dtype):
    lora_a, lora_b = torch.full((1, 1), 300.0, dtype=dtype), torch.full((1, 1), 300.0, dtype=dtype)
    expected = lora_a.double().item() * lora_b.double().item()  # overflows in float16
    assert fold(lora_a, lora_b).product().item() == expected
    assert fold(lora_a, lora_b, dtype=torch.float32).product().dtype == torch.float32


def test_the_scale_is_folded_in_once():
    """Two clients with one update, but other ranks and scales: both count alike, and the mean is that update."""
    update = random_factors(7, 9, 2)
    low = (update.right / 4, update.left)
    high = (
        torch.cat([update.right, torch.zeros(6, 9)]),
        torch.cat([update.left / 0.5, torch.zeros(7, 6)], dim=1),
    )
    first, second = fold(*low, scale=4.0), fold(*high, scale=0.5)
    assert torch.allclose(first.product(), second.product())
    mean = stack([(0.3, first), (0.7, second)])
    assert close(mean.product(), update.product(), 1e-12)
    svd = product_svd(mean)
    for rank, scale in ((2, 4.0), (8, 0.5)):
        assert close(fold(*split(svd, rank, scale), scale).product(), update.product(), 1e-12)


def test_a_client_of_weight_zero_changes_nothing():
    one, other = random_factors(6, 5, 2, 1), random_factors(6, 5, 3, 2)
    assert close(product_svd(stack([(2.0, one), (0.0, other)])).factors().product(), 2 * one.product(), 1e-12)
    assert product_svd(stack([(2.0, one), (0.0, other)])).rank == 2


def test_a_product_of_zero_has_no_directions_and_its_adapter_can_still_learn():
    lora_a = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    svd = product_svd(fold(lora_a, torch.zeros(4, 3)))
    assert svd.rank == 0
    assert svd.shape == (4, 5)
    new_a, new_b = split(svd, 3, fill=lora_a)
    assert torch.equal(new_a.float(), lora_a)
    assert torch.equal(new_b, torch.zeros(4, 3, dtype=torch.float64))


def test_missing_directions_are_filled_without_changing_the_product():
    update, fill = random_factors(8, 6, 2), torch.ones(5, 6)
    lora_a, lora_b = split(product_svd(update), 5, fill=fill)
    assert close(lora_b @ lora_a, update.product(), 1e-12)
    assert torch.equal(lora_a[2:], fill[2:].double())
    assert (lora_b[:, 2:] == 0).all()


def test_decomposition_without_the_matrix_equals_the_dense_one():
    """Singular values, and the same vectors up to the sign, which is fixed."""
    factors = random_factors(60, 40, 9)
    ours, oracle = product_svd(factors), dense_svd(factors.product())
    assert ours.rank == oracle.rank == 9
    assert torch.allclose(ours.values, oracle.values, rtol=1e-12)
    assert torch.allclose(ours.left, oracle.left, atol=1e-9)
    assert torch.allclose(ours.right, oracle.right, atol=1e-9)
    assert (ours.left.gather(0, ours.left.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_more_columns_than_the_matrix_has_are_handled_exactly():
    factors = random_factors(6, 8, 50)
    svd = product_svd(factors)
    assert svd.rank == 6
    assert close(svd.factors().product(), factors.product(), 1e-12)


@pytest.mark.parametrize("cap", [None, 5])
def test_memory_of_the_stream_does_not_grow_with_the_cohort(cap):
    def kept(clients):
        streamed = ProductSum(max_rank=cap)
        sizes = []
        for seed in range(clients):
            streamed.add(random_factors(30, 20, 4, seed))
            held = (streamed._dense, *(vars(streamed._stacked).values() if streamed._stacked else ()))
            sizes.append(sum(tensor.numel() for tensor in held if tensor is not None))
        return max(sizes)

    assert kept(100) == kept(12)
    assert kept(100) <= 30 * 20 if cap is None else (2 * cap + 4) * 50


def test_energy_of_one_keeps_everything():
    factors = random_factors(10, 12, 4)
    assert compress(factors, energy=1.0).rank == 4
    assert compress(factors, rank=2, energy=1.0).rank == 2
    assert compress(factors, rank=9, energy=1e-6).rank == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Factors(torch.ones(3, 2), torch.ones(3, 4)), r"\(3, 2\) and \(3, 4\)"),
        (lambda: fold(torch.ones(2, 3), torch.ones(3, 2), dtype=torch.bfloat16), "float32 or float64"),
        (lambda: stack([]), "nothing to stack"),
        (lambda: stack([(1, random_factors(3, 4, 1)), (1, random_factors(4, 3, 1))]), "different shapes"),
        (lambda: compress(random_factors(3, 4, 1), rank=-1), "at least 0"),
        (lambda: compress(random_factors(3, 4, 1), energy=0.0), "above 0"),
        (lambda: compress(random_factors(3, 4, 1), energy=math.nan), "above 0"),
        (lambda: split(product_svd(random_factors(3, 4, 1)), 1, scale=0.0), "positive"),
        (lambda: ProductSum(max_rank=0), "at least 1"),
        (lambda: ProductSum().svd(), "no products"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("parts", [1, 9])
def test_stream_refuses_another_shape(parts):
    streamed = ProductSum()
    for seed in range(parts):  # nine of them have turned into a matrix
        streamed.add(random_factors(6, 5, 1, seed))
    with pytest.raises(ValueError, match="shape"):
        streamed.add(random_factors(5, 6, 1))


def test_pairs_are_found_by_their_peft_names():
    base = "base_model.model.encoder.layer.0.attention.query"
    names = pair_names(
        [
            f"{base}.lora_A.weight",
            "base_model.model.classifier.weight",
            f"{base}.lora_B.weight",
            *("lora_A.weight", "lora_B.weight"),
            "other.lora_B.weight",
            *("x.lora_A.default.weight", "x.lora_B.default.weight"),
        ]
    )
    assert names.modules == {
        base: Pair(f"{base}.lora_A.weight", f"{base}.lora_B.weight"),
        "": Pair("lora_A.weight", "lora_B.weight"),
        "x": Pair("x.lora_A.default.weight", "x.lora_B.default.weight"),
    }
    assert names.heads == ("base_model.model.classifier.weight", "other.lora_B.weight")
