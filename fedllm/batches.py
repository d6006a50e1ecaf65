"""Which examples form a batch: shuffled from a seed, examples of similar length together to save padding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.interruption import check

_WINDOW = 8  # batches that are sorted by length together; the smaller, the nearer to uniform shuffling


def count_steps(examples: int, train: TrainConfig) -> int:
    """Optimiser steps of a round, at least 1: ``train.local-steps``, or ``train.local-epochs`` in steps."""
    if train.local_steps > 0:
        return train.local_steps
    batches = math.ceil(examples / train.batch_size)
    # The tolerance keeps 0.1 epochs of 30 batches at 3 steps although 0.1 * 30 > 3 in floating point.
    return max(1, math.ceil(train.local_epochs * batches - 1e-9))


def train_batches(examples: Encoded, train: TrainConfig, seed: int) -> Iterator[list[int]]:
    """Yield the batches of one round as lists of example indices.

    Every epoch is a new permutation in which each example occurs once; one of its batches may be smaller.
    A permutation is cut into windows of eight batches; a window is sorted by length, its batches shuffled.

    Args:
        examples: the client's examples, at least one.
        train: batch size, and steps or epochs (see :func:`count_steps`).
        seed: decides the order, together with nothing else.

    Raises:
        ValueError: there is no example.
    """
    if len(examples) == 0:
        raise ValueError("no examples to form batches of")
    generator = torch.Generator().manual_seed(seed)
    remaining = count_steps(len(examples), train)
    while remaining > 0:
        for batch in _epoch(examples.lengths, train.batch_size, generator):
            check()
            yield batch
            remaining -= 1
            if remaining == 0:
                return


def length_sorted_batches(examples: Encoded, batch_size: int) -> Iterator[list[int]]:
    """Yield every example once in batches from the longest to the shortest, for evaluation.

    Longest first: too large a batch shows at once, and the allocator's blocks fit everything that follows.
    """
    order = torch.argsort(examples.lengths, descending=True, stable=True)
    for batch in torch.split(order, batch_size):
        check()
        yield batch.tolist()


def _epoch(lengths: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    permutation = torch.randperm(len(lengths), generator=generator)
    for window in torch.split(permutation, _WINDOW * batch_size):
        batches = torch.split(window[torch.argsort(lengths[window], stable=True)], batch_size)
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[position].tolist()
