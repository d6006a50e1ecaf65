"""Other forward functions for some modules of a model, for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@contextmanager
def exchanged(model: nn.Module, replacement: Callable[[nn.Module], Forward | None]) -> Iterator[int]:
    """Let modules compute by other functions inside the block; they are as before afterwards, also after an error.

    Args:
        model: whose modules are looked at, itself included.
        replacement: the function that takes the place of a module's ``forward``; None: the module stays.

    Yields:
        How many modules were exchanged.
    """
    before: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in model.modules():
            forward = replacement(module)
            if forward is not None:
                # A forward function of the instance hides that of the class; whoever set one before gets it back.
                before.append((module.__dict__, module.__dict__.get("forward")))
                module.__dict__["forward"] = forward
        yield len(before)
    finally:
        for attributes, own in before:
            if own is None:
                del attributes["forward"]
            else:
                attributes["forward"] = own
