"""Sketches against dense linear algebra."""

import pytest
import torch
from fedllm.strategies.vert.sketch import Sketcher

SIZES = [1, 63, 64 * 16 + 5, 3 * 64 * 16 + 16 * 7 + 3]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(sketcher, entries):
    """The sketch as a matrix ``[size, entries]``, column by column."""
    eye = torch.eye(entries)
    return torch.stack([sketcher.tensor("w", column)[0] for column in eye], 1)


@pytest.mark.parametrize("entries", SIZES)
def test_every_entry_goes_to_one_bucket_with_a_sign(entries):
    matrix = dense(Sketcher(16, seed=3), entries)
    assert torch.equal(matrix.abs().sum(0), torch.ones(entries))
    assert set(matrix[matrix != 0].tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("entries", SIZES)
def test_a_sketch_is_linear_and_its_norm_exact(entries):
    sketcher = Sketcher(16, seed=3)
    x, y = random(entries), random(entries, seed=1)
    vector, square = sketcher.tensor("w", x, y)
    assert torch.allclose(vector, dense(sketcher, entries) @ (x - y), atol=1e-4)
    assert square == pytest.approx(float((x - y).square().sum()), rel=1e-5)


def test_pieces_do_not_change_a_sketch(monkeypatch):
    from fedllm.strategies.vert import sketch

    x = random(20_000)
    whole = Sketcher(16).tensor("w", x)[0]
    monkeypatch.setattr(sketch, "_CHUNK", 64 * 16)
    assert torch.allclose(Sketcher(16).tensor("w", x)[0], whole, atol=1e-3)


def test_inner_products_are_unbiased_and_scatter_as_they_should():
    x = torch.nn.functional.normalize(random(3000), dim=0)
    y = torch.nn.functional.normalize(0.6 * x + 0.8 * random(3000, seed=1) / 3000**0.5, dim=0)
    found = torch.tensor(
        [
            float(sketcher.tensor("w", x)[0] @ sketcher.tensor("w", y)[0])
            for sketcher in (Sketcher(32, s) for s in range(400))
        ]
    )
    cosine = float(x @ y)
    assert abs(found.mean() - cosine) < 4 * ((1 + cosine**2) / 32 / 400) ** 0.5
    assert found.std() == pytest.approx(((1 + cosine**2) / 32) ** 0.5, rel=0.2)


def test_repeating_rows_do_not_align():
    """A matrix whose rows are alike, as gradients are, is sketched as well as noise."""
    x = random(1, 16).expand(500, 16).reshape(-1)
    norms = torch.tensor([float(Sketcher(16, s).tensor("w", x)[0].square().sum()) for s in range(100)])
    assert norms.mean() == pytest.approx(float(x.square().sum()), rel=0.2)


def lora(rank, seed, scale=1.0):
    return {
        "layer.0.lora_A.weight": scale * random(rank, 20, seed=seed),
        "layer.0.lora_B.weight": scale * random(30, rank, seed=seed + 1),
        "layer.1.lora_A.weight": scale * random(rank, 12, seed=seed + 2),
        "layer.1.lora_B.weight": scale * random(8, rank, seed=seed + 3),
        "head.weight": scale * random(5, 7, seed=seed + 4),
    }


def effective(start, new):
    """ΔW of both layers and of the head, as one dense vector."""
    parts = [
        new[f"layer.{i}.lora_B.weight"] @ new[f"layer.{i}.lora_A.weight"]
        - start[f"layer.{i}.lora_B.weight"] @ start[f"layer.{i}.lora_A.weight"]
        for i in (0, 1)
    ]
    return torch.cat([part.flatten() for part in [*parts, new["head.weight"] - start["head.weight"]]])


def test_the_sketch_of_factors_is_the_sketch_of_their_product():
    """TensorSketch by its definition: entry (i, j) goes to bucket h(i) + g(j) mod q with sign s(i)·t(j)."""
    sketcher = Sketcher(16, seed=2)
    b, a = random(30, 4), random(4, 20, seed=1)
    h, s = sketcher._hash("rows m", 30)
    g, t = sketcher._hash("columns m", 20)
    expected = torch.zeros(16)
    for i, row in enumerate(b @ a):
        for j, value in enumerate(row):
            expected[(h[i] + g[j]) % 16] += s[i] * t[j] * value
    assert torch.allclose(sketcher.product("m", b, a), expected, atol=1e-4)


def test_the_effective_update_of_an_adapter():
    start, new = lora(3, 0), lora(3, 50)
    sketcher = Sketcher(64)
    found = sketcher.update(start, new)
    by_parts = sum(
        sketcher.product(f"layer.{i}", new[f"layer.{i}.lora_B.weight"], new[f"layer.{i}.lora_A.weight"])
        - sketcher.product(f"layer.{i}", start[f"layer.{i}.lora_B.weight"], start[f"layer.{i}.lora_A.weight"])
        for i in (0, 1)
    )
    by_parts += sketcher.tensor("head.weight", new["head.weight"] - start["head.weight"])[0]
    assert torch.allclose(found.vector, by_parts, atol=1e-3)
    assert found.norm == pytest.approx(float(effective(start, new).norm()), rel=1e-4)


def test_adapters_of_different_ranks_compare():
    """The same ΔW as a product of rank 3 and of rank 6 in another basis has one sketch."""
    start, new = lora(3, 0), lora(3, 50)
    zero_start = {**start, **{name: value * 0 for name, value in start.items() if "lora_B" in name}}
    other_start, other = dict(zero_start), dict(new)
    basis = random(3, 3, seed=9) + 3 * torch.eye(3)
    for i in (0, 1):
        a, b = f"layer.{i}.lora_A.weight", f"layer.{i}.lora_B.weight"
        other[a] = torch.cat([basis @ new[a], random(3, new[a].shape[1], seed=7)])
        other[b] = torch.cat([new[b] @ basis.inverse(), torch.zeros(new[b].shape[0], 3)], 1)
        other_start[a], other_start[b] = torch.zeros_like(other[a]), torch.zeros_like(other[b])
    sketcher = Sketcher(64)
    first, second = sketcher.update(zero_start, new), sketcher.update(other_start, other)
    assert torch.allclose(first.vector, second.vector, atol=1e-3)
    assert first.norm == pytest.approx(second.norm, rel=1e-4)


def test_products_keep_inner_products():
    start = {name: value * 0 for name, value in lora(3, 0).items()}
    x, y = lora(3, 10), lora(3, 20)
    truth = float(effective(start, x) @ effective(start, y))
    scale = float(effective(start, x).norm() * effective(start, y).norm())
    found = [
        float(s.update(start, x).vector @ s.update(start, y).vector) / scale
        for s in (Sketcher(32, seed) for seed in range(200))
    ]
    assert abs(sum(found) / len(found) - truth / scale) < 4 * (3 / 32 / 200) ** 0.5


def test_a_small_change_is_not_lost_beside_large_weights():
    start = lora(3, 0)
    new = {name: value + 1e-3 * random(*value.shape, seed=99) for name, value in start.items()}
    flipped = {name: start[name] - (new[name] - start[name]) for name in start}
    sketcher = Sketcher(256)
    one, other = sketcher.update(start, new).vector, sketcher.update(start, flipped).vector
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) < -0.99


def test_updates_without_a_start_are_sketched_as_they_are():
    new = lora(3, 0)
    total = torch.cat([value.flatten() for value in new.values()])
    found = Sketcher(64).update({}, new)
    assert found.norm == pytest.approx(float(total.norm()), rel=1e-5)


def test_equal_seeds_are_equal_maps_and_names_separate():
    x = random(500)
    assert torch.equal(Sketcher(32, 1).tensor("w", x)[0], Sketcher(32, 1).tensor("w", x)[0])
    assert not torch.equal(Sketcher(32, 1).tensor("w", x)[0], Sketcher(32, 2).tensor("w", x)[0])
    assert not torch.equal(Sketcher(32, 1).tensor("w", x)[0], Sketcher(32, 1).tensor("v", x)[0])


def test_bad_shapes_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(5, 6\), expected \(5, 7\)"):
        Sketcher(16).update(lora(3, 0), {"head.weight": random(5, 6)})
    with pytest.raises(ValueError, match="at least 1"):
        Sketcher(0)
