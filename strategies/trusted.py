"""A trusted update: the server trains on rows of its own with the update rule that the clients use.

:class:`RootedFilter` is the base of the defences that compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from fedllm.strategies.believable import LARGEST_NORM, is_bounded
from fedllm.strategies.filtering import ReplyFilter
from fedllm.strategies.vert.sketch import Sketch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.data import test_examples
from fedllm.errors import ConfigError, NonFiniteLossError
from fedllm.events import EventBus
from fedllm.records import decode
from fedllm.seeding import derive_seed
from fedllm.tasks import get_task
from fedllm.update import ClientUpdate, TrainJob

if TYPE_CHECKING:
    from fedllm.models import ModelBundle


RootUpdate = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(round, global adapter) → what a client with trusted data replies: its adapter, or its gradient."""


class RootedFilter(ReplyFilter):
    """Base of filters that may compare with a trusted update.

    Args:
        inner: any Flower strategy.
        root_examples: so many of the server's test rows are trusted; 0: none.
        root: trusted update as a function instead of ``root_examples``.
        kwargs: keywords of :class:`fedllm.strategies.filtering.ReplyFilter`.

    Attributes:
        root: the trusted update as a function, once the run is prepared; None: nothing is trusted.
        root_sketch: sketch of the trusted update of this round; None as well where that is of no use.
    """

    def __init__(
        self, inner: Strategy, *, root_examples: int = 0, root: RootUpdate | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inner, **kwargs)
        self._root_examples = root_examples
        self.root = root
        self.root_sketch: Sketch | None = None

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Refuse trusted rows where the server has no update rule to train on them with.

        Raises:
            ConfigError: the strategy's clients cannot train without the server.
        """
        table = registry.parameter_table(config.defence)
        field = registry.parameters_model(cls).model_fields.get("root_examples")
        default = 0 if field is None else field.default
        count = config.plugins.get(table, {}).get("root-examples", default)
        if count and getattr(registry.load("strategies", config.strategy), "trains_at_once", False):
            leave_out = 'set defence = "vert", which can do without' if default else "set it to 0"
            raise ConfigError(
                f"{table}.root-examples is {count}, but the clients of strategy {config.strategy!r} train together "
                f"with the server, which has no update rule to run alone: {leave_out}, or pass a function in Python: "
                f"{cls.__name__}(inner, root=…)"
            )

    def prepare(self, config: RunConfig, bundle: Any, events: EventBus) -> None:
        """Get the trusted data ready.

        Raises:
            ConfigError: there are fewer test rows than shall be trusted.
        """
        super().prepare(config, bundle, events)
        if self.root is None and self._root_examples:
            self.root = TrustedData(config, bundle, self._root_examples).train

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The inner strategy's messages; the trusted update of this round is computed first."""
        self.root_sketch = None
        if self.root is not None:
            self.root_sketch = self._trusted(self.root, server_round, decode(arrays))
        return super().configure_train(server_round, arrays, config, grid)

    def _trusted(self, root: RootUpdate, server_round: int, current: Mapping[str, Tensor]) -> Sketch | None:
        """Sketch of the trusted update; None, and a warning, if nothing can be compared with it."""
        try:
            trained = root(server_round, current)
            sketch = self.sketcher.update(current if self.replies_are_adapters else {}, trained)
            found = f"its norm is {sketch.norm:g}"
        except NonFiniteLossError as error:
            sketch, found = None, str(error)
        if sketch is not None and is_bounded(sketch):
            return sketch
        key = f"{type(self).__name__.lower()}.root-examples"
        self._warn(
            f"round {server_round}: the trusted update ({key}) is of no use, expected a norm of at most "
            f"{LARGEST_NORM:g}: {found}; this round has none"
        )
        return None


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
        """What a client with the trusted rows would reply; the caller's random state stays as it was."""
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
