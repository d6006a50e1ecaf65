"""The arena of :mod:`poisoning`: clients that train at once, attacks on their updates, and the game itself.

All clients' local steps are products of stacked matrices, so that a cell takes a second. An update is a row of a matrix
``[n, d]``. Attackers are honest in the first ``onset`` rounds, as in the publication's own code.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean

import mnist
import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.robust import rules
from poisoning_defences import Defence, Scene, Vert
from torch import Tensor
from torch.nn import functional as F

from fedllm.seeding import derive_seed

STEPS, BATCH, RATE = 8, 32, 0.1
SHAPES = [parameter.shape for parameter in mnist.mlp().parameters()]
TRIGGER, TARGET = 4, 0


def mlp_gradients(vectors: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradients ``[k, d]`` of the mean cross-entropies of :func:`mnist.mlp`, every client's on a batch of its own.

    Half as long as ``vmap(grad(loss))``, and a grid has some 26,000 cells.

    Args:
        vectors: parameters ``[k, d]``.
        x: images ``[k, b, 784]``.
        y: labels ``[k, b]``.
    """
    pieces = vectors.split([shape.numel() for shape in SHAPES], dim=1)
    w1, b1, w2, b2 = (piece.unflatten(1, shape) for piece, shape in zip(pieces, SHAPES, strict=True))
    hidden = torch.baddbmm(b1[:, None], x, w1.mT).relu_()
    slopes = torch.baddbmm(b2[:, None], hidden, w2.mT).softmax(2)
    slopes = (slopes - F.one_hot(y, slopes.shape[2])) / y.shape[1]
    below = (slopes @ w2) * (hidden > 0)
    gradients = (below.mT @ x, below.sum(1), slopes.mT @ hidden, slopes.sum(1))
    return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


class Arena:
    """Clients, their data and the network; the same numbers for the same arguments.

    Args:
        clients: n.
        alpha: Dirichlet concentration.
        share: of the clients that is hostile.
        seed: of everything.
        root_examples: trusted examples, taken from the training rows before they are dealt.
    """

    def __init__(self, clients: int, alpha: float, share: float, seed: int, root_examples: int = 100) -> None:
        digits = mnist.load_digits(seed)
        self.digits = mnist.Digits(
            digits.name,
            digits.train_x[root_examples:],
            digits.train_y[root_examples:],
            digits.test_x,
            digits.test_y,
        )
        dealt = mnist.deal(self.digits, clients, alpha, seed, min_rows=10)
        self.root = mnist.Client(digits.train_x[:root_examples], digits.train_y[:root_examples], 0.0)
        self.data = [*dealt, self.root]
        self.model, self.n, self.seed = mnist.FlatModel("mlp", seed), clients, seed
        generator = torch.Generator().manual_seed(derive_seed(seed, "attackers"))
        self.hostile = torch.zeros(clients, dtype=torch.bool)
        self.hostile[torch.randperm(clients, generator=generator)[: round(clients * share)]] = True

    def train(
        self, weights: Tensor, server_round: int, poison: str = "", all_clients: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Updates ``[n, d]`` of all clients and the trusted one ``[d]``; hostile clients' data may be poisoned.

        Hostile clients' rows are zero unless ``all_clients`` train. What the others draw does not depend on it.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, server_round, "batches"))
        training = [*(~self.hostile | all_clients).tolist(), True]
        vectors = weights.expand(sum(training), -1)
        for _ in range(STEPS):
            drawn = [torch.randint(len(c.y), (BATCH,), generator=generator) for c in self.data]
            chosen = [(c, rows) for c, rows, trains in zip(self.data, drawn, training, strict=True) if trains]
            x = torch.stack([client.x[rows] for client, rows in chosen])
            y = torch.stack([client.y[rows] for client, rows in chosen])
            if poison == "label-flip":
                y[: self.n][self.hostile] = 9 - y[: self.n][self.hostile]
            elif poison == "backdoor":
                brightest = x.max()
                for row in self.hostile.nonzero()[:, 0].tolist():
                    x[row, : BATCH // 2, :, :TRIGGER, :TRIGGER] = brightest
                    y[row, : BATCH // 2] = TARGET
            vectors = vectors - RATE * mlp_gradients(vectors, x.flatten(2), y)
        updates = torch.zeros(self.n + 1, len(weights))
        updates[torch.tensor(training)] = vectors - weights
        return updates[: self.n], updates[self.n]

    def accuracy(self, weights: Tensor) -> float:
        """On the test rows."""
        return self.model.evaluate(weights, self.digits.test_x, self.digits.test_y)[1]

    def attack_success(self, weights: Tensor) -> float:
        """Share of the test rows of other classes that the trigger turns into the target."""
        others = self.digits.test_y != TARGET
        x = self.digits.test_x[others].clone()
        x[:, :, :TRIGGER, :TRIGGER] = x.max()
        return self.model.evaluate(weights, x, torch.full((len(x),), TARGET))[1]


Forge = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(honest ``[m, d]``, the colluders' honest updates ``[f, d]``, generator) → what they send ``[f, d]``."""

FORGED: Mapping[str, Forge] = {
    "sign-flip": lambda honest, own, g: -own,
    "scaling": lambda honest, own, g: 10 * own,
    "scaled-flip": lambda honest, own, g: -10 * own,
    "gaussian": lambda honest, own, g: _noise(own, g),
    "zero": lambda honest, own, g: torch.zeros_like(own),
    "ipm-0.1": lambda honest, own, g: colluding.inner_product_manipulation(honest, 0.1).expand_as(own),
    "ipm-0.5": lambda honest, own, g: colluding.inner_product_manipulation(honest, 0.5).expand_as(own),
    "alie-1": lambda honest, own, g: colluding.little_is_enough(honest, 1.0).expand_as(own),
    "alie-1.5": lambda honest, own, g: colluding.little_is_enough(honest, 1.5).expand_as(own),
    "alie-tuned": lambda honest, own, g: colluding.tuned_little_is_enough(
        honest, len(own), lambda x: rules.multi_krum_weights(x, len(x) // 2 - 1) @ x
    ).expand_as(own),
    "min-max": lambda honest, own, g: colluding.min_max(honest).expand_as(own),
    "min-max-std": lambda honest, own, g: colluding.min_max(honest, "std").expand_as(own),
    "min-sum": lambda honest, own, g: colluding.min_sum(honest).expand_as(own),
    "mimic": lambda honest, own, g: colluding.mimic(honest).expand_as(own),
}
POISONED = ("label-flip", "backdoor")
TRAINING = ("sign-flip", "scaling", "scaled-flip", "gaussian", "adaptive", *POISONED)
"""Attacks that start from what the attackers' own data teach; for all others they need not train."""
ATTACKS = ("none", *FORGED, "replay", *POISONED, "adaptive")


def _noise(own: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(own.shape, generator=generator)
    return noise * own.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)


@dataclass
class Effort:
    """What the adaptive attacker spent: looks at a copy of the defence, updates tried there, time, and strengths.

    Attributes:
        queries: how often a copy judged a whole round.
        candidates: forged updates in all of these.
        seconds: for finding the strength.
        strengths: the chosen one of every round, in multiples of an update's norm.
    """

    queries: int = 0
    candidates: int = 0
    seconds: float = 0.0
    strengths: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        accuracy: on the test rows.
        attack_success: share of the test rows that a backdoor's trigger turns.
        honest_kept: share of the honest replies kept under attack.
        hostile_kept: share of the hostile replies kept.
        hostile_by_round: the same in every round since they turned.
        queries: see :class:`Effort`.
        candidates: likewise.
        attack_seconds: likewise.
        strength: mean over the rounds.
    """

    accuracy: float
    attack_success: float
    honest_kept: float
    hostile_kept: float
    hostile_by_round: tuple[float, ...]
    queries: int
    candidates: int
    attack_seconds: float
    strength: float


def play(arena: Arena, attack: str, defence: Defence, rounds: int, onset: int) -> Outcome:
    """One run from the initial network; attackers are honest in the first ``onset`` rounds."""
    weights = arena.model.initial.clone()
    remembered = torch.zeros(arena.n, arena.model.size)
    effort, kept_of = Effort(), list[Tensor]()
    for server_round in range(1, rounds + 1):
        attacking = server_round > onset and attack != "none"
        poison = attack if attacking and attack in POISONED else ""
        updates, root = arena.train(weights, server_round, poison, not attacking or attack in TRAINING)
        if not attacking:
            remembered = updates.clone()
        elif bool(arena.hostile.any()):
            updates = _forged(arena, attack, defence, server_round, updates, root, remembered, effort)
        honest = ~arena.hostile if attacking else torch.ones(arena.n, dtype=torch.bool)
        aggregate, kept = defence.aggregate(Scene(server_round, updates, root, honest))
        weights = weights + aggregate
        if server_round > onset:
            kept_of.append(kept)
    by_round = [
        float(kept[arena.hostile].float().mean()) if bool(arena.hostile.any()) else 0.0 for kept in kept_of
    ]
    return Outcome(
        arena.accuracy(weights),
        arena.attack_success(weights),
        mean(float(kept[~arena.hostile].float().mean()) for kept in kept_of),
        mean(by_round),
        tuple(by_round),
        effort.queries,
        effort.candidates,
        effort.seconds,
        mean(effort.strengths or [0.0]),
    )


def _forged(
    arena: Arena,
    attack: str,
    defence: Defence,
    server_round: int,
    updates: Tensor,
    root: Tensor,
    remembered: Tensor,
    effort: Effort,
) -> Tensor:
    updates, hostile = updates.clone(), arena.hostile
    if attack in FORGED:
        generator = torch.Generator().manual_seed(derive_seed(arena.seed, server_round, attack))
        updates[hostile] = FORGED[attack](updates[~hostile], updates[hostile], generator)
    elif attack == "replay":
        updates[hostile] = remembered[hostile]
    elif attack == "adaptive":
        updates[hostile] = _adapted(arena, defence, server_round, updates, root, effort)
    return updates


def _adapted(
    arena: Arena, defence: Defence, server_round: int, updates: Tensor, root: Tensor, effort: Effort
) -> Tensor:
    """What the colluders find by trying strengths on a copy of VERT; they take any other defence to accept all."""
    hostile = arena.hostile
    honest, own = updates[~hostile].clone(), updates[hostile].clone()

    def judged(candidates: Tensor) -> Tensor:
        if not isinstance(defence, Vert):
            return torch.ones(len(updates))
        effort.queries += 1
        effort.candidates += len(candidates)
        trial = updates.clone()
        trial[hostile] = candidates
        factors = defence.judge(copy.deepcopy(defence.detector), server_round, trial, root)
        return torch.cat([factors[hostile], factors[~hostile]])

    began = time.perf_counter()
    found = colluding.adaptive(honest, own, judged)
    effort.seconds += time.perf_counter() - began
    effort.strengths.append(float((found - own)[0].norm() / own.norm(dim=1).median().clamp_min(1e-12)))
    return found
