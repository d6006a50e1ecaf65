"""How much memory a computation needs, told without doing it: tensors on the meta device, counted while they live.

What lives is counted per storage, so that views cost nothing and what autograd keeps counts until it is freed. Left out
are what an allocator wastes, the workspaces of kernels, and a GPU's context.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALIGNMENT = 512
"""CUDA's allocator rounds every block up to this many bytes; a CPU's rounds less."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside the block and still live.

    Operations whose result depends on values, which a meta tensor has not, get the largest result: a mask keeps all it
    could keep. What is read from a meta tensor is 0.

    Attributes:
        live: bytes that live now.
        peak: the most that lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = _without_values(func, args, kwargs or {})
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Never count these, for example the weights."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = tensor

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _without_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation that needs the values of meta tensors; None: it needs none."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
    if func is aten._to_copy.default and args[0].is_meta and str(kwargs.get("device", "meta")) != "meta":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
    if func is aten.index.Tensor and args[0].is_meta and (masks := _masks(args[1])):
        rows = math.prod(masks[0].shape)
        return args[0].new_empty(rows, *args[0].shape[masks[0].ndim :])
    if (
        func in (aten.index_put_.default, aten._index_put_impl_.default)
        and args[0].is_meta
        and _masks(args[1])
    ):
        return args[0]
    if func is aten.index_put.default and args[0].is_meta and _masks(args[1]):
        return torch.empty_like(args[0])
    return None


def _masks(indices: Sequence[Tensor | None]) -> list[Tensor]:
    return [index for index in indices if index is not None and index.dtype == torch.bool]
