"""The digits, who has which of them, and the two networks."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def load(mnist: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 28, 28]`` and labels ``[n]``; every fifth example is for the test."""
    if mnist:
        images, labels = (
            np.frombuffer(gzip.decompress((Path(mnist) / name).read_bytes()), np.uint8, offset=offset).copy()
            for name, offset in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
        )
        x = torch.from_numpy(images).view(-1, 1, 28, 28).float() / 255
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        labels = bunch.target
        small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        x = nn.functional.interpolate(small, size=28, mode="bilinear")
    return (x - x.mean()) / x.std(), torch.from_numpy(labels).long()


def test_examples(mnist: str) -> tuple[Tensor, Tensor]:
    """What the server judges on."""
    x, y = load(mnist)
    return x[::5], y[::5]


def client_examples(mnist: str, client: int, clients: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """The training examples of a client; of every digit it has a share drawn from a Dirichlet distribution."""
    x, y = load(mnist)
    train = torch.arange(len(y)) % 5 != 0
    x, y = x[train], y[train]
    random = np.random.default_rng(seed)
    own: list[int] = []
    for digit in range(10):
        rows = random.permutation((y == digit).nonzero().squeeze(1).numpy())
        ends = np.rint(np.cumsum(random.dirichlet([alpha] * clients)) * len(rows)).astype(int)
        own.extend(np.split(rows, ends[:-1])[client].tolist())
    return x[own], y[own]


def build(network: str, seed: int) -> nn.Module:
    """``lenet``: two convolutions and two dense layers; ``logistic``: one dense layer."""
    torch.manual_seed(seed)
    if network == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    if network != "lenet":
        raise ValueError(f"network: expected lenet or logistic, found {network!r}")
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
