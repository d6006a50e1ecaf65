"""One training step of the server's blocks over a whole cohort: clients cut at different blocks, one forward pass.

The batches of all clients are concatenated (SplitLoRA, arXiv 2407.00952, steps a3–a4). Clients with an earlier cut go
through the blocks that others have already done by themselves, then join them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedllm.split.model import SplitModel

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]
"""``(logits, attention mask, labels)`` → mean loss and over how many targets it was taken."""


@dataclass(frozen=True)
class Part:
    """What one client brings to a step.

    Attributes:
        cut: blocks that the client has done.
        hidden: their output ``[batch, length, width]``.
        mask: attention mask ``[batch, length]``.
        labels: of the batch, where they come up; ``[batch]`` or ``[batch, length]``.
    """

    cut: int
    hidden: Tensor
    mask: Tensor
    labels: Tensor | None = None


class CohortStep:
    """A forward pass over the server's blocks whose graph is kept for the backward pass.

    Args:
        split: the server's model.
        parts: one for each client, at least one.
    """

    def __init__(self, split: SplitModel, parts: Sequence[Part]) -> None:
        self._split = split
        self._parts = parts
        self._inputs = [part.hidden.detach().clone().requires_grad_() for part in parts]
        self._outputs = self._forward()

    def _forward(self) -> list[Tensor]:
        """Hidden states behind the last block, for each part in its own length."""
        length = max(part.hidden.shape[1] for part in self._parts)
        order = sorted(range(len(self._parts)), key=lambda index: self._parts[index].cut)
        hidden: Tensor | None = None
        mask: Tensor | None = None
        cuts = [*(self._parts[index].cut for index in order), self._split.num_blocks]
        for place, index in enumerate(order):
            own = _lengthened(self._inputs[index], length)
            own_mask = _lengthened(self._parts[index].mask, length)
            hidden = own if hidden is None else torch.cat([hidden, own])
            mask = own_mask if mask is None else torch.cat([mask, own_mask])
            hidden = self._split.blocks(hidden, mask, cuts[place], cuts[place + 1])
        assert hidden is not None
        outputs: dict[int, Tensor] = {}
        first = 0
        for index in order:
            batch, own_length = self._parts[index].mask.shape
            outputs[index] = hidden[first : first + batch, :own_length]
            first += batch
        return [outputs[index] for index in range(len(self._parts))]

    @property
    def outputs(self) -> list[Tensor]:
        """Hidden states behind the last block for each part, detached: what goes to clients that hold the head."""
        return [output.detach() for output in self._outputs]

    def backward_from_labels(self, loss: Loss) -> tuple[list[Tensor], list[float]]:
        """Head, loss and backward pass on the server.

        The server's gradient is that of the mean over all targets of the cohort. A client gets the gradient of its
        own mean loss: what it then does with it does not depend on how many others took part.

        Returns:
            For each part the gradient of its hidden states, and its loss.
        """
        losses, counts = [], []
        for output, part in zip(self._outputs, self._parts, strict=True):
            assert part.labels is not None
            value, count = loss(self._split.head(output, part.mask), part.mask, part.labels)
            losses.append(value)
            counts.append(count)
        total = sum(counts)
        shares = [count / total for count in counts]
        torch.autograd.backward(sum(value * share for value, share in zip(losses, shares, strict=True)))  # type: ignore[arg-type]
        return self._gradients(shares), [value.item() for value in losses]

    def backward_from_heads(self, gradients: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Backward pass from the gradients of the clients' own mean losses at the last hidden states.

        Args:
            gradients: one for each part, of the shape of :attr:`outputs`.
            counts: targets of each client, by which the clients are weighed.

        Returns:
            For each part the gradient of its hidden states.
        """
        shares = [count / sum(counts) for count in counts]
        weighted = [gradient * share for gradient, share in zip(gradients, shares, strict=True)]
        torch.autograd.backward(self._outputs, weighted)
        return self._gradients(shares)

    def _gradients(self, shares: Sequence[float]) -> list[Tensor]:
        found = []
        for hidden, share in zip(self._inputs, shares, strict=True):
            assert hidden.grad is not None
            found.append(hidden.grad / share if share else hidden.grad)
        return found


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """Zeros behind the end of the sequences; the mask keeps them from being seen."""
    missing = length - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, missing) if tensor.dim() == 3 else (0, missing)) if missing else tensor
