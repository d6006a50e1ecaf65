"""Tokenised examples in three flat tensors: no padding is stored, and any subset is one gather away."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedllm.errors import DataError

IGNORED = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True, eq=False)
class Encoded:
    """A ragged set of n tokenised examples.

    Attributes:
        input_ids: int32 ``[tokens]``, the examples one after the other.
        offsets: int64 ``[n + 1]``; example i is ``input_ids[offsets[i]:offsets[i + 1]]``.
        labels: class ids int64 ``[n]``, or token labels int32 ``[tokens]`` in which -100 is masked.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    input_ids: Tensor
    offsets: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        found = f"input_ids {_describe(self.input_ids)}, offsets {_describe(self.offsets)}"
        if self.input_ids.dtype != torch.int32 or self.input_ids.dim() != 1:
            raise ValueError(f"input_ids must be int32 of one dimension, found {found}")
        if self.offsets.dtype != torch.int64 or self.offsets.dim() != 1 or len(self.offsets) == 0:
            raise ValueError(f"offsets must be int64 of shape [n + 1], found {found}")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.input_ids) or bool((self.lengths < 0).any()):
            raise ValueError(f"offsets must rise from 0 to the number of tokens, found {found}")
        expected = len(self.input_ids) if self.has_token_labels else len(self)
        if self.labels.dtype not in (torch.int32, torch.int64) or self.labels.shape != (expected,):
            raise ValueError(
                f"labels must be int64 [{len(self)}] or int32 [{len(self.input_ids)}], "
                f"found {_describe(self.labels)}"
            )

    @classmethod
    def from_lists(
        cls, input_ids: Sequence[Sequence[int]], labels: Sequence[int] | Sequence[Sequence[int]]
    ) -> Encoded:
        """Build from one list of token ids an example, with one class id or one list of token labels each."""
        lengths = np.fromiter((len(ids) for ids in input_ids), dtype=np.int64, count=len(input_ids))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        if len(labels) > 0 and isinstance(labels[0], Sequence):
            label_tensor = _flatten(labels, int(offsets[-1]))  # type: ignore[arg-type]
        else:
            label_tensor = torch.tensor(labels, dtype=torch.int64)
        return cls(_flatten(input_ids, int(offsets[-1])), torch.from_numpy(offsets), label_tensor)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of every example, int64 ``[n]``."""
        return self.offsets.diff()

    @property
    def has_token_labels(self) -> bool:
        """Whether every token has a label, rather than every example."""
        return self.labels.dtype == torch.int32

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.input_ids.nbytes + self.offsets.nbytes + self.labels.nbytes

    def select(self, indices: Sequence[int] | Tensor) -> Encoded:
        """The examples at the indices, in their order, as tensors of their own."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[chosen]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shift = self.offsets[chosen] - offsets[:-1]
        tokens = torch.arange(int(offsets[-1])) + shift.repeat_interleave(lengths)
        labels = self.labels[tokens] if self.has_token_labels else self.labels[chosen]
        return Encoded(self.input_ids[tokens], offsets, labels)

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of an example: token ids ``[length]``, and its label (a scalar) or token labels."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.input_ids[span], self.labels[span] if self.has_token_labels else self.labels[index]

    def save(self, path: Path) -> None:
        """Write a safetensors file with a checksum of its content."""
        save_file(self._tensors(), path, metadata={"crc32": str(self._checksum())})

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is damaged or holds something else.
            OSError: the file cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                encoded = cls(*(file.get_tensor(name) for name in ("input_ids", "offsets", "labels")))
        except (SafetensorError, ValueError) as error:
            raise DataError(f"{path} is not a usable file of tokenised examples: {error}") from error
        if metadata.get("crc32") != str(encoded._checksum()):
            raise DataError(f"{path} is damaged: the checksum of its tokens does not match")
        return encoded

    def _tensors(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "offsets": self.offsets, "labels": self.labels}

    def _checksum(self) -> int:
        value = 0
        for tensor in self._tensors().values():
            value = zlib.crc32(tensor.numpy().data, value)
        return value


def _flatten(rows: Sequence[Sequence[int]], total: int) -> Tensor:
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=total)
    return torch.from_numpy(flat)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
