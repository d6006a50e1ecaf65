"""A step over clients with different cuts against one ordinary backward pass of the whole model."""

import pytest
import torch
from torch.nn import functional as F

from fedllm.split.cohort import CohortStep, Part
from fedllm.split.model import SplitModel
from tests.unit.test_split_model import build

CUTS = [3, 1, 2, 1]
LENGTHS = [9, 5, 7, 9]


def batches(classes):
    generator = torch.Generator().manual_seed(3)
    found = []
    for size, length in zip([2, 3, 1, 2], LENGTHS, strict=True):
        ids = torch.randint(1, 50, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, length - 2 :], mask[0, length - 2 :] = 0, 0
        labels = (
            torch.randint(0, 3, (size,), generator=generator) if classes else torch.where(mask > 0, ids, -100)
        )
        found.append((ids, mask, labels))
    return found


def loss(logits, mask, labels):
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels), len(labels)
    kept = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept]), int(kept.sum())


def whole(model, data):
    """Losses of all clients, and the gradients of their mean over all targets."""
    losses, counts = zip(
        *(loss(model(input_ids=i, attention_mask=m).logits, m, y) for i, m, y in data), strict=True
    )
    total = sum(value * count for value, count in zip(losses, counts, strict=True)) / sum(counts)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [value.item() for value in losses], counts, gradients


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llama-classifier"])
def test_a_cohort_of_different_cuts_is_one_backward_pass(family, labels):
    model = build(family)
    data = batches(classes=family in ("bert", "llama-classifier"))
    losses, counts, expected = whole(model, data)
    split = SplitModel(model)
    sent = [split.front(ids, mask, cut) for (ids, mask, _), cut in zip(data, CUTS, strict=True)]
    parts = [
        Part(cut, hidden.detach(), mask, y if labels == "server" else None)
        for cut, hidden, (_, mask, y) in zip(CUTS, sent, data, strict=True)
    ]
    step = CohortStep(split, parts)
    shares = [count / sum(counts) for count in counts]
    if labels == "server":
        gradients, found = step.backward_from_labels(loss)
    else:
        found, heads = [], []
        for output, (_, mask, y), share in zip(step.outputs, data, shares, strict=True):
            at_head = output.requires_grad_()
            value, _ = loss(split.head(at_head, mask), mask, y)
            (value * share).backward()  # the head's own parameters; weighed as the server weighs its part
            heads.append(at_head.grad / share)
            found.append(value.item())
        gradients = step.backward_from_heads(heads, counts)
    assert found == pytest.approx(losses, rel=1e-12)
    for hidden, gradient, share in zip(sent, gradients, shares, strict=True):
        hidden.backward(gradient * share)
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
