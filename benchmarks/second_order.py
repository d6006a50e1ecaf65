"""Rounds, gradients, bytes and seconds to a target on digits: FAGH and SOFIM against what they must beat.

MNIST-10k (8,000 / 2,000) or scikit-learn's digits, all clients in every round, Dirichlet 0.2. Each method is tuned
over the same number of trials of its own pair, on a seed of its own and without that seed's test rows: a fifth of its
training rows is held out, the rest is dealt to the clients. Then it runs with the best pair on further seeds, which
draw test rows of their own. A trial's score is the rounds to the target accuracy plus those to the target loss (of the
held-out rows), and a trial is broken off when it can no longer be the best. The table says which best values stand at
the end of their grid.

*Equal gradient evaluations* means: a client computes at most two gradients a round. FAGH computes a gradient and a
Hessian product, counted as the second one; local methods take two full-batch steps, all others one gradient.
FedAvg, FedProx, SCAFFOLD and the hybrid with several local epochs stand apart: an epoch is a pass over the client's
examples, but a gradient for every minibatch.

Seconds are processor time of one thread, and compare methods of one kind only: those that need nothing but the mean
gradient are given all examples at once, whatever the number of clients, and local methods run client after client.

What is finished stands in ``--cache``, one file for each (network, clients, method); an interrupted run goes on there.
``--methods`` runs some methods; the report covers them and whatever else the cache holds, and names what it covers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import mnist
import torch
from code_identity import code_identity
from harness import Progress, arguments, chosen, console, report
from second_order_methods import METHODS, Method, Pair, Problem

from fedllm.seeding import derive_seed

HERE = Path(__file__).resolve().parent
PACKAGES = ("fedllm.strategies.second_order", "fedllm.partition", "fedllm.seeding")
ALPHA = 0.2
VALIDATION = 0.2
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
    """Rounds to the targets (None: not reached), and processor seconds of a round without its evaluation."""

    to_accuracy: int | None
    to_loss: int | None
    seconds_per_round: float
    rounds: int
    best_accuracy: float

    def score(self, limit: int) -> int:
        """What tuning minimises."""
        return (self.to_accuracy or limit + 1) + (self.to_loss or limit + 1)


def pose(digits: mnist.Digits, setting: Setting, pooled: bool, seed: int) -> Problem:
    """The network, and the training examples in the hands of the clients, or all in one for a pooled method."""
    clients = (
        [mnist.Client(digits.train_x, digits.train_y, 1.0)]
        if pooled
        else mnist.deal(digits, setting.clients, ALPHA, seed)
    )
    return Problem(mnist.FlatModel(setting.network, seed), clients, seed, LOCAL_EPOCHS, BATCH_SIZE)


def play(
    digits: mnist.Digits,
    problem: Problem,
    setting: Setting,
    method: Method,
    pair: Pair,
    best: float = math.inf,
) -> Run:
    """Run a method until both targets are reached, the rounds are over, or its score cannot fall below ``best``."""
    model = problem.model
    step, w = method.build(*pair), model.initial
    reached: dict[str, int] = {}
    seconds, top, number = 0.0, 0.0, 0
    for number in range(1, setting.rounds + 1):
        started = time.process_time()
        w = step(problem, w, number)
        seconds += time.process_time() - started
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


def without_test_rows(digits: mnist.Digits) -> mnist.Digits:
    """The training examples alone, the first of them (in random order already) held out in place of the test's."""
    count = round(VALIDATION * len(digits.train_y))
    x, y = digits.train_x, digits.train_y
    return mnist.Digits(digits.name, x[count:], y[count:], x[:count], y[:count])


def tune(
    split: Callable[[int], mnist.Digits],
    setting: Setting,
    method: Method,
    seed: int,
    quick: bool,
    progress: Progress,
) -> None:
    """Try what of the grid has not been tried."""
    trials: list[dict[str, Any]] = progress.content["trials"]
    left = method.trials(setting.network, quick)[len(trials) :]
    if not left:
        return
    digits = without_test_rows(split(seed))
    problem = pose(digits, setting, method.pooled, seed)
    for pair in left:
        best = min((trial["score"] for trial in trials), default=math.inf)
        run = play(digits, problem, setting, method, pair, best)
        trials.append({"pair": pair, "score": run.score(setting.rounds), **asdict(run)})
        progress.write()
        names = ", ".join(f"{name}={value:g}" for name, value in zip(method.names, pair, strict=True))
        console.print(
            f"  trial {names}: accuracy after {_shown(run.to_accuracy)}, loss after {_shown(run.to_loss)} of "
            f"{run.rounds} rounds, {run.rounds * run.seconds_per_round:.0f} s"
        )


def best_pair(progress: Progress) -> Pair:
    """The pair with the best score, the first of equals."""
    first, second = min(progress.content["trials"], key=lambda trial: trial["score"])["pair"]
    return first, second


def tuning_seed(args: Any) -> int:
    """A seed apart from those of the runs that count."""
    return derive_seed(args.seed, "tuning") % 1_000_000


def progress_of(setting: Setting, method: Method, args: Any) -> Progress:
    """What is known of a method in a setting."""
    clients = "pooled" if method.pooled else str(setting.clients)
    name = f"{setting.network}-{clients}-{method.key}{'-quick' if args.quick else ''}.json"
    return Progress(
        Path(args.cache) / name, _identity(setting, method, tuning_seed(args), args.quick), trials=[], runs={}
    )


def known(setting: Setting, method: Method, seeds: Sequence[int], args: Any) -> tuple[Pair, list[Run]] | None:
    """What the cache holds of a method: the pair, and a run for each seed; None unless it is all there."""
    progress = progress_of(setting, method, args)
    runs = progress.content["runs"]
    if len(progress.content["trials"]) < len(method.trials(setting.network, args.quick)):
        return None
    if any(str(seed) not in runs for seed in seeds):
        return None
    return best_pair(progress), [Run(**runs[str(seed)]) for seed in seeds]


def measure(
    split: Callable[[int], mnist.Digits], setting: Setting, method: Method, seeds: Sequence[int], args: Any
) -> None:
    """Tune and run a method, or go on with what its file holds."""
    progress = progress_of(setting, method, args)
    clients = "all" if method.pooled else str(setting.clients)
    console.print(f"[bold]{setting.network}, {clients} clients: {method.title}[/bold]")
    tune(split, setting, method, tuning_seed(args), args.quick, progress)
    pair = best_pair(progress)
    runs = progress.content["runs"]
    for seed in seeds:
        if str(seed) not in runs:
            digits = split(seed)
            run = play(digits, pose(digits, setting, method.pooled, seed), setting, method, pair)
            runs[str(seed)] = asdict(run)
            progress.write()
            console.print(
                f"  seed {seed}: accuracy after {_shown(run.to_accuracy)}, loss after {_shown(run.to_loss)}"
            )


def _identity(setting: Setting, method: Method, seed: int, quick: bool) -> str:
    """What a stored result depends on: targets, grid, seed, torch, and the code that this method runs."""
    targets = (setting.network, setting.accuracy, setting.loss, setting.rounds)
    settings = (targets, method.key, method.trials(setting.network, quick), seed, quick, torch.__version__)
    rows = QUICK_ROWS if quick else None
    starts = (method.build, play, pose, without_test_rows, mnist.load_digits)
    return code_identity(starts, PACKAGES, (settings, rows))


def _shown(rounds: int | None) -> str:
    return "–" if rounds is None else str(rounds)


SETTINGS = (
    Setting("lenet", 20, accuracy=0.90, loss=0.35, rounds=80),
    Setting("lenet", 100, accuracy=0.90, loss=0.35, rounds=80),
    Setting("logistic", 20, accuracy=0.90, loss=0.37, rounds=80),
    Setting("logistic", 100, accuracy=0.90, loss=0.37, rounds=80),
)
QUICK_ROWS = 1250
QUICK_SETTINGS = (
    Setting("lenet", 20, accuracy=0.84, loss=0.55, rounds=40),
    Setting("lenet", 100, accuracy=0.84, loss=0.55, rounds=40),
    Setting("logistic", 20, accuracy=0.84, loss=0.55, rounds=40),
    Setting("logistic", 100, accuracy=0.84, loss=0.55, rounds=40),
)


def work(method: Method, digits: mnist.Digits, setting: Setting, seed: int) -> tuple[float, float]:
    """Gradients, and passes over its examples, of a client in a round (mean over clients)."""
    if method.group != "epochs":
        count = {"one": 1.0, "two": 2.0}[method.group]
        return count, count
    dealt = mnist.deal(digits, setting.clients, ALPHA, seed)
    batches = mean(math.ceil(len(client.y) / BATCH_SIZE) for client in dealt)
    curvature = 2 if method.key == "hybrid" else 0
    return LOCAL_EPOCHS * batches + curvature, float(LOCAL_EPOCHS + curvature)


def summary(method: Method, setting: Setting, runs: Sequence[Run], evaluations: float) -> dict[str, Any]:
    """Figures of a method by the end of their key; rounds are None unless every seed reached the target."""
    figures: dict[str, Any] = {}
    for name, values in (
        ("rounds", [run.to_accuracy for run in runs]),
        ("loss_rounds", [run.to_loss for run in runs]),
    ):
        done = [value for value in values if value is not None]
        whole = len(done) == len(values)
        figures[name] = mean(done) if whole else None
        figures[f"{name}_sd"] = stdev(done) if whole and len(done) > 1 else None
        figures[f"{name}_reached"] = len(done)
    seconds = mean(run.seconds_per_round for run in runs)
    figures["seconds_per_round"] = seconds
    figures["best_accuracy"] = mean(run.best_accuracy for run in runs)
    size = mnist.FlatModel(setting.network, 0).size
    up, down = (count * FLOAT * size * setting.clients / 1e6 for count in method.vectors)
    costs = {"evaluations": evaluations, "seconds": seconds, "megabytes_up": up, "megabytes_down": down}
    for ending, rounds in (("", figures["rounds"]), ("_to_loss", figures["loss_rounds"])):
        figures |= {
            f"{name}{ending}": None if rounds is None else rounds * cost for name, cost in costs.items()
        }
    return figures


def grid_edges(method: Method, network: str, pair: Pair, quick: bool) -> list[str]:
    """The values of a best pair that are the first or last of what was tried, where there was a choice."""
    tried = zip(*method.trials(network, quick), strict=True)
    return [
        f"{name}={value:g}"
        for name, value, values in zip(method.names, pair, tried, strict=True)
        if min(values) != max(values) and value in (min(values), max(values))
    ]


def best_other(results: dict[str, dict[str, Any]]) -> tuple[float | None, str]:
    """Fewest rounds to the accuracy among the covered baselines of at most two gradients a round, and whose."""
    reached = {
        method.key: results[method.key]["rounds"]
        for method in METHODS
        if method.group != "epochs"
        and not method.key.startswith("fagh")
        and method.key in results
        and results[method.key]["rounds"]
    }
    key = min(reached, key=lambda name: reached[name], default="")
    return reached.get(key), key


HEAD = (
    "",
    "gradients a round",
    "rounds to accuracy",
    "rounds to loss",
    "gradients to accuracy / loss",
    "MB up",
    "MB down",
    "seconds",
    "tuned pair",
)
EDGE = "*"


def table(setting: Setting, results: dict[str, dict[str, Any]]) -> list[Sequence[object]]:
    """Rows for the screen, the setting above them."""
    title = (
        f"{setting.network}, {setting.clients} clients: accuracy {setting.accuracy:g}, loss {setting.loss:g}"
    )
    rows: list[Sequence[object]] = [(title, *[""] * (len(HEAD) - 1))]
    for method in METHODS:
        if method.key not in results:
            continue
        found = results[method.key]
        cells = [
            _cell(found[name], found[f"{name}_sd"], found[f"{name}_reached"], found["seeds"], setting.rounds)
            for name in ("rounds", "loss_rounds")
        ]
        costs = [
            " / ".join(
                "–" if cost is None else f"{cost:.0f}" for cost in (found[name], found[f"{name}_to_loss"])
            )
            for name in ("evaluations", "megabytes_up", "megabytes_down", "seconds")
        ]
        pair = ", ".join(
            text + (EDGE if text in found["edges"] else "")
            for text in (f"{n}={v:g}" for n, v in zip(method.names, found["pair"], strict=True))
        )
        rows.append((method.title, f"{found['per_round']:.0f}", *cells, *costs, pair))
    return rows


def _cell(rounds: float | None, spread: float | None, reached: int, seeds: int, limit: int) -> str:
    if rounds is None:
        return f"not in {limit} ({reached} of {seeds} seeds)"
    return f"{rounds:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def headline(
    settings: Sequence[Setting], results: dict[Setting, dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """The figures that the claim is about: LeNet at the fewest clients, and the worst ratios of all settings."""
    first = results[settings[0]]
    figures: dict[str, Any] = {
        f"{name}_rounds": first[name]["rounds"] if name in first else None
        for name in ("fagh", "fagh_paper", "sofim", "fedsgdm", "fedavg", "hybrid")
    }
    figures["best_other_rounds"], figures["best_other"] = best_other(first)
    ratios: dict[str, list[float | None]] = {"fedsgdm": [], "best_other": []}
    for setting in settings:
        found = results[setting]
        ours = found["fagh"]["rounds"] if "fagh" in found else None
        control = found["fedsgdm"]["rounds"] if "fedsgdm" in found else None
        # A control that never arrives needed more rounds than there were; one that is not covered says nothing.
        for name, rounds, covered in (
            ("fedsgdm", control, "fedsgdm" in found),
            ("best_other", best_other(found)[0], len(found) == len(METHODS)),
        ):
            ratios[name].append(
                ours / (rounds or setting.rounds + 1) if ours is not None and covered else None
            )
    for name, values in ratios.items():
        known = [value for value in values if value is not None]
        figures[f"worst_ratio_to_{name}"] = max(known) if len(known) == len(values) else None
    return figures


def main() -> None:
    args = arguments(
        __doc__ or "",
        seeds=5,
        cache=str(HERE / "results" / "second_order"),
        networks="lenet,logistic",
        methods="",
    )
    torch.set_num_threads(1)  # the sums of one thread are the same everywhere
    settings = [
        s for s in (QUICK_SETTINGS if args.quick else SETTINGS) if s.network in args.networks.split(",")
    ]
    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
    wanted = chosen(args.methods, [method.key for method in METHODS], "--methods")
    if not settings:
        raise SystemExit(f"--networks: expected lenet, logistic or both, found {args.networks!r}")

    @lru_cache(maxsize=len(seeds) + 1)
    def split(seed: int) -> mnist.Digits:
        digits = mnist.load_digits(seed)
        rows = QUICK_ROWS if args.quick else len(digits.train_y)
        return mnist.Digits(
            digits.name, digits.train_x[:rows], digits.train_y[:rows], digits.test_x, digits.test_y
        )

    results: dict[Setting, dict[str, dict[str, Any]]] = {setting: {} for setting in settings}
    for setting in settings:
        for method in METHODS:
            if method.key in wanted:
                measure(split, setting, method, seeds, args)
            if (found := known(setting, method, seeds, args)) is None:
                continue
            pair, runs = found
            evaluations, passes = work(method, split(seeds[0]), setting, seeds[0])
            results[setting][method.key] = {
                **summary(method, setting, runs, evaluations),
                "pair": pair,
                "edges": grid_edges(method, setting.network, pair, args.quick),
                "seeds": len(seeds),
                "per_round": evaluations,
                "passes_per_round": passes,
            }
    covered = {setting: ",".join(results[setting]) for setting in settings}
    complete = all(len(results[setting]) == len(METHODS) for setting in settings)
    figures = {
        "data": split(args.seed).name,
        "seeds": len(seeds),
        "complete": complete,
        **headline(settings, results),
    }
    for setting in settings:
        figures[f"{setting.network}_{setting.clients}_methods"] = covered[setting]
        for key, found in results[setting].items():
            prefix = f"{setting.network}_{setting.clients}_{key}"
            figures |= {
                f"{prefix}_{name}": value
                for name, value in found.items()
                if name not in ("pair", "seeds", "edges")
            }
            figures[f"{prefix}_at_edge"] = ", ".join(found["edges"])
            figures |= {
                f"{prefix}_{name}": value
                for name, value in zip(("first", "second"), found["pair"], strict=True)
            }
    rows = [HEAD, *(row for setting in settings for row in table(setting, results[setting]))]
    report(args, figures, rows, f"Second-order updates, {figures['data']}, mean ± sd of {len(seeds)} seeds")
    if any(found["edges"] for methods in results.values() for found in methods.values()):
        console.print(f"{EDGE} the best value stands at the end of its grid: a wider one may do better")
    for setting in settings if not complete else ():
        console.print(
            f"{setting.network}, {setting.clients} clients: covers {covered[setting] or 'nothing'} of "
            f"{len(METHODS)} methods; best_other_rounds is the best of these"
        )


if __name__ == "__main__":
    main()
