"""Live bytes against sums by hand, and meta tensors against real ones."""

import torch
from torch import nn
from torch.nn import functional as F

from fedllm.live_memory import LiveMemory

KIB = 1024


def test_what_is_freed_no_longer_counts():
    with LiveMemory() as memory:
        a = torch.empty(KIB, device="meta")
        assert memory.live == 4 * KIB
        b = a.view(32, 32).t()[:3]  # a view is free
        assert memory.live == 4 * KIB
        c = a + 1
        assert memory.live == 8 * KIB
        del a
        assert memory.live == 8 * KIB  # the view holds it
        del b
        assert memory.live == 4 * KIB
        del c
    assert (memory.live, memory.peak) == (0, 8 * KIB)


def test_blocks_are_rounded_up():
    with LiveMemory() as memory:
        kept = torch.empty(3, device="meta")
        assert memory.live == 512
    del kept


def test_what_autograd_keeps_counts():
    """Of y = exp(exp(x)) both results wait for the backward pass; without a graph one at a time lives."""
    x = torch.zeros(KIB, device="meta", requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp().exp().sum()
        assert memory.live == 2 * 4 * KIB + 512
        del y
        assert memory.live == 0
    with LiveMemory() as memory, torch.no_grad():
        x.exp().exp().sum()
    assert memory.peak == 2 * 4 * KIB


def test_weights_can_be_left_out():
    layer = nn.Linear(16, 16, device="meta")
    memory = LiveMemory()
    memory.ignore(list(layer.parameters()))
    with memory, torch.no_grad():
        layer.weight.view(-1).detach()
        assert memory.live == 0


def test_masks_keep_all_they_could_keep():
    values = torch.empty(4, 6, 5, device="meta", requires_grad=True)
    mask = torch.empty(4, 6, dtype=torch.bool, device="meta")
    with LiveMemory():
        rows = values[mask]
        assert rows.shape == (24, 5)
        rows.sum().backward()
        assert values.grad.shape == (4, 6, 5)
        assert float(rows.sum()) == 0.0
        assert rows.sum().to("cpu").device.type == "cpu"


def test_meta_and_real_tensors_count_the_same():
    def peak(device):
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to(device)
        x, labels = torch.zeros(16, 32, device=device), torch.zeros(16, dtype=torch.int64, device=device)
        memory = LiveMemory()
        memory.ignore([*model.parameters(), x, labels])
        with memory:
            F.cross_entropy(model(x), labels).backward()
        return memory.peak

    assert peak("meta") == peak("cpu") > 16 * 64 * 4 * 3
