"""The server's half of a round: an open session, a trainer in a thread, and what the server learned as replies."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedllm.accumulate import Reply
from fedllm.allocator import give_back_memory
from fedllm.errors import SplitError
from fedllm.frozen import frozen_products
from fedllm.models import ModelBundle
from fedllm.records import encode
from fedllm.seeding import derive_seed
from fedllm.split.cohort import Loss
from fedllm.split.importance import WeightImportance
from fedllm.split.model import SplitModel
from fedllm.split.server import SplitServer
from fedllm.split.session import Session, Ticket
from fedllm.split.trainer import SplitTrainer
from fedllm.tasks import Task, loss_of_logits

SERVER = "server"
"""Name of the server among those that return an adapter."""

_JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class ServerSettings:
    """How the server trains its blocks.

    Attributes:
        labels: where the head runs.
        mode: one step for the cohort, or one for each client.
        learning_rate: of the adapters.
        head_learning_rate: of the heads.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        join_timeout: seconds within which a client must have opened its stream.
        step_timeout: seconds that a client may take for a step.
    """

    labels: Literal["server", "client"]
    mode: Literal["parallel", "sequential"]
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    max_grad_norm: float
    join_timeout: float
    step_timeout: float


def loss_of(task: Task) -> Loss:
    """The task's loss on logits, with the number of its targets."""

    def loss(logits: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        count = task.num_targets({"attention_mask": mask, "labels": labels})
        return loss_of_logits(task, logits, mask, labels), count

    return loss


class ServerRound:
    """Trains the server's blocks while the clients of a round train theirs.

    Args:
        bundle: the server's model; its adapter is replaced.
        split: the same model, cut.
        cuts: of the clients, by name, in the order in which they count.
        start: the adapter that the round starts from, whole.
        frozen: products beside the adapter.
        task: what is learned.
        settings: how.
        seed: of dropout.
        ask_importance: also find out how important each adapted module is.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        split: SplitModel,
        cuts: Mapping[str, int],
        start: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        task: Task,
        settings: ServerSettings,
        seed: int,
        *,
        ask_importance: bool,
    ) -> None:
        self._bundle, self._split, self._cuts, self._start = bundle, split, dict(cuts), dict(start)
        self._seed = seed
        self.tickets = {name: Ticket(name, secrets.token_hex(16), cut) for name, cut in cuts.items()}
        self.session = Session(
            list(self.tickets.values()),
            join_timeout=settings.join_timeout,
            step_timeout=settings.step_timeout,
        )
        bundle.load_adapter_state(start, any_ranks=True)
        self._parameters = {
            name: parameter
            for name, parameter in bundle.trainable().items()
            if self._on_server(name, settings.labels)
        }
        self.importance = WeightImportance(bundle.model.get_base_model())
        self._contexts = ExitStack()
        self._contexts.enter_context(frozen_products(bundle.model, frozen))
        if ask_importance:  # it keeps the output of every adapted layer until the backward pass
            self._contexts.enter_context(self.importance.watching())
        self.trainer = SplitTrainer(
            split,
            self.session,
            self._optimizer(settings),
            loss_of(task) if settings.labels == "server" else None,
            mode=settings.mode,
            max_grad_norm=settings.max_grad_norm,
        )
        self._thread = threading.Thread(target=self._train, name="split-trainer")
        self._failure: SplitError | None = None

    def _on_server(self, name: str, labels: str) -> bool:
        """Whether the server trains a tensor: those of blocks behind the earliest cut, and of heads with the labels."""
        block = self._split.block_of(name)
        return labels == "server" if block is None else block >= min(self._cuts.values())

    def _optimizer(self, settings: ServerSettings) -> torch.optim.Optimizer:
        factors = [p for name, p in self._parameters.items() if not self._bundle.is_head(name)]
        heads = [p for name, p in self._parameters.items() if self._bundle.is_head(name)]
        groups = [
            {"params": factors, "lr": settings.learning_rate},
            {"params": heads, "lr": settings.head_learning_rate},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=settings.weight_decay, fused=True
        )

    def begin(self, server: SplitServer) -> None:
        """Let the clients in and start to train."""
        server.open(self.session)
        self._thread.start()

    def _train(self) -> None:
        self._bundle.model.train()
        try:
            # A thread has no random state of its own: nobody else draws while clients train.
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(derive_seed(self._seed, SERVER))
                self.trainer.run()
        except SplitError as error:
            self._failure = error
        finally:
            self._bundle.model.eval()
            self._bundle.model.zero_grad(set_to_none=True)

    def end(self) -> None:
        """Stop, whatever the clients still do; safe to call twice.

        Raises:
            SplitError: the trainer did not stop.
        """
        self.session.close("the round is over")
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                raise SplitError(f"the split trainer did not stop within {_JOIN_SECONDS:g} s")
        self._contexts.close()
        give_back_memory()

    def replies(self, examples: Mapping[str, float]) -> Iterator[Reply]:
        """What the server learned, one reply for each block, weighed by the clients for which it did the block.

        Where some clients hold a block and the server does it for the others, both count by examples
        (HSplitLoRA-style: the paper's rule for blocks on both sides was not available).

        Args:
            examples: of the clients whose replies count, by name.

        Raises:
            SplitError: the trainer failed.
        """
        if self._failure is not None:
            raise self._failure
        state = self._bundle.adapter_state()
        parts: dict[int | None, dict[str, Tensor]] = {}
        for name in self._parameters:
            parts.setdefault(self._split.block_of(name), {})[name] = state[name]
        for block, arrays in parts.items():
            weight = sum(
                count for client, count in examples.items() if block is None or self._cuts[client] <= block
            )
            if weight > 0:
                sent: ArrayRecord = encode({name: self._start[name] for name in arrays})
                yield Reply(SERVER, weight, arrays, {}, RecordDict(), sent)
