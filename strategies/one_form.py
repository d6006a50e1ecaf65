"""What needs adapters of one form is refused before a run whose clients have several ranks."""

from __future__ import annotations

from fedllm.strategies.filtering import WholeUpdates

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.errors import ConfigError


def check_one_form(config: RunConfig, key: str, value: str, way_out: str) -> None:
    """Refuse ranks of several sizes.

    Args:
        config: of the run.
        key: what needs adapters of one form.
        value: of the key.
        way_out: what to set instead.

    Raises:
        ConfigError: ``lora.client-ranks`` names more than one rank.
    """
    ranks = config.lora.client_ranks
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{key} is {value!r}, which needs adapters of one form, but lora.client-ranks is "
            f"{','.join(map(str, ranks))}: give all clients one rank, or {way_out}"
        )


def defences_of_any_form() -> str:
    """Names of the registered defences that compare adapters of unequal ranks."""
    names = registry.available("defences")
    return ", ".join(name for name in names if not issubclass(registry.load("defences", name), WholeUpdates))
