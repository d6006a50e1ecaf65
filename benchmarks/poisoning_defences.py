"""The defences of :mod:`poisoning` by one interface: VERT, the published form, and the rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from fedllm.strategies.robust import rules
from fedllm.strategies.robust.temporal import Flanders, FLDetector, TemporalCosine
from fedllm.strategies.vert.detector import Detector
from fedllm.strategies.vert.paper import PaperDetector
from fedllm.strategies.vert.rule import WEIGHTS, weigh_kept
from fedllm.strategies.vert.sketch import Sketch, Sketcher
from torch import Tensor

from fedllm.seeding import derive_seed

ORACLE = "oracle"
OURS = ("vert", "vert-known", "vert-mixed", "vert-root")
TRUSTING = ("fltrust", "vert-root")
"""Defences that are given trusted data."""


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

    def __init__(self, seed: int, keep: float = 0.0, root: bool = False, rule: str = "mean") -> None:
        self.detector, self.sketcher = Detector(512, keep=keep, seed=seed), Sketcher(512, seed)
        self._root, self._rule = root, WEIGHTS.get(rule)

    def judge(self, detector: Detector, server_round: int, updates: Tensor, root: Tensor) -> Tensor:
        """Factors ``[n]``."""
        sketches = [self.sketcher.tensor("update", update) for update in updates]
        vectors = torch.stack([vector for vector, _ in sketches])
        trusted = self.sketcher.update({}, {"update": root})
        judged = detector.judge(
            server_round,
            [str(index) for index in range(len(updates))],
            vectors,
            torch.tensor([square**0.5 for _, square in sketches]),
            Sketch(trusted.vector, trusted.norm) if self._root else None,
        )
        factors = judged.factors
        return factors if self._rule is None else weigh_kept(factors, vectors, self._rule)

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
        ORACLE: lambda: Weights(_oracle),
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
        "vert-mixed": lambda: Vert(seed, rule="mixed-geometric-median"),
        "vert-root": lambda: Vert(seed, root=True),
    }
