"""The in-process harness of the benchmarks on digits: dealing, pooled gradients, determinism."""

import gzip
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import mnist
    finally:
        sys.path.remove(str(BENCHMARKS))
    return mnist


@pytest.fixture(scope="module")
def digits(mnist: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("idx")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    images = torch.randint(0, 256, (600, 28, 28), generator=generator)
    _write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    _write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)
    return mnist.load_digits(seed=3, folder=folder)


def _write_idx(path: Path, values: torch.Tensor) -> None:
    head = b"\x00\x00\x08" + bytes([values.ndim]) + b"".join(size.to_bytes(4) for size in values.shape)
    path.write_bytes(gzip.compress(head + values.to(torch.uint8).numpy().tobytes()))


def test_digits_are_read_and_split_by_the_seed(mnist, digits, tmp_path: Path) -> None:
    assert digits.name == "mnist10k"
    assert digits.train_x.shape == (480, 1, 28, 28)
    assert digits.test_x.shape == (120, 1, 28, 28)
    together = torch.cat([digits.train_y, digits.test_y]).bincount()
    assert together.tolist() == [60] * 10
    pixels = (torch.cat([digits.train_x, digits.test_x]) * 0.3081 + 0.1307) * 255
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)


def test_without_mnist_the_digits_of_sklearn_are_used(mnist, tmp_path: Path, caplog) -> None:
    pytest.importorskip("sklearn")
    fallback = mnist.load_digits(seed=0, folder=tmp_path)
    assert fallback.name == "sklearn-digits"
    assert fallback.train_x.shape[1:] == (1, 28, 28)
    assert len(fallback.train_y) + len(fallback.test_y) == 1797
    assert "1,797" in caplog.text
    again, other = mnist.load_digits(seed=0, folder=tmp_path), mnist.load_digits(seed=1, folder=tmp_path)
    assert torch.equal(fallback.train_x, again.train_x)
    assert not torch.equal(fallback.train_y, other.train_y)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "unsigned bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05\x00", "5"),
    ],
)
def test_a_damaged_idx_file_is_named(mnist, tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=complaint) as refused:
        mnist.load_digits(seed=0, folder=tmp_path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("alpha", [0.2, float("inf")])
def test_every_example_is_dealt_once(mnist, digits, alpha: float) -> None:
    clients = mnist.deal(digits, 12, alpha, seed=1)
    assert sum(client.share for client in clients) == pytest.approx(1)
    dealt = torch.cat([client.x.flatten(1) for client in clients])
    assert len(dealt) == len(digits.train_x)
    key = torch.randn(784, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        (dealt.double() @ key).sort().values, (digits.train_x.flatten(1).double() @ key).sort().values
    )
    again = mnist.deal(digits, 12, alpha, seed=1)
    assert all(torch.equal(one.y, other.y) for one, other in zip(clients, again, strict=True))
    largest = [int(client.y.bincount(minlength=10).max()) / len(client.y) for client in clients]
    assert (sum(largest) / len(largest) > 0.35) == (alpha == 0.2)


@pytest.mark.parametrize("network", ["lenet", "mlp", "logistic"])
@pytest.mark.parametrize("count", [3, 12])
def test_mean_of_the_clients_gradients_and_products_is_that_of_all_examples(
    mnist, digits, network: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "_PIECE", 70)
    model = mnist.FlatModel(network, seed=0)
    vector = model.initial.double()
    model.module.double()
    direction = torch.randn(model.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pooled = model.gradient_and_hvp(vector, digits.train_x.double(), digits.train_y, direction)
    mean = [torch.zeros(()), torch.zeros_like(vector), torch.zeros_like(vector)]
    for client in mnist.deal(digits, count, 0.2, seed=0):
        own = model.gradient_and_hvp(vector, client.x.double(), client.y, direction)
        for total, value in zip(mean, own, strict=True):
            total += client.share * value
    for found, expected in zip(mean, pooled, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), check_dtype=False)
    loss, gradient = model.gradient(vector, digits.train_x.double(), digits.train_y)
    torch.testing.assert_close(gradient, pooled[1])
    assert loss == pytest.approx(pooled[0])
    step = 1e-9 * direction
    ahead = model.gradient(vector + step, digits.train_x.double(), digits.train_y)[1]
    behind = model.gradient(vector - step, digits.train_x.double(), digits.train_y)[1]
    error = (ahead - behind) / 2e-9 - pooled[2]
    assert float(error.norm() / pooled[2].norm()) < 1e-3


def test_full_batch_step_is_gradient_descent_and_terms_enter_it(mnist, digits) -> None:
    model = mnist.FlatModel("mlp", seed=0)
    client = mnist.deal(digits, 4, 0.2, seed=0)[1]
    gradient = model.gradient(model.initial, client.x, client.y)[1]
    common = {"learning_rate": 0.1, "batch_size": 10_000, "seed": 5}
    plain = mnist.local_sgd(model, model.initial, client, **common)
    torch.testing.assert_close(plain.vector, model.initial - 0.1 * gradient)
    assert plain.steps == 1

    shift = torch.ones_like(gradient)
    corrected = mnist.local_sgd(model, model.initial, client, correction=shift, **common)
    torch.testing.assert_close(corrected.vector, plain.vector - 0.1)

    near = mnist.local_sgd(model, model.initial, client, epochs=2, proximal=3.0, **common)
    second = model.gradient(plain.vector, client.x, client.y)[1] + 3.0 * (plain.vector - model.initial)
    torch.testing.assert_close(near.vector, plain.vector - 0.1 * second)

    heavy = mnist.local_sgd(model, model.initial, client, epochs=2, momentum=0.5, **common)
    second = model.gradient(plain.vector, client.x, client.y)[1] + 0.5 * gradient
    torch.testing.assert_close(heavy.vector, plain.vector - 0.1 * second)


def test_local_training_follows_its_seed_and_leaves_the_start_alone(mnist, digits) -> None:
    model = mnist.FlatModel("lenet", seed=0)
    before = model.initial.clone()
    client = mnist.deal(digits, 4, 0.2, seed=0)[0]

    def train(seed: int):
        return mnist.local_sgd(
            model, model.initial, client, learning_rate=0.05, batch_size=8, seed=seed, epochs=2
        )

    first, again, other = train(1), train(1), train(2)
    assert torch.equal(first.vector, again.vector)
    assert not torch.equal(first.vector, other.vector)
    assert first.steps == 2 * -(-len(client.y) // 8)
    assert torch.equal(model.initial, before)
    assert not model.initial.requires_grad
    assert torch.equal(mnist.FlatModel("lenet", seed=0).initial, before)
    assert not torch.equal(mnist.FlatModel("lenet", seed=1).initial, before)


def test_evaluation_counts_every_example_once(mnist, digits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mnist.FlatModel("logistic", seed=0)
    whole = model.evaluate(model.initial, digits.test_x, digits.test_y)
    logits = model.module(digits.test_x)
    assert whole[1] == pytest.approx(float((logits.argmax(1) == digits.test_y).double().mean()))
    assert whole[0] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, digits.test_y).item(), rel=1e-5
    )
    monkeypatch.setattr(mnist, "_PIECE", 7)
    assert model.evaluate(model.initial, digits.test_x, digits.test_y) == pytest.approx(whole)
