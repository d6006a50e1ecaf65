"""Server optimisers: Flower's own FedAvgM, FedAdam and FedYogi, fed with fedllm's streamed mean.

Flower's classes average all replies in NumPy and then take a step. Here the average is folded by
:class:`fedllm.accumulate.WeightedMean` while replies arrive, and Flower's class sees it as one reply of weight 1: the
step is Flower's, memory and precision are ours, and its moments become part of the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import flwr.serverapp.strategy as flower
import torch
from flwr.app import ArrayRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from pydantic import Field

from fedllm.records import ARRAYS, METRICS, NUM_EXAMPLES, decode, encode
from fedllm.strategy import BaseStrategy

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_NOWHERE = Metadata(
    run_id=0,
    message_id="",
    src_node_id=0,
    dst_node_id=0,
    reply_to_message_id="",
    group_id="",
    created_at=0.0,
    ttl=0.0,
    message_type=MessageType.TRAIN,
)
"""Metadata of the mean, which is handed to Flower as a reply without ever having travelled."""

_MOMENTS = ("m_t", "v_t", "momentum_vector")


class FlowerOptimizer:
    """Adapter from a Flower FedOpt-type strategy to :class:`fedllm.strategy.ServerOptimizer`.

    Args:
        inner: ``FedAvgM``, ``FedAdam``, ``FedYogi`` or ``FedAdagrad`` of ``flwr.serverapp.strategy``.
    """

    def __init__(self, inner: flower.FedAvgM | flower.FedAdagrad | flower.FedAdam | flower.FedYogi) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        """The Flower class that takes the steps."""
        return f"flwr {type(self._inner).__name__}"

    def step(
        self, server_round: int, current: Mapping[str, torch.Tensor], folded: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One step of the Flower strategy from the current global adapter."""
        inner: Any = self._inner
        arrays: ArrayRecord = encode({name: current[name] for name in folded})
        if isinstance(inner, flower.FedAvgM):
            inner.current_arrays = arrays
        else:
            inner.current_arrays = {name: array.numpy() for name, array in arrays.items()}
        content = RecordDict({ARRAYS: encode(folded), METRICS: MetricRecord({NUM_EXAMPLES: 1})})
        reply = Message(content=content, metadata=_NOWHERE)  # type: ignore[call-overload]
        with _quiet_flower():
            stepped, _ = inner.aggregate_train(server_round, [reply])
        return decode(stepped)

    def state_dict(self) -> dict[str, Any]:
        """The moments that the Flower strategy has gathered."""
        return {name: value for name in _MOMENTS if (value := getattr(self._inner, name, None)) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the moments."""
        for name in _MOMENTS:
            if hasattr(self._inner, name):
                setattr(self._inner, name, state.get(name))


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Keep Flower from logging that it received one result: it is our mean of all of them."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class FedAvgM(BaseStrategy):
    """FedAvg with server momentum (Hsu et al., 2019, arXiv 1909.06335); Flower's step.

    Args:
        server_learning_rate: step size of the server.
        server_momentum: share of the previous step that is kept.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self, *, server_learning_rate: Positive = 1.0, server_momentum: Decay = 0.9, **kwargs: Any
    ) -> None:
        inner = flower.FedAvgM(server_learning_rate=server_learning_rate, server_momentum=server_momentum)
        super().__init__(**{"server_optimizer": FlowerOptimizer(inner)} | kwargs)


class FedAdam(BaseStrategy):
    """Adam on the server (Reddi et al., ICLR 2021, arXiv 2003.00295); Flower's step.

    Args:
        eta: step size of the server.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        tau: adaptivity; larger is closer to plain averaging.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self,
        *,
        eta: Positive = 1e-2,
        beta_1: Decay = 0.9,
        beta_2: Decay = 0.99,
        tau: Positive = 1e-3,
        **kwargs: Any,
    ) -> None:
        inner = flower.FedAdam(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
        super().__init__(**{"server_optimizer": FlowerOptimizer(inner)} | kwargs)


class FedYogi(BaseStrategy):
    """Yogi on the server (Reddi et al., ICLR 2021, arXiv 2003.00295); Flower's step.

    Args:
        eta: step size of the server.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        tau: adaptivity; larger is closer to plain averaging.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self,
        *,
        eta: Positive = 1e-2,
        beta_1: Decay = 0.9,
        beta_2: Decay = 0.99,
        tau: Positive = 1e-3,
        **kwargs: Any,
    ) -> None:
        inner = flower.FedYogi(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
        super().__init__(**{"server_optimizer": FlowerOptimizer(inner)} | kwargs)
