"""Sketches: fixed random maps from an update of any shape to a short vector that keeps inner products.

A plain tensor is sketched by a CountSketch (Charikar, Chen, Farach-Colton, 2002) whose hash is structured so that it
runs at memory speed: the flat tensor is cut into groups of 64 rows of ``size`` entries, every entry gets a sign from
one random tile, rows are added up, and each group's sum is dealt to the buckets by a random permutation with random
signs of its own. Any two entries have independent signs, so E⟨Sx, Sy⟩ = ⟨x, y⟩. The tables hold d/64 numbers.

A pair of LoRA factors is sketched as the effective update ΔW = B₁A₁ − B₀A₀ = [B₁−B₀, B₀]·[A₁; A₁−A₀] without forming
it: the sketch of an outer product is the circular convolution of its factors' sketches (TensorSketch, Pham and Pagh,
KDD 2013). It depends on the product only, so adapters of different ranks compare, and an invertible change of basis
does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.lora.pairs import pair_names
from fedllm.seeding import derive_seed

_ROWS = 64
_CHUNK = 1 << 20  # entries at a time: what is worked on stays in the cache


@dataclass(frozen=True)
class Sketch:
    """What is kept of an update.

    Attributes:
        vector: float32 ``[size]``.
        norm: Euclidean norm of the whole update, exact.
    """

    vector: Tensor
    norm: float


@dataclass(frozen=True)
class _Base:
    """The factors that a client was sent, as matrices, and what of its sketch depends on them alone."""

    sent_a: Tensor
    sent_b: Tensor
    a: Tensor
    b: Tensor
    columns: Tensor
    rows: Tensor
    gram_a: Tensor
    gram_b: Tensor


class Sketcher:
    """The random maps of one run; two sketchers of the same size and seed are the same maps.

    Args:
        size: length of a sketch. Inner products of unit vectors have a standard deviation of about 1/√size.
        seed: of all tables.

    Raises:
        ValueError: the size is not positive.
    """

    def __init__(self, size: int = 512, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"the size of a sketch must be at least 1, found {size}")
        self.size = size
        self._seed = seed
        self._tile = _signs(self._generator("tile"), (_ROWS, size))
        self._tables: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._sent: dict[str, _Base] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the random tables."""
        return self._tile.nbytes + sum(t.nbytes for pair in self._tables.values() for t in pair)

    def update(self, start: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Sketch:
        """Sketch of ``new`` − ``start``, tensor by tensor; LoRA pairs count as their product.

        Args:
            start: what the client was sent. An empty mapping: ``new`` already is the update, tensor by tensor.
            new: tensors of the same shapes, for some or all names of ``start``.

        Raises:
            ValueError: a tensor has another shape than what was sent.
        """
        if start:
            _check_shapes(start, new)
            names = pair_names(new)
            pairs = [
                self._pair(module, new[a], new[b], start[a], start[b])
                for module, (a, b) in names.modules.items()
            ]
            parts = [self.tensor(name, new[name], start[name]) for name in names.heads]
            if pairs:  # one way back from the frequencies for all of them: it is linear
                parts.append(
                    (
                        self._from_spectrum(torch.stack([spectrum for spectrum, _ in pairs]).sum(0)),
                        sum(part for _, part in pairs),
                    )
                )
        else:
            parts = [self.tensor(name, value) for name, value in new.items()]
        square = sum(part for _, part in parts)
        return Sketch(torch.stack([vector for vector, _ in parts]).sum(0), math.sqrt(max(square, 0.0)))

    def tensor(self, name: str, value: Tensor, reference: Tensor | None = None) -> tuple[Tensor, float]:
        """Sketch ``[size]`` of ``value`` − ``reference`` and its squared norm, streamed in pieces.

        Args:
            name: decides the random map, together with the number of entries.
            value: any shape.
            reference: of the same shape; None: zeros.
        """
        flat = value.reshape(-1)
        base = None if reference is None else reference.reshape(-1)
        groups = -(-flat.numel() // (_ROWS * self.size))
        order, signs = self._table(f"tensor {name}", flat.numel(), lambda g: self._deal(g, groups))
        sums, square = torch.zeros(groups, self.size), 0.0
        per_piece = max(1, _CHUNK // (_ROWS * self.size))
        for first in range(0, groups, per_piece):
            where = slice(first * _ROWS * self.size, (first + per_piece) * _ROWS * self.size)
            piece = flat[where].to(torch.float32)
            piece = piece.clone() if base is None else piece - base[where]
            square += float(torch.dot(piece, piece))
            for group, block in _blocks(piece, self.size):
                block.mul_(self._tile[: block.shape[-2]])
                sums[first + group : first + group + block.shape[0]] += block.sum(-2)
            tail = piece[piece.numel() // self.size * self.size :]
            if tail.numel():
                row = piece.numel() // self.size
                sums[first + row // _ROWS, : tail.numel()] += tail * self._tile[row % _ROWS, : tail.numel()]
        vector = torch.zeros(self.size).index_add_(0, order, (sums * signs).view(-1))
        return vector, square

    def product(self, name: str, b: Tensor, a: Tensor) -> Tensor:
        """Sketch ``[size]`` of ``b @ a`` without forming it.

        Args:
            name: decides the random map, together with the outer sizes.
            b: ``[m, r]``.
            a: ``[r, k]``.
        """
        return self._from_spectrum((self._rows(name, b) * self._columns(name, a)).sum(0))

    def _pair(self, name: str, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, float]:
        """Spectrum of the sketch of B·A − B₀·A₀ = ΔB·A + B₀·ΔA, and its squared norm; nothing cancels that way."""
        base = self._once(name, a0, b0)
        delta_a, delta_b = _matrix(a) - base.a, _matrix(b) - base.b
        moved_a, moved_b = self._columns(name, delta_a), self._rows(name, delta_b)
        spectrum = (moved_b * (base.columns + moved_a) + base.rows * moved_a).sum(0)
        # Gram matrices of rank × rank; those of A = A₀ + ΔA follow from two.
        mixed, own = delta_a @ base.a.T, delta_a @ delta_a.T
        square = (
            torch.sum((delta_b.T @ delta_b) * (base.gram_a + mixed + mixed.T + own))
            + 2 * torch.sum((delta_b.T @ base.b) * (mixed.T + own))
            + torch.sum(base.gram_b * own)
        )
        return spectrum, float(square)

    def _once(self, name: str, a0: Tensor, b0: Tensor) -> _Base:
        """What depends on the factors that were sent only; clients that were sent the same tensors share it."""
        found = self._sent.get(name)
        if found is None or found.sent_a is not a0 or found.sent_b is not b0:
            a, b = _matrix(a0), _matrix(b0)
            found = _Base(a0, b0, a, b, self._columns(name, a), self._rows(name, b), a @ a.T, b.T @ b)
            self._sent[name] = found
        return found

    def _from_spectrum(self, spectrum: Tensor) -> Tensor:
        vector: Tensor = torch.fft.irfft(spectrum, n=self.size)
        return vector

    def _rows(self, name: str, factor: Tensor) -> Tensor:
        """Spectra ``[r, size // 2 + 1]`` of the CountSketches of the columns of a factor ``[m, r]``."""
        buckets, signs = self._hash(f"rows {name}", factor.shape[0])
        sums = torch.zeros(self.size, factor.shape[1]).index_add_(0, buckets, factor * signs[:, None])
        spectra: Tensor = torch.fft.rfft(sums.T.contiguous())
        return spectra

    def _columns(self, name: str, factor: Tensor) -> Tensor:
        """Spectra ``[r, size // 2 + 1]`` of the CountSketches of the rows of a factor ``[r, k]``."""
        buckets, signs = self._hash(f"columns {name}", factor.shape[1])
        sums = torch.zeros(factor.shape[0], self.size).index_add_(1, buckets, factor * signs)
        spectra: Tensor = torch.fft.rfft(sums)
        return spectra

    def _hash(self, purpose: str, entries: int) -> tuple[Tensor, Tensor]:
        return self._table(
            purpose,
            entries,
            lambda g: (torch.randint(self.size, (entries,), generator=g), _signs(g, (entries,))),
        )

    def _deal(self, generator: torch.Generator, groups: int) -> tuple[Tensor, Tensor]:
        order = torch.rand(groups, self.size, generator=generator).argsort(1).view(-1)
        return order, _signs(generator, (groups, self.size))

    def _table(
        self, purpose: str, entries: int, make: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        key = (purpose, entries)
        if key not in self._tables:
            self._tables[key] = make(self._generator(purpose, entries))
        return self._tables[key]

    def _generator(self, *purpose: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, "sketch", self.size, *purpose))


def _check_shapes(start: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for name, value in new.items():
        if start[name].shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}, expected {tuple(start[name].shape)} as it was sent"
            )


def _matrix(factor: Tensor) -> Tensor:
    """A factor as a float32 matrix: ``[r, inputs]`` or ``[outputs, r]``, also that of a convolution."""
    return factor.reshape(factor.shape[0], -1).to(torch.float32)


def _blocks(piece: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Views ``[groups, rows, size]`` of the whole rows in a piece, with the group at which each begins."""
    rows = piece.numel() // size
    whole = rows // _ROWS
    if whole:
        yield 0, piece[: whole * _ROWS * size].view(whole, _ROWS, size)
    if rest := rows % _ROWS:
        yield whole, piece[whole * _ROWS * size : rows * size].view(1, rest, size)


def _signs(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).to(torch.float32)
