"""Momentum FedSGD and SOFIM as Flower strategies; the arrays may be an adapter's or any torch model's parameters.

The clients of all but :class:`SOFIMOpt` send gradients: the updates ``gradient`` and ``gradient-and-hessian-row``, or a
ClientApp of one's own with :func:`fedllm.curvature.gradient_and_hvp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from fedllm.strategies.second_order.optimizer import GradientOptimizer
from fedllm.strategies.second_order.updates import FedSgdMomentum, Sofim
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from pydantic import Field

from fedllm.accumulate import Accumulator, Reply, WeightedMean
from fedllm.errors import PlanError
from fedllm.records import GRADIENT, NUM_TARGETS, ReplyKind, check_num_examples, only_metrics
from fedllm.strategy import BaseStrategy

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class GradientMean(WeightedMean):
    """The weighted mean of gradients.

    Attributes:
        losses: weight and loss of each client by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, tuple[float, float]] = {}

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        super().add(reply)
        if "loss" in reply.metrics:
            self.losses[reply.node] = (reply.weight, reply.metrics["loss"])


class GradientStrategy(BaseStrategy):
    """A strategy whose clients send the gradient of their mean loss, weighted by the number of their targets.

    A reply that has the metric ``num-targets`` (label tokens of a language model) is weighted by it, any other one by
    ``weighted_by_key``: then the mean is the gradient of the pooled loss.
    """

    reads: ClassVar[ReplyKind] = GRADIENT

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages for the clients of this round.

        Raises:
            PlanError: an array holds integers, which have no gradient.
        """
        for name, array in arrays.items():
            if not array.dtype.startswith(("float", "bfloat")):
                raise PlanError(
                    f"{name!r} is of dtype {array.dtype}, which has no gradient; send parameters only, no buffers"
                )
        return super().configure_train(server_round, arrays, config, grid)

    def check_train_reply(self, reply: Message, sent: Message) -> None:
        """See the base class; ``num-targets``, if there, must be believable too."""
        super().check_train_reply(reply, sent)
        metrics = only_metrics(reply)
        if NUM_TARGETS in metrics:
            check_num_examples(metrics, NUM_TARGETS)

    def open_reply(self, message: Message) -> Reply:
        """Decode a reply and weigh it by its targets."""
        reply = super().open_reply(message)
        weight = reply.metrics.get(NUM_TARGETS, reply.weight)
        return Reply(reply.node, weight, reply.arrays, reply.metrics, reply.content, reply.sent)

    def accumulator(self) -> Accumulator:
        """The weighted mean of gradients, and the losses for an optimiser that watches them."""
        folding = GradientMean()
        if isinstance(self.server_optimizer, GradientOptimizer):
            self.server_optimizer.watch(folding.losses)
        return folding


class FedSGDM(GradientStrategy):
    """FedSGD with server momentum: the control for FAGH and SOFIM, at learning rate η/ρ.

    The momentum is a bias-corrected mean of gradients, so ``eta`` is the learning rate whatever ``beta1``.

    Args:
        eta: learning rate.
        beta1: decay of the gradients' mean.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(self, *, eta: Positive = 0.1, beta1: Decay = 0.9, **kwargs: Any) -> None:
        optimizer = GradientOptimizer(FedSgdMomentum(eta=eta, beta1=beta1))
        super().__init__(**{"server_optimizer": optimizer} | kwargs)


class SOFIM(GradientStrategy):
    """SOFIM (arXiv 2403.02833) on gradients, in the federated form of DP-FedSOFIM (arXiv 2601.09166) without privacy.

    Args:
        eta: η; while the momentum is short, ‖M̂‖² ≪ ρ, the learning rate is η/ρ.
        rho: ρ; no step is longer than η/(2√ρ).
        beta1: decay of the gradients' mean.
        direction: what the inverse Fisher matrix is applied to, see :mod:`.sofim`.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self,
        *,
        eta: Positive = 0.05,
        rho: Positive = 0.5,
        beta1: Decay = 0.9,
        direction: Literal["momentum", "gradient"] = "momentum",
        **kwargs: Any,
    ) -> None:
        optimizer = GradientOptimizer(Sofim(eta=eta, rho=rho, beta1=beta1, direction=direction))
        super().__init__(**{"server_optimizer": optimizer} | kwargs)


class SOFIMOpt(BaseStrategy):
    """SOFIM as a server optimiser on the pseudo-gradients of clients that train for several steps (ours).

    Any averaging strategy takes it: ``FedAvg(server_optimizer=sofim_optimizer())``.

    Args:
        eta: η; while the momentum is short, the learning rate of the server is η/ρ.
        rho: ρ.
        beta1: decay of the pseudo-gradients' mean.
        direction: what the inverse Fisher matrix is applied to.
        local_scale: the clients' learning rate times their steps, by which an update is divided.
        kwargs: keywords of :class:`fedllm.strategy.BaseStrategy`.
    """

    def __init__(
        self,
        *,
        eta: Positive = 0.5,
        rho: Positive = 0.5,
        beta1: Decay = 0.9,
        direction: Literal["momentum", "gradient"] = "momentum",
        local_scale: Positive = 1.0,
        **kwargs: Any,
    ) -> None:
        optimizer = sofim_optimizer(eta, rho, beta1, direction, local_scale)
        super().__init__(**{"server_optimizer": optimizer} | kwargs)


def sofim_optimizer(
    eta: float = 0.5,
    rho: float = 0.5,
    beta1: float = 0.9,
    direction: Literal["momentum", "gradient"] = "momentum",
    local_scale: float = 1.0,
) -> GradientOptimizer:
    """SOFIM as a ``server_optimizer`` of any averaging strategy; see :class:`SOFIMOpt`."""
    return GradientOptimizer(Sofim(eta=eta, rho=rho, beta1=beta1, direction=direction), pseudo=local_scale)
