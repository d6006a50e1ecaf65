"""PEFT state-dict names: which two arrays are one LoRA layer's factors, and which stand alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<side>[AB])(?:\.[^.]+)?(?:\.weight)?")


class Pair(NamedTuple):
    """State-dict names of the two factors of one module."""

    lora_A: str
    """Name of the [r, k] factor."""
    lora_B: str
    """Name of the [d, r] factor."""


@dataclass(frozen=True)
class AdapterNames:
    """The names of an adapter's arrays, sorted out.

    Attributes:
        modules: the two factors of every adapted module, by module name, in the order of ``lora_A``.
        heads: everything else, in order: heads that are trained in full, and a factor that travels without its other.
    """

    modules: dict[str, Pair]
    heads: tuple[str, ...]


def pair_names(names: Iterable[str]) -> AdapterNames:
    """Sort out PEFT state-dict names (``….lora_A.weight``, ``….lora_B.weight``)."""
    ordered = list(names)
    sides: dict[str, dict[str, str]] = {"A": {}, "B": {}}
    for name in ordered:
        if match := _FACTOR.fullmatch(name):
            sides[match["side"]][match["module"] or ""] = name
    modules = {
        module: Pair(name, sides["B"][module]) for module, name in sides["A"].items() if module in sides["B"]
    }
    paired = {name for pair in modules.values() for name in pair}
    return AdapterNames(modules, tuple(name for name in ordered if name not in paired))
