"""Coordinate-wise trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498) as a plug-in."""

from typing import Annotated, Any

import torch
from pydantic import Field

from fedllm.accumulate import Reply
from fedllm.strategy import BaseStrategy


class TrimmedValues:
    """Keeps the replies of a round; of every coordinate the extremes are cut off on both sides."""

    def __init__(self, trim: float) -> None:
        self.trim = trim
        self.replies: list[Reply] = []

    def add(self, reply: Reply) -> None:
        self.replies.append(reply)

    def result(self) -> dict[str, torch.Tensor]:
        cut = int(self.trim * len(self.replies))
        folded = {}
        for name in self.replies[0].arrays:
            values = torch.stack([reply.arrays[name] for reply in self.replies]).sort(dim=0).values
            folded[name] = values[cut : len(self.replies) - cut].mean(dim=0)
        return folded


class TrimmedMean(BaseStrategy):
    """Mean without the largest and smallest share ``trim`` of every coordinate."""

    def __init__(self, *, trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trim = trim

    def accumulator(self) -> TrimmedValues:
        return TrimmedValues(self.trim)
