"""A trusted update: the server trains on rows of its own with the update rule that the clients use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.data import test_examples
from fedllm.errors import ConfigError
from fedllm.seeding import derive_seed
from fedllm.tasks import get_task
from fedllm.update import ClientUpdate, TrainJob

if TYPE_CHECKING:
    from fedllm.models import ModelBundle


class TrustedData:
    """Some of the server's test rows, drawn once from the run's seed.

    Args:
        config: of the run.
        bundle: the server's model; its adapter is overwritten by :meth:`train`.
        count: how many rows.

    Raises:
        ConfigError: there are fewer test rows.
    """

    def __init__(self, config: RunConfig, bundle: ModelBundle, count: int) -> None:
        rows = test_examples(config, bundle.tokenizer)
        available = 0 if rows is None else len(rows)
        if rows is None or available < count:
            raise ConfigError(
                f"root-examples is {count}, but there are {available} test rows; lower it, or raise data.test-fraction"
            )
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "trusted rows"))
        self._examples = rows.select(torch.randperm(available, generator=generator)[:count])
        self._config, self._bundle = config, bundle
        parameters = config.plugins.get(registry.parameter_table(config.client), {})
        self._update: ClientUpdate = registry.build("clients", config.client, parameters)

    def train(self, server_round: int, current: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The adapter after one local training on the trusted rows; the caller's random state stays as it was."""
        seed = derive_seed(self._config.seed, server_round, "trusted update")
        self._bundle.load_adapter_state(current, any_ranks=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            job = TrainJob(
                self._bundle,
                get_task(self._config.task),
                self._examples,
                self._config.train,
                seed,
                server_round,
                "server",
                current,
            )
            return self._update.run(job).arrays
