"""Federated digits in one process: data, clients and small networks whose parameters are one flat vector.

What the benchmarks of :mod:`second_order` and of robust aggregation share. Nothing here knows of Flower: a round is a
function call, so that a method can be tuned over many trials. All participate in every round; a client's share is its
number of examples, and then the mean of the clients' gradients *is* the gradient of the pooled examples
(``tests/unit/test_benchmark_mnist.py``): methods that need nothing else of a client take it at once, whatever the
number of clients.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedllm.config import DataConfig
from fedllm.partition import partition_rows
from fedllm.seeding import derive_seed

logger = logging.getLogger(__name__)

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist10k"
_IMAGES, _LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
_MEAN, _STD = 0.1307, 0.3081  # of MNIST's pixels, as everybody uses them
_PIECE = 500  # images at a time: what fits the cache is fastest, and memory stays small


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 28, 28]`` float32 and labels ``[n]`` int64, in training and test examples."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Client:
    """The training examples of one client, and its share of all of them."""

    x: Tensor
    y: Tensor
    share: float


def load_digits(seed: int, folder: Path = MNIST, test: float = 0.2) -> Digits:
    """MNIST's 10,000 test digits, or scikit-learn's 1,797 where they are not; split by the seed.

    Args:
        seed: decides which rows are held out for the test.
        folder: with the two IDX files, gzipped.
        test: share of the rows that is held out.
    """
    if (folder / _IMAGES).is_file():
        name, x, y = "mnist10k", _read_idx(folder / _IMAGES), _read_idx(folder / _LABELS)
        images = torch.from_numpy(x).float().div_(255).unsqueeze(1)
    else:
        from sklearn.datasets import load_digits as sklearn_digits

        logger.warning("%s is not there: scikit-learn's 1,797 digits, enlarged to 28×28, instead", folder)
        bunch = sklearn_digits()
        name, y = "sklearn-digits", bunch.target
        small = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
        images = F.interpolate(small, size=(28, 28), mode="bilinear")
    images.sub_(_MEAN).div_(_STD)
    labels = torch.from_numpy(y.astype(np.int64))
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(derive_seed(seed, "test rows"))
    )
    held_out, kept = order.split([round(test * len(order)), len(order) - round(test * len(order))])
    return Digits(name, images[kept], labels[kept], images[held_out], labels[held_out])


def _read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in LeCun's IDX format, gzipped.

    Raises:
        ValueError: the file is of another type, or is cut off.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, found magic {content[:4].hex()}")
    shape = tuple(int.from_bytes(content[4 * k : 4 * k + 4]) for k in range(1, content[3] + 1))
    values = np.frombuffer(content, np.uint8, offset=4 * (len(shape) + 1)).copy()
    if values.size != int(np.prod(shape)):
        raise ValueError(
            f"{path}: expected {int(np.prod(shape))} values of shape {shape}, found {values.size}"
        )
    return values.reshape(shape)


def deal(digits: Digits, clients: int, alpha: float, seed: int, min_rows: int = 1) -> list[Client]:
    """Deal the training examples to clients, their labels drawn from a Dirichlet distribution.

    Args:
        digits: whose training examples are dealt; each goes to exactly one client.
        clients: how many.
        alpha: concentration; the smaller, the fewer labels a client has. Infinity: every client alike.
        seed: decides everything random.
        min_rows: every client gets at least so many.

    Raises:
        fedllm.errors.DataError: no draw gives every client ``min_rows``.
    """
    data = (
        DataConfig(partitioner="iid")
        if np.isinf(alpha)
        else DataConfig(partitioner="dirichlet", alpha=alpha, min_partition_size=min_rows)
    )
    parts = partition_rows(data, digits.train_y.tolist(), clients, seed)
    total = sum(len(part) for part in parts)
    return [Client(digits.train_x[part], digits.train_y[part], len(part) / total) for part in parts]


def lenet() -> nn.Module:
    """Two 5×5 convolutions of stride 2 and two dense layers, 28,874 parameters (after LeCun et al., 1989)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def mlp() -> nn.Module:
    """784-32-10 with ReLU, 25,450 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def logistic() -> nn.Module:
    """Multinomial logistic regression on the pixels, 7,850 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lenet": lenet, "mlp": mlp, "logistic": logistic}


class FlatModel:
    """A classifier as a function of one vector that holds all its parameters, in the module's order.

    Args:
        network: ``lenet``, ``mlp`` or ``logistic``.
        seed: of the initial parameters.
    """

    def __init__(self, network: str, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "initial parameters"))
            self.module = NETWORKS[network]()
        named = dict(self.module.named_parameters())
        self._names = list(named)
        self._shapes = [parameter.shape for parameter in named.values()]
        self._sizes = [parameter.numel() for parameter in named.values()]
        self.initial = torch.cat([parameter.detach().flatten() for parameter in named.values()])

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.initial.numel()

    def logits(self, vector: Tensor, x: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of images under the parameters in ``vector``; differentiable in both."""
        pieces = vector.split(self._sizes)  # one autograd node, where slices would be many
        parameters = {
            name: piece.view(shape)
            for name, piece, shape in zip(self._names, pieces, self._shapes, strict=True)
        }
        logits: Tensor = functional_call(self.module, parameters, (x,))
        return logits

    def loss(self, vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar."""
        return F.cross_entropy(self.logits(vector, x), y)

    def gradient(self, vector: Tensor, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """Mean loss and its gradient ``[d]`` over all of the examples, streamed in pieces."""
        total, loss = torch.zeros_like(vector), 0.0
        for share, piece_x, piece_y in _pieces(x, y):
            leaf = vector.detach().requires_grad_()
            value = self.loss(leaf, piece_x, piece_y)
            (gradient,) = torch.autograd.grad(value, leaf)
            total.add_(gradient, alpha=share)
            loss += share * value.item()
        return loss, total

    def gradient_and_hvp(
        self, vector: Tensor, x: Tensor, y: Tensor, direction: Tensor
    ) -> tuple[float, Tensor, Tensor]:
        """Mean loss, its gradient ``[d]`` and its Hessian times ``direction`` ``[d]``, streamed in pieces."""
        total, product, loss = torch.zeros_like(vector), torch.zeros_like(vector), 0.0
        for share, piece_x, piece_y in _pieces(x, y):
            leaf = vector.detach().requires_grad_()
            value = self.loss(leaf, piece_x, piece_y)
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            (curvature,) = torch.autograd.grad(gradient @ direction, leaf)
            total.add_(gradient.detach(), alpha=share)
            product.add_(curvature, alpha=share)
            loss += share * value.item()
        return loss, total, product

    @torch.no_grad()
    def evaluate(self, vector: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy."""
        loss, correct = 0.0, 0
        for share, piece_x, piece_y in _pieces(x, y):
            logits = self.logits(vector, piece_x)
            loss += share * F.cross_entropy(logits, piece_y).item()
            correct += int((logits.argmax(1) == piece_y).sum())
        return loss, correct / len(y)


@dataclass(frozen=True)
class LocalResult:
    """What a client has after its local steps: parameters ``[d]``, steps taken, mean loss over them."""

    vector: Tensor
    steps: int
    loss: float


def local_sgd(
    model: FlatModel,
    start: Tensor,
    client: Client,
    *,
    learning_rate: float,
    batch_size: int,
    seed: int,
    epochs: int = 1,
    momentum: float = 0.0,
    proximal: float = 0.0,
    correction: Tensor | None = None,
) -> LocalResult:
    """Epochs of minibatch SGD from ``start``, which stays as it is.

    Args:
        model: what is trained.
        start: the global parameters ``[d]``.
        client: whose examples; every epoch is a new permutation of them.
        learning_rate: step size.
        batch_size: examples in a step; the last batch of an epoch may be smaller.
        seed: of the permutations.
        epochs: passes over the client's examples.
        momentum: of SGD, fresh in every call.
        proximal: weight µ of FedProx's µ/2 ‖w − start‖² (arXiv 1812.06127).
        correction: added to every gradient ``[d]``; SCAFFOLD's c − c_i (arXiv 1910.06378).
    """
    generator = torch.Generator().manual_seed(seed)
    vector, velocity = start.clone(), torch.zeros_like(start)
    losses = 0.0
    steps = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(client.y), generator=generator).split(batch_size):
            leaf = vector.requires_grad_()
            loss = model.loss(leaf, client.x[batch], client.y[batch])
            (gradient,) = torch.autograd.grad(loss, leaf)
            vector = vector.detach()
            if proximal:
                gradient.add_(vector - start, alpha=proximal)
            if correction is not None:
                gradient.add_(correction)
            velocity.mul_(momentum).add_(gradient)
            vector.sub_(velocity, alpha=learning_rate)
            losses += loss.item()
            steps += 1
    return LocalResult(vector, steps, losses / steps)


def _pieces(x: Tensor, y: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Cut examples into pieces, each with its share of them."""
    for piece_x, piece_y in zip(x.split(_PIECE), y.split(_PIECE), strict=True):
        yield len(piece_y) / len(y), piece_x, piece_y
