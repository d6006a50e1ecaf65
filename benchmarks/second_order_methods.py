"""The methods that ``second_order.py`` compares, each as one server round on flat vectors.

A method has a pair of hyper-parameters, and says what a client does in a round: how many gradients it takes, and how
many vectors of the model's size travel. FAGH and SOFIM are the library's own update objects. *Pooled* methods need
nothing of a client but the gradient of its loss (and a Hessian product) at the global model: their rounds are the same
for every number of clients (see :mod:`mnist`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.updates import FaghPaper, FedSgdMomentum, Sofim
from mnist import Client, FlatModel, local_sgd
from torch import Tensor

from fedllm.seeding import derive_seed

Pair = tuple[float, float]
Group = Literal["one", "two", "epochs"]
WHOLE = 1 << 30  # a batch size beyond every client: full-batch steps
WITH_DIRECTION = 1.25
"""What FAGH sends down, in vectors: the model, and a direction in int8, ``fagh.direction-codec``'s default."""


@dataclass(frozen=True)
class Problem:
    """A network and the clients' examples; ``clients[0]`` holds all of them for a pooled method."""

    model: FlatModel
    clients: Sequence[Client]
    seed: int
    epochs: int
    batch_size: int


class Round:
    """One round after another: the next global parameters from the current ones."""

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """Round ``number``, from 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A method and its grid.

    Attributes:
        key: in JSON keys and file names.
        title: in the table.
        group: ``one`` or ``two`` gradient evaluations per client and round, or several local ``epochs``.
        names: of the two hyper-parameters.
        grids: by network, the values of each.
        build: makes the first round of a run.
        vectors: float32 vectors of the model's size that travel per client and round, up and down.
        pooled: whether the rounds do not depend on how the examples are dealt.
    """

    key: str
    title: str
    group: Group
    names: tuple[str, str]
    grids: dict[str, tuple[Sequence[float], Sequence[float]]]
    build: Callable[[float, float], Round]
    vectors: tuple[float, float] = (1, 1)
    pooled: bool = True

    def trials(self, network: str, quick: bool) -> list[Pair]:
        """The pairs that are tried, three by three; with ``quick`` the middle of the second ones."""
        first, second = self.grids[network]
        return list(itertools.product(first, second[1:2] if quick else second))


class GradientStep(Round):
    """An update that needs the gradient only."""

    def __init__(self, update: Any) -> None:
        self.update = update

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """See the base class."""
        (everyone,) = problem.clients
        return w + self.update.step(problem.model.gradient(w, everyone.x, everyone.y)[1])


class CurvatureStep(Round):
    """FAGH: the gradient, and a Hessian product with the direction that the update asks for."""

    def __init__(self, update: Fagh | FaghPaper) -> None:
        self.update = update

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """See the base class."""
        (everyone,) = problem.clients
        wanted = self.update.request()
        if wanted is None:
            loss, gradient = problem.model.gradient(w, everyone.x, everyone.y)
            return w + self.update.step(gradient, losses=loss)
        direction = _unit(wanted, w) if isinstance(wanted, int) else wanted
        loss, gradient, row = problem.model.gradient_and_hvp(w, everyone.x, everyone.y, direction)
        return w + self.update.step(gradient, row, wanted, loss)


class Adaptive:
    """FedAdam and FedYogi (Reddi et al., 2021) with Adam's bias corrections, on a mean gradient.

    Args:
        eta: step size.
        tau: adaptivity τ.
        yogi: Yogi's second moment instead of Adam's.
    """

    def __init__(self, eta: float, tau: float, *, yogi: bool = False) -> None:
        self.eta, self.tau, self.yogi = eta, tau, yogi
        self.beta_1, self.beta_2 = 0.9, 0.99
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.count = 0

    def step(self, gradient: Tensor) -> Tensor:
        """The change of the parameters ``[d]``."""
        self.count += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        square = gradient.square()
        if self.yogi:
            sign = torch.sign(torch.as_tensor(self.v) - square)
            self.v = self.v - (1 - self.beta_2) * square * sign
        else:
            self.v = self.beta_2 * self.v + (1 - self.beta_2) * square
        mean = self.m / (1 - self.beta_1**self.count)
        scale = (torch.as_tensor(self.v) / (1 - self.beta_2**self.count)).sqrt()
        return -self.eta * mean / (scale + self.tau)


class LocalSteps(Round):
    """Clients take local steps; the mean of their moves is the step, or what the server makes of it.

    Args:
        rate: the clients' learning rate.
        server: its ``step`` gets the mean move, negated like a gradient; None: the mean move is the step.
        steps: full-batch steps; None: the problem's epochs of minibatches.
        proximal: FedProx's µ.
        unit: the move is divided by this first: rate × steps gives it a gradient's size.
    """

    def __init__(
        self,
        rate: float,
        server: Any = None,
        *,
        steps: int | None = None,
        proximal: float = 0.0,
        unit: float = 1.0,
    ) -> None:
        self.rate, self.server, self.steps, self.proximal, self.unit = rate, server, steps, proximal, unit

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """See the base class."""
        move = torch.zeros_like(w)
        for index, client in enumerate(problem.clients):
            result = train(problem, w, client, index, number, self.rate, self.steps, proximal=self.proximal)
            move.add_(result.vector - w, alpha=client.share)
        return w + (move if self.server is None else self.server.step(-move / self.unit))


class Hybrid(Round):
    """Local epochs, and FAGH on their mean move with Hessian products at the round's start (spec §1.7, ours).

    The server steps by the curvature model relative to plain averaging: with nothing in memory it is FedAvg.

    Args:
        rate: the clients' learning rate.
        reach: ρ in units of 1 / (rate × local steps); below 1 the server goes further than the mean move.
    """

    def __init__(self, rate: float, reach: float) -> None:
        self.rate, self.reach = rate, reach
        self.update: Fagh | None = None

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """See the base class."""
        wanted = None if self.update is None else self.update.request()
        gradient, row, loss, steps = torch.zeros_like(w), torch.zeros_like(w), 0.0, 0.0
        for index, client in enumerate(problem.clients):
            if wanted is None:
                own_loss = problem.model.evaluate(w, client.x, client.y)[0]
            else:
                own_loss, _, own_row = problem.model.gradient_and_hvp(w, client.x, client.y, wanted)
                row.add_(own_row, alpha=client.share)
            result = train(problem, w, client, index, number, self.rate, None)
            gradient.add_(w - result.vector, alpha=client.share)
            loss += client.share * own_loss
            steps += client.share * result.steps
        scale = self.rate * steps
        if self.update is None:
            self.update = Fagh(
                rho=self.reach / scale, beta1=0.0, metric="identity", damping="fixed", secants=False
            )
        return w + self.update.step(gradient / scale, None if wanted is None else row, wanted, loss)


class Scaffold(Round):
    """SCAFFOLD with option II for the controls (arXiv 1910.06378, algorithm 1).

    Args:
        rate: the clients' learning rate.
        server_rate: the server's.
        steps: full-batch steps; None: the problem's epochs of minibatches.
    """

    def __init__(self, rate: float, server_rate: float, *, steps: int | None = None) -> None:
        self.rate, self.server_rate, self.steps = rate, server_rate, steps
        self.controls: list[Tensor] = []

    def __call__(self, problem: Problem, w: Tensor, number: int) -> Tensor:
        """See the base class."""
        if not self.controls:
            self.controls = [torch.zeros_like(w) for _ in problem.clients]
        # The server's control is the mean of the clients', here with their shares as all else.
        mean = torch.zeros_like(w)
        for client, control in zip(problem.clients, self.controls, strict=True):
            mean.add_(control, alpha=client.share)
        move = torch.zeros_like(w)
        for index, client in enumerate(problem.clients):
            correction = mean - self.controls[index]
            result = train(problem, w, client, index, number, self.rate, self.steps, correction=correction)
            move.add_(result.vector - w, alpha=client.share)
            self.controls[index] = (w - result.vector) / (self.rate * result.steps) - correction
        return w + self.server_rate * move


def train(
    problem: Problem,
    w: Tensor,
    client: Client,
    index: int,
    number: int,
    rate: float,
    steps: int | None,
    **terms: Any,
) -> Any:
    """Local steps of one client: full-batch, or the problem's epochs of minibatches."""
    return local_sgd(
        problem.model,
        w,
        client,
        learning_rate=rate,
        batch_size=problem.batch_size if steps is None else WHOLE,
        epochs=problem.epochs if steps is None else steps,
        seed=derive_seed(problem.seed, number, index, "batches"),
        **terms,
    )


def _unit(index: int, like: Tensor) -> Tensor:
    unit = torch.zeros_like(like)
    unit[index] = 1
    return unit


def _rank_one(rate: float, rho: float) -> Round:
    update = Fagh(
        eta=rate * rho, rho=rho, beta1=0.9, memory=1, metric="identity", damping="fixed", secants=False
    )
    return CurvatureStep(update)


def _both(
    first: Sequence[float], second: Sequence[float]
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    return {"lenet": (first, second), "logistic": (first, second)}


METHODS = (
    Method(
        "fedsgdm", "momentum FedSGD at η/ρ (control)", "one", ("η/ρ", "β₁"),
        {"lenet": ((0.11, 0.15, 0.2), (0.8, 0.9, 0.95)), "logistic": ((0.2, 0.4, 0.6), (0.0, 0.3, 0.5))},
        lambda rate, beta: GradientStep(FedSgdMomentum(eta=rate, beta1=beta)),
    ),
    Method(
        "fedadam", "FedAdam", "one", ("η", "τ"),
        {"lenet": ((0.01, 0.02, 0.03), (1e-5, 1e-4, 1e-3)), "logistic": ((0.005, 0.01, 0.02), (1e-3, 1e-2, 1e-1))},
        lambda eta, tau: GradientStep(Adaptive(eta, tau)),
    ),
    Method(
        "fedyogi", "FedYogi", "one", ("η", "τ"),
        {"lenet": ((0.01, 0.02, 0.03), (1e-5, 1e-4, 1e-3)), "logistic": ((0.005, 0.01, 0.02), (1e-3, 1e-2, 1e-1))},
        lambda eta, tau: GradientStep(Adaptive(eta, tau, yogi=True)),
    ),
    Method(
        "sofim", "SOFIM, F⁻¹ of the momentum", "one", ("η/ρ", "ρ"),
        {"lenet": ((0.5, 0.8, 1.2), (0.1, 1.0, 10.0)), "logistic": ((0.2, 0.4, 0.8), (1.0, 10.0, 100.0))},
        lambda rate, rho: GradientStep(Sofim(eta=rate * rho, rho=rho)),
    ),
    Method(
        "sofim_gradient", "SOFIM, F⁻¹ of the gradient", "one", ("η/ρ", "ρ"),
        {"lenet": ((0.25, 0.5, 0.8), (1.0, 10.0, 100.0)), "logistic": ((0.2, 0.4, 0.8), (10.0, 100.0, 1000.0))},
        lambda rate, rho: GradientStep(Sofim(eta=rate * rho, rho=rho, direction="gradient")),
    ),
    Method(
        "fagh", "FAGH, rank-k (ours), η/ρ and τ tuned", "two", ("η/ρ", "τ"),
        {"lenet": ((0.02, 0.03, 0.05), (0.005, 0.02, 0.05)), "logistic": ((0.01, 0.02, 0.04), (0.2, 1.0, 5.0))},
        lambda rate, tau: CurvatureStep(Fagh(rho=1 / rate, tau=tau)), vectors=(2, WITH_DIRECTION),
    ),
    Method(
        "fagh_untuned", "FAGH, rank-k (ours), every key at its default", "two", ("η/ρ", "τ"), _both((0.02,), (0.1,)),
        lambda rate, tau: CurvatureStep(Fagh()), vectors=(2, WITH_DIRECTION),
    ),
    Method(
        "fagh_identity", "FAGH, rank-k, no metric", "two", ("η/ρ", "ρ"),
        {"lenet": ((0.5, 0.8, 1.2), (0.3, 1.0, 3.0)), "logistic": ((0.2, 0.4, 0.8), (1.0, 3.0, 10.0))},
        lambda rate, rho: CurvatureStep(Fagh(eta=rate * rho, rho=rho, metric="identity", damping="fixed")),
        vectors=(2, WITH_DIRECTION),
    ),
    Method(
        "fagh_rank1", "FAGH, rank one, Krylov direction", "two", ("η/ρ", "ρ"),
        {"lenet": ((0.5, 0.8, 1.2), (1.0, 3.0, 10.0)), "logistic": ((0.1, 0.2, 0.4), (1.0, 3.0, 10.0))},
        _rank_one, vectors=(2, WITH_DIRECTION),
    ),
    Method(
        "fagh_paper", "FAGH as published (first row)", "two", ("η/ρ", "ρ"),
        {"lenet": ((0.25, 0.4, 0.8), (1.0, 3.0, 10.0)), "logistic": ((0.1, 0.2, 0.4), (0.3, 1.0, 3.0))},
        lambda rate, rho: CurvatureStep(FaghPaper(eta=rate * rho, rho=rho)), vectors=(2, 1),
    ),
    Method(
        "fagh_off", "FAGH without curvature", "one", ("η/ρ", "τ"),
        {"lenet": ((0.008, 0.015, 0.025), (0.02, 0.05, 0.2)), "logistic": ((0.005, 0.01, 0.02), (0.2, 1.0, 5.0))},
        lambda rate, tau: CurvatureStep(Fagh(rho=1 / rate, tau=tau, memory=0)),
    ),
    Method(
        "fedavgm_2", "FedAvg with momentum, 2 steps", "two", ("η_l", "η_s"),
        {"lenet": ((0.1, 0.2, 0.3), (1.0, 1.5, 2.0)), "logistic": ((0.02, 0.05, 0.1), (2.0, 3.0, 4.0))},
        lambda rate, server: LocalSteps(rate, FedSgdMomentum(eta=server), steps=2), pooled=False,
    ),
    Method(
        "fedadam_2", "FedAdam, 2 steps", "two", ("η_l", "η"),
        {"lenet": ((0.01, 0.03, 0.05), (0.01, 0.02, 0.03)), "logistic": ((0.02, 0.05, 0.1), (0.005, 0.01, 0.02))},
        lambda rate, eta: LocalSteps(rate, Adaptive(eta, 1e-5), steps=2, unit=2 * rate), pooled=False,
    ),
    Method(
        "fedyogi_2", "FedYogi, 2 steps", "two", ("η_l", "η"),
        {"lenet": ((0.01, 0.03, 0.05), (0.01, 0.02, 0.03)), "logistic": ((0.02, 0.05, 0.1), (0.005, 0.01, 0.02))},
        lambda rate, eta: LocalSteps(rate, Adaptive(eta, 1e-5, yogi=True), steps=2, unit=2 * rate), pooled=False,
    ),
    Method(
        "fedprox_2", "FedProx, 2 steps", "two", ("η_l", "µ"),
        {"lenet": ((0.1, 0.2, 0.3), (0.01, 0.1, 1.0)), "logistic": ((0.1, 0.2, 0.3), (0.001, 0.01, 0.1))},
        lambda rate, mu: LocalSteps(rate, steps=2, proximal=mu), pooled=False,
    ),
    Method(
        "scaffold_2", "SCAFFOLD, 2 steps", "two", ("η_l", "η_g"), _both((0.1, 0.2, 0.3), (1.0, 1.5, 2.0)),
        lambda rate, server: Scaffold(rate, server, steps=2), vectors=(2, 2), pooled=False,
    ),
    Method(
        "fedavg", "FedAvg with momentum", "epochs", ("η_l", "β₁"), _both((0.02, 0.05, 0.1), (0.0, 0.3, 0.6)),
        lambda rate, beta: LocalSteps(rate, FedSgdMomentum(eta=1.0, beta1=beta)), pooled=False,
    ),
    Method(
        "fedprox", "FedProx", "epochs", ("η_l", "µ"), _both((0.02, 0.05, 0.1), (0.01, 0.1, 1.0)),
        lambda rate, mu: LocalSteps(rate, proximal=mu), pooled=False,
    ),
    Method(
        "scaffold", "SCAFFOLD", "epochs", ("η_l", "η_g"),
        {"lenet": ((0.02, 0.05, 0.1), (0.7, 1.0, 1.4)), "logistic": ((0.02, 0.05, 0.1), (1.0, 1.4, 2.0))},
        lambda rate, server: Scaffold(rate, server), vectors=(2, 2), pooled=False,
    ),
    Method(
        "hybrid", "FAGH on local epochs (ours)", "epochs", ("η_l", "reach"), _both((0.02, 0.05, 0.1), (0.5, 0.7, 1.0)),
        Hybrid, vectors=(2, WITH_DIRECTION), pooled=False,
    ),
)  # fmt: skip
"""All that stand in the table, in its order."""
