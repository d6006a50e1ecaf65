"""Cutting a transformer after block c, by views that share the blocks, adapters included, of one model.

A view is a shallow copy of the transformers module that loops over the blocks, with some of its children replaced:
masks, positions and dtypes stay those of transformers' own code, and every parameter stays the one of the model, so
that gradients land where an optimiser looks for them. Blocks are numbered from 0; a cut c leaves blocks 0…c−1 to the
client and c…L−1 to the server (SplitLoRA, arXiv 2407.00952, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.errors import SplitError


@dataclass(frozen=True)
class Anatomy:
    """Where a family keeps its parts, as attribute names of the module that loops over the blocks.

    Attributes:
        blocks: path of the list of blocks.
        final: modules behind the last block.
        entrance: modules that turn token ids, or positions, into the input of block 0, with what takes their place
            where hidden states come in instead.
    """

    blocks: str
    final: tuple[str, ...]
    entrance: Mapping[str, nn.Module]


class _HiddenStates(nn.Module):
    """Stands for embeddings where hidden states come in: BERT hands them over as ``inputs_embeds``."""

    def forward(self, *, inputs_embeds: Tensor, **_unused: Any) -> Tensor:
        return inputs_embeds


class _NoPosition(nn.Module):
    """Stands for an embedding of positions that earlier blocks have already seen."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


_ROTARY = Anatomy("layers", ("norm",), {})
ANATOMIES: Mapping[str, Anatomy] = {
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "gpt2": Anatomy("h", ("ln_f",), {"wpe": _NoPosition(), "drop": nn.Identity()}),
    "bert": Anatomy("encoder.layer", ("pooler",), {"embeddings": _HiddenStates()}),
}
"""Families that can be cut, by ``model_type`` of their configuration."""


class SplitModel:
    """A model that can be run in pieces.

    Args:
        model: a transformers model for a task, with or without adapters inside.

    Raises:
        SplitError: a family that cannot be cut; those that can are named.
    """

    def __init__(self, model: nn.Module) -> None:
        family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        if family not in ANATOMIES:
            raise SplitError(
                f"a model of the family {family!r} cannot be cut; those that can: {', '.join(ANATOMIES)}"
            )
        self.model: Any = model
        self._anatomy = ANATOMIES[family]
        self._body: Any = model.get_submodule(str(model.base_model_prefix))
        blocks: Any = self._body.get_submodule(self._anatomy.blocks)
        self.num_blocks = len(blocks)
        self._views: dict[tuple[int, int, bool, bool], Any] = {}

    @property
    def width(self) -> int:
        """Width of the hidden states between blocks."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def block_of(self, name: str) -> int | None:
        """The block to which a module or tensor of this name belongs; None: to no block, as the head does."""
        path = f"{self.model.base_model_prefix}.{self._anatomy.blocks}."
        before, found, rest = name.partition(path)
        if not found or (before and not before.endswith(".")):
            return None
        number = rest.partition(".")[0]
        return int(number) if number.isdecimal() else None

    def check_cut(self, cut: int, where: str = "cut") -> None:
        """Raise unless both sides keep at least one block.

        Raises:
            SplitError: a cut outside 1…L−1.
        """
        if not 1 <= cut < self.num_blocks:
            raise SplitError(
                f"{where}: expected 1 to {self.num_blocks - 1} of the model's {self.num_blocks} blocks on the client, "
                f"found {cut}"
            )

    def front(self, input_ids: Tensor, attention_mask: Tensor, cut: int) -> Tensor:
        """Hidden states ``[batch, length, width]`` behind block ``cut − 1`` from token ids ``[batch, length]``."""
        return self._run(0, cut, True, input_ids=input_ids, attention_mask=attention_mask)

    def blocks(self, hidden: Tensor, attention_mask: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states behind block ``stop − 1`` from those before block ``start``; same shape."""
        if start == stop:
            return hidden
        return self._run(start, stop, False, inputs_embeds=hidden, attention_mask=attention_mask)

    def head(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits from the hidden states behind the last block: ``[batch, length, vocabulary]`` or ``[batch, classes]``.

        Where a decoder classifies, the last token under the mask decides, as in transformers.
        """
        view = self._view(self.num_blocks, self.num_blocks, False, final=True)
        if hasattr(self.model, "score"):
            normed = view(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)[0]
            last = attention_mask.long().cumsum(dim=1).argmax(dim=1)
            pooled: Tensor = self.model.score(normed[torch.arange(len(last), device=last.device), last])
            return pooled
        task = _share(self.model, {str(self.model.base_model_prefix): view})
        logits: Tensor = task(inputs_embeds=hidden, attention_mask=attention_mask).logits
        return logits

    def _run(self, start: int, stop: int, entrance: bool, **inputs: Tensor) -> Tensor:
        output = self._view(start, stop, entrance)(use_cache=False, **inputs)
        hidden: Tensor = output[0]
        return hidden

    def _view(self, start: int, stop: int, entrance: bool, final: bool = False) -> Any:
        key = (start, stop, entrance, final)
        if key not in self._views:
            self._views[key] = self._make_view(start, stop, entrance, final)
        view = self._views[key]
        view.training = self._body.training
        return view

    def _make_view(self, start: int, stop: int, entrance: bool, final: bool) -> Any:
        anatomy = self._anatomy
        blocks = self._body.get_submodule(anatomy.blocks)
        replaced: dict[str, nn.Module | None] = {anatomy.blocks: nn.ModuleList(list(blocks)[start:stop])}
        if not entrance:
            replaced |= anatomy.entrance
        if not final:
            replaced |= {name: None if name == "pooler" else nn.Identity() for name in anatomy.final}
        view = _share(self._body, replaced)
        view.config = copy.copy(view.config)
        # Loops go over this many blocks, and look up the kind of attention of each by its place in the loop.
        view.config.num_hidden_layers = stop - start
        if (kinds := getattr(view.config, "layer_types", None)) is not None:
            view.config.layer_types = kinds[start:stop]
        return view


def _share(module: nn.Module, replaced: Mapping[str, nn.Module | None]) -> Any:
    """A shallow copy whose children are the module's own, except for those replaced by their dotted path."""
    view: Any = copy.copy(module)
    view._modules = dict(module._modules)
    nested: dict[str, dict[str, nn.Module | None]] = {}
    for path, child in replaced.items():
        name, dot, rest = path.partition(".")
        if dot:
            nested.setdefault(name, {})[rest] = child
        else:
            view._modules[name] = child
    for name, children in nested.items():
        view._modules[name] = _share(module.get_submodule(name), children)
    return view
