"""The arena of :mod:`poisoning`: clients that train at once, attacks on their updates, and defences by one interface.

All clients' local steps are one vmap over a flat network, so that a cell of the table takes seconds. An update is a row
of a matrix ``[n, d]``. Attackers are honest in the first ``onset`` rounds, as in the publication's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mnist
import torch
from fedllm.strategies.attacks import colluding
from fedllm.strategies.robust import rules
from fedllm.strategies.robust.temporal import Flanders, FLDetector, TemporalCosine
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.paper import PaperDetector
from fedllm.strategies.vert.sketch import Sketch, Sketcher
from torch import Tensor
from torch.func import grad, vmap

from fedllm.seeding import derive_seed

STEPS, BATCH, RATE = 8, 32, 0.1
TRIGGER, TARGET = 4, 0


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
        self._gradients = vmap(grad(self.model.loss))

    def train(self, weights: Tensor, server_round: int, poison: str = "") -> tuple[Tensor, Tensor]:
        """Updates ``[n, d]`` of all clients and the trusted one ``[d]``; hostile clients' data may be poisoned."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, server_round, "batches"))
        vectors = weights.expand(self.n + 1, -1)
        for _ in range(STEPS):
            drawn = [torch.randint(len(c.y), (BATCH,), generator=generator) for c in self.data]
            x = torch.stack([c.x[rows] for c, rows in zip(self.data, drawn, strict=True)])
            y = torch.stack([c.y[rows] for c, rows in zip(self.data, drawn, strict=True)])
            if poison == "label-flip":
                y[: self.n][self.hostile] = 9 - y[: self.n][self.hostile]
            elif poison == "backdoor":
                for row in self.hostile.nonzero()[:, 0].tolist():
                    x[row, : BATCH // 2, :, :TRIGGER, :TRIGGER] = x.max()
                    y[row, : BATCH // 2] = TARGET
            vectors = vectors - RATE * self._gradients(vectors, x, y)
        updates = vectors - weights
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


# -------------------------------------------------------------------- attacks

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
ATTACKS = ("none", *FORGED, "replay", *POISONED, "adaptive")


def _noise(own: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(own.shape, generator=generator)
    return noise * own.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)


# ------------------------------------------------------------------- defences


@dataclass(frozen=True)
class Scene:
    """What a defence gets to see of a round, and, for the oracle, what it does not."""

    round: int
    updates: Tensor
    root: Tensor
    honest: Tensor


class Defence(Protocol):
    """Makes one update of many."""

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """The aggregate ``[d]``, and who was kept ``[n]`` bool."""
        ...


class Weights:
    """A rule without memory that weighs rows."""

    def __init__(self, weigh: Callable[[Scene], Tensor]) -> None:
        self._weigh = weigh

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """See :class:`Defence`."""
        weights = self._weigh(scene)
        return weights @ scene.updates, weights > 0


class Rule:
    """A rule without memory that mixes coordinates."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        self._rule = rule

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """See :class:`Defence`."""
        return self._rule(scene.updates), torch.ones(len(scene.updates), dtype=torch.bool)


class Judged:
    """A rival with memory: the mean of those that it keeps."""

    def __init__(self, rival: TemporalCosine | PaperDetector | Flanders | FLDetector) -> None:
        self._rival = rival

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """See :class:`Defence`."""
        names = [str(index) for index in range(len(scene.updates))]
        kept, _ = self._rival.judge(names, scene.updates)
        return scene.updates[kept].mean(0), kept


class CentredClipping:
    """Centred clipping around the last aggregate, with the median distance to it as the radius."""

    def __init__(self) -> None:
        self._centre: Tensor | None = None

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """See :class:`Defence`."""
        centre = torch.zeros_like(scene.root) if self._centre is None else self._centre
        radius = float((scene.updates - centre).norm(dim=1).median())
        self._centre = rules.centred_clipping(scene.updates, centre, radius, steps=3)
        return self._centre, torch.ones(len(scene.updates), dtype=torch.bool)


class Vert:
    """Our default, over sketches; a round in which nobody is kept changes nothing."""

    def __init__(self, seed: int, keep: float = 0.0, root: bool = False) -> None:
        self.detector, self.sketcher = Detector(512, keep=keep, seed=seed), Sketcher(512, seed)
        self._root = root

    def judge(self, detector: Detector, server_round: int, updates: Tensor, root: Tensor) -> Tensor:
        """Factors ``[n]``."""
        sketches = [self.sketcher.tensor("update", update) for update in updates]
        trusted = self.sketcher.update({}, {"update": root})
        return detector.judge(
            server_round,
            [str(index) for index in range(len(updates))],
            torch.stack([vector for vector, _ in sketches]),
            torch.tensor([square**0.5 for _, square in sketches]),
            Sketch(trusted.vector, trusted.norm) if self._root else None,
        ).factors

    def aggregate(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """See :class:`Defence`."""
        factors = self.judge(self.detector, scene.round, scene.updates, scene.root)
        count = max(1, int((factors > 0).sum()))
        return factors @ scene.updates / count, factors > 0


def _mean(scene: Scene) -> Tensor:
    return torch.full((len(scene.updates),), 1 / len(scene.updates))


def _oracle(scene: Scene) -> Tensor:
    return scene.honest.float() / scene.honest.sum()


def defences(n: int, hostile: int, seed: int) -> dict[str, Callable[[], Defence]]:
    """Defence by name; those that need it are told how many clients are hostile, or the most that they can take."""
    f = min(hostile, (n - 1) // 2) if hostile else 0
    noise = torch.Generator().manual_seed(derive_seed(seed, "dnc"))

    def bounded(scene: Scene) -> Tensor:
        norms = scene.updates.norm(dim=1)
        return rules.norm_bound_factors(norms, float(norms.median())) / n

    def trusting(scene: Scene) -> Tensor:
        return rules.fltrust_weights(
            scene.updates, scene.updates.norm(dim=1), scene.root, float(scene.root.norm())
        )

    return {
        "oracle": lambda: Weights(_oracle),
        "mean": lambda: Weights(_mean),
        "median": lambda: Rule(rules.median),
        "trimmed-mean": lambda: Rule(lambda x: rules.trimmed_mean(x, f)),
        "krum": lambda: Weights(lambda s: rules.krum_weights(s.updates, f)),
        "multi-krum": lambda: Weights(lambda s: rules.multi_krum_weights(s.updates, f)),
        "bulyan": lambda: Rule(lambda x: rules.bulyan(x, f)),
        "centred-clipping": CentredClipping,
        "norm-bound": lambda: Weights(bounded),
        "geometric-median": lambda: Weights(lambda s: rules.geometric_median_weights(s.updates)),
        "dnc": lambda: Weights(lambda s: rules.dnc_weights(s.updates, f, noise)),
        "nnm-trimmed-mean": lambda: Rule(lambda x: rules.trimmed_mean(rules.nnm(x, f), f)),
        "fltrust": lambda: Weights(trusting),
        "fldetector": lambda: Judged(FLDetector()),
        "flanders": lambda: Judged(Flanders(n - hostile, seed=seed)),
        "temporal-cosine": lambda: Judged(TemporalCosine(n - hostile)),
        "vert-paper": lambda: Judged(PaperDetector(n - hostile, seed=seed)),
        "vert": lambda: Vert(seed),
        "vert-known": lambda: Vert(seed, keep=float(n - hostile)),
        "vert-root": lambda: Vert(seed, root=True),
    }


# ----------------------------------------------------------------------- game


@dataclass(frozen=True)
class Outcome:
    """What came of a run: accuracy, success of a backdoor, shares of honest and hostile replies kept under attack."""

    accuracy: float
    attack_success: float
    honest_kept: float
    hostile_kept: float


def play(arena: Arena, attack: str, defence: Defence, rounds: int, onset: int) -> Outcome:
    """One run from the initial network; attackers are honest in the first ``onset`` rounds."""
    weights = arena.model.initial.clone()
    remembered = torch.zeros(arena.n, arena.model.size)
    kept_sums = torch.zeros(arena.n)
    for server_round in range(1, rounds + 1):
        attacking = server_round > onset and attack != "none"
        poison = attack if attacking and attack in POISONED else ""
        updates, root = arena.train(weights, server_round, poison)
        if not attacking:
            remembered = updates.clone()
        elif bool(arena.hostile.any()):
            updates = _forged(arena, attack, defence, server_round, updates, root, remembered)
        honest = ~arena.hostile if attacking else torch.ones(arena.n, dtype=torch.bool)
        aggregate, kept = defence.aggregate(Scene(server_round, updates, root, honest))
        weights = weights + aggregate
        if server_round > onset:
            kept_sums += kept
    shares = kept_sums / max(1, rounds - onset)
    hostile_kept = float(shares[arena.hostile].mean()) if bool(arena.hostile.any()) else 0.0
    return Outcome(
        arena.accuracy(weights),
        arena.attack_success(weights),
        float(shares[~arena.hostile].mean()),
        hostile_kept,
    )


def _forged(
    arena: Arena,
    attack: str,
    defence: Defence,
    server_round: int,
    updates: Tensor,
    root: Tensor,
    remembered: Tensor,
) -> Tensor:
    updates, hostile = updates.clone(), arena.hostile
    if attack in FORGED:
        generator = torch.Generator().manual_seed(derive_seed(arena.seed, server_round, attack))
        updates[hostile] = FORGED[attack](updates[~hostile], updates[hostile], generator)
    elif attack == "replay":
        updates[hostile] = remembered[hostile]
    elif attack == "adaptive":
        honest, own = updates[~hostile].clone(), updates[hostile].clone()

        def accepted(candidates: Tensor) -> Tensor:
            if not isinstance(defence, Vert):
                return torch.ones(len(candidates), dtype=torch.bool)
            trial = updates.clone()
            trial[hostile] = candidates
            return defence.judge(copy.deepcopy(defence.detector), server_round, trial, root)[hostile] > 0

        updates[hostile] = colluding.adaptive(honest, own, accepted)
    return updates
