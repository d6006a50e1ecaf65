"""A model as forward mode needs it: linear layers, attention and loss that have forward derivatives and keep little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedllm.clients.forward_ad.adapted import adapted_linear
from fedllm.clients.forward_ad.attention import differentiable_attention
from fedllm.clients.forward_ad.exchange import Forward, exchanged
from fedllm.clients.forward_ad.jvp import LossOf, parameter_names
from fedllm.clients.forward_ad.linear import frozen_linear
from fedllm.clients.forward_ad.norm import frozen_layer_norm
from fedllm.clients.forward_ad.token_loss import has_plain_output, token_loss
from torch import Tensor, nn

from fedllm.tasks import Batch, CausalLM, Task

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@contextmanager
def forward_mode(model: Any, task: Task, parameters: Mapping[str, nn.Parameter]) -> Iterator[LossOf]:
    """The loss of a model, ready for dual passes inside the block; the model is as it was afterwards.

    Args:
        model: a peft model; what is not trained must not require gradients.
        task: whose loss it is.
        parameters: those that can be perturbed, by their names in messages.

    Raises:
        ModelError: the model's attention has no forward derivative.
    """
    base = model.get_base_model()
    with differentiable_attention(base), exchanged(model, _replacement):
        yield LossOf(model, _loss(base, task), parameter_names(model, parameters))


def _replacement(module: nn.Module) -> Forward | None:
    return adapted_linear(module) or frozen_linear(module) or frozen_layer_norm(module)


def _loss(base: Any, task: Task) -> Loss:
    if not (isinstance(task, CausalLM) and has_plain_output(base)):
        return task.loss
    output = base.get_output_embeddings()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return token_loss(model, output, batch)

    return loss
