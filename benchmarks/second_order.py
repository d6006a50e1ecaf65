"""Rounds, gradients, bytes and seconds to a target on digits: FAGH and SOFIM against what they must beat.

MNIST-10k (8,000 / 2,000) or scikit-learn's digits, all clients in every round, Dirichlet 0.2. Each method is tuned over
the same number of trials of its own pair, on a seed of its own; then it runs with the best pair on further seeds. A
trial's score is the rounds to the target accuracy plus those to the target loss (of the test examples), and a trial is
broken off when it can no longer be the best.

*Equal gradient evaluations* means: a client computes at most two gradients a round. FAGH computes a gradient and a
Hessian product, counted as the second one; local methods take two full-batch steps, all others one gradient.
FedAvg, FedProx, SCAFFOLD and the hybrid with several local epochs stand apart: an epoch is a pass over the client's
examples, but a gradient for every minibatch.

What is finished stands in ``--cache``, one file for each (network, clients, method); an interrupted run goes on there.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mnist
import torch
from harness import console
from second_order_methods import Method, Pair, Problem

from fedllm.seeding import derive_seed

HERE = Path(__file__).resolve().parent
SOURCES = ("mnist.py", "second_order.py", "second_order_methods.py")
LIBRARY = (
    "updates.py",
    "limited_memory.py",
    "damping.py",
    "metric.py",
    "rank_one.py",
    "sofim.py",
    "moments.py",
)
ALPHA = 0.2
LOCAL_EPOCHS, BATCH_SIZE = 5, 32
DIVERGED = 50.0
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Setting:
    """What is measured: network, clients, targets, and after how many rounds a run is given up."""

    network: str
    clients: int
    accuracy: float
    loss: float
    rounds: int


@dataclass(frozen=True)
class Run:
    """Rounds to the targets (None: not reached), and seconds of a round without its evaluation."""

    to_accuracy: int | None
    to_loss: int | None
    seconds_per_round: float
    rounds: int
    best_accuracy: float

    def score(self, limit: int) -> int:
        """What tuning minimises."""
        return (self.to_accuracy or limit + 1) + (self.to_loss or limit + 1)


def play(
    digits: mnist.Digits,
    setting: Setting,
    method: Method,
    pair: Pair,
    seed: int,
    best: float = math.inf,
) -> Run:
    """Run a method until both targets are reached, the rounds are over, or its score cannot fall below ``best``."""
    model = mnist.FlatModel(setting.network, seed)
    clients = (
        [mnist.Client(digits.train_x, digits.train_y, 1.0)]
        if method.pooled
        else mnist.deal(digits, setting.clients, ALPHA, seed)
    )
    problem = Problem(model, clients, seed, LOCAL_EPOCHS, BATCH_SIZE)
    step, w = method.build(*pair), model.initial
    reached: dict[str, int] = {}
    seconds, top, number = 0.0, 0.0, 0
    for number in range(1, setting.rounds + 1):
        started = time.perf_counter()
        w = step(problem, w, number)
        seconds += time.perf_counter() - started
        loss, accuracy = model.evaluate(w, digits.test_x, digits.test_y)
        top = max(top, accuracy)
        if accuracy >= setting.accuracy:
            reached.setdefault("accuracy", number)
        if loss <= setting.loss:
            reached.setdefault("loss", number)
        hopeless = sum(reached.get(name, number + 1) for name in ("accuracy", "loss")) >= best
        if len(reached) == 2 or hopeless or not loss < DIVERGED:
            break
    return Run(reached.get("accuracy"), reached.get("loss"), seconds / number, number, top)


def tune(digits: mnist.Digits, setting: Setting, method: Method, seed: int, quick: bool) -> dict[str, Any]:
    """Try the whole grid; the best pair and every trial."""
    best, chosen, trials = math.inf, method.trials(setting.network, quick)[0], []
    for pair in method.trials(setting.network, quick):
        run = play(digits, setting, method, pair, seed, best)
        score = run.score(setting.rounds)
        if score < best:
            best, chosen = score, pair
        trials.append({"pair": pair, "score": score, **asdict(run)})
        names = ", ".join(f"{name}={value:g}" for name, value in zip(method.names, pair, strict=True))
        console.print(
            f"  trial {names}: accuracy after {_shown(run.to_accuracy)}, loss after {_shown(run.to_loss)} of "
            f"{run.rounds} rounds, {run.rounds * run.seconds_per_round:.0f} s"
        )
    return {"pair": chosen, "trials": trials}


def measure(
    split: Any, setting: Setting, method: Method, seeds: Sequence[int], cache: Path, args: Any
) -> dict[str, Any]:
    """Tune and run a method, or go on with what its file holds."""
    clients = "pooled" if method.pooled else str(setting.clients)
    path = cache / f"{setting.network}-{clients}-{method.key}{'-quick' if args.quick else ''}.json"
    tuning_seed = derive_seed(args.seed, "tuning") % 1_000_000
    identity = _identity(setting, method, tuning_seed, args.quick)
    found: dict[str, Any] = {"identity": identity, "runs": {}}
    if path.is_file() and (stored := json.loads(path.read_text())).get("identity") == identity:
        found = stored
    console.print(f"[bold]{setting.network}, {clients} clients: {method.title}[/bold]")
    if "pair" not in found:
        found |= tune(split(tuning_seed), setting, method, tuning_seed, args.quick)
        _write(path, found)
    for seed in seeds:
        if str(seed) not in found["runs"]:
            run = play(split(seed), setting, method, tuple(found["pair"]), seed)
            found["runs"][str(seed)] = asdict(run)
            _write(path, found)
            console.print(
                f"  seed {seed}: accuracy after {_shown(run.to_accuracy)}, loss {_shown(run.to_loss)}"
            )
    return found | {"runs": [Run(**found["runs"][str(seed)]) for seed in seeds]}


def _identity(setting: Setting, method: Method, seed: int, quick: bool) -> str:
    """What a stored result depends on: the sources, the targets, the grid and the data."""
    folder = Path(torch.__file__).parent  # torch's version stands for its results
    import fedllm.strategies.second_order as library

    digest = hashlib.blake2b(digest_size=8)
    for path in [HERE / name for name in SOURCES] + [
        Path(library.__file__).parent / name for name in LIBRARY
    ]:
        digest.update(path.read_bytes())
    targets = (setting.network, setting.accuracy, setting.loss, setting.rounds)
    digest.update(repr((targets, method.key, seed, quick, folder.name, torch.__version__)).encode())
    return digest.hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def _shown(rounds: int | None) -> str:
    return "–" if rounds is None else str(rounds)
