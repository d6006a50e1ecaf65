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

import ast
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import mnist
import torch
from fedllm.strategies import second_order
from harness import arguments, console, report
from second_order_methods import METHODS, Method, Pair, Problem

from fedllm.seeding import derive_seed

HERE = Path(__file__).resolve().parent
LIBRARY = Path(second_order.__file__).parent
MODULES = (
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


class Progress:
    """What is known of a method in a setting, in a file that is written after every run.

    Args:
        path: the file.
        identity: what the results depend on; a file with another one is begun anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": identity, "trials": [], "runs": {}}
        if path.is_file() and (stored := json.loads(path.read_text()))["identity"] == identity:
            self.content = stored

    def write(self) -> None:
        """Replace the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1))
        temporary.replace(self.path)


def tune(
    digits: mnist.Digits, setting: Setting, method: Method, seed: int, quick: bool, progress: Progress
) -> Pair:
    """Try what of the grid has not been tried; the best pair, the first of equals."""
    trials: list[dict[str, Any]] = progress.content["trials"]
    for pair in method.trials(setting.network, quick)[len(trials) :]:
        best = min((trial["score"] for trial in trials), default=math.inf)
        run = play(digits, setting, method, pair, seed, best)
        trials.append({"pair": pair, "score": run.score(setting.rounds), **asdict(run)})
        progress.write()
        names = ", ".join(f"{name}={value:g}" for name, value in zip(method.names, pair, strict=True))
        console.print(
            f"  trial {names}: accuracy after {_shown(run.to_accuracy)}, loss after {_shown(run.to_loss)} of "
            f"{run.rounds} rounds, {run.rounds * run.seconds_per_round:.0f} s"
        )
    first, second = min(trials, key=lambda trial: trial["score"])["pair"]
    return first, second


def measure(
    split: Callable[[int], mnist.Digits], setting: Setting, method: Method, seeds: Sequence[int], args: Any
) -> tuple[Pair, list[Run]]:
    """Tune and run a method, or go on with what its file holds; the pair, and a run for each seed."""
    clients = "pooled" if method.pooled else str(setting.clients)
    name = f"{setting.network}-{clients}-{method.key}{'-quick' if args.quick else ''}.json"
    tuning_seed = derive_seed(args.seed, "tuning") % 1_000_000
    progress = Progress(Path(args.cache) / name, _identity(setting, method, tuning_seed, args.quick))
    console.print(f"[bold]{setting.network}, {clients} clients: {method.title}[/bold]")
    pair = tune(split(tuning_seed), setting, method, tuning_seed, args.quick, progress)
    runs = progress.content["runs"]
    for seed in seeds:
        if str(seed) not in runs:
            run = play(split(seed), setting, method, pair, seed)
            runs[str(seed)] = asdict(run)
            progress.write()
            console.print(
                f"  seed {seed}: accuracy after {_shown(run.to_accuracy)}, loss after {_shown(run.to_loss)}"
            )
    return pair, [Run(**runs[str(seed)]) for seed in seeds]


def _identity(setting: Setting, method: Method, seed: int, quick: bool) -> str:
    """What a stored result depends on: targets, grid, seed, torch, and the code without its comments."""
    targets = (setting.network, setting.accuracy, setting.loss, setting.rounds)
    settings = (targets, ALPHA, LOCAL_EPOCHS, BATCH_SIZE, method.key, method.trials(setting.network, quick))
    digest = hashlib.blake2b(repr((settings, seed, quick, torch.__version__)).encode(), digest_size=8)
    for path in [HERE / "mnist.py", HERE / "second_order_methods.py"] + [LIBRARY / name for name in MODULES]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


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
    rounds = figures["rounds"]
    size = mnist.FlatModel(setting.network, 0).size
    up, down = (count * FLOAT * size * setting.clients / 1e6 for count in method.vectors)
    figures["evaluations"] = None if rounds is None else rounds * evaluations
    figures["seconds"] = None if rounds is None else rounds * seconds
    figures["megabytes_up"] = None if rounds is None else rounds * up
    figures["megabytes_down"] = None if rounds is None else rounds * down
    return figures


def best_other(results: dict[str, dict[str, Any]]) -> tuple[float | None, str]:
    """Fewest rounds to the accuracy among the baselines of at most two gradients a round, and whose."""
    reached = {
        method.key: results[method.key]["rounds"]
        for method in METHODS
        if method.group != "epochs" and not method.key.startswith("fagh") and results[method.key]["rounds"]
    }
    key = min(reached, key=lambda name: reached[name], default="")
    return reached.get(key), key


HEAD = (
    "",
    "gradients a round",
    "rounds to accuracy",
    "rounds to loss",
    "gradients",
    "MB up",
    "MB down",
    "seconds",
    "tuned pair",
)


def table(setting: Setting, results: dict[str, dict[str, Any]]) -> list[Sequence[object]]:
    """Rows for the screen, the setting above them."""
    title = (
        f"{setting.network}, {setting.clients} clients: accuracy {setting.accuracy:g}, loss {setting.loss:g}"
    )
    rows: list[Sequence[object]] = [(title, *[""] * (len(HEAD) - 1))]
    for method in METHODS:
        found = results[method.key]
        cells = [
            _cell(found[name], found[f"{name}_sd"], found[f"{name}_reached"], found["seeds"], setting.rounds)
            for name in ("rounds", "loss_rounds")
        ]
        costs = [
            "–" if found[name] is None else f"{found[name]:.0f}"
            for name in ("evaluations", "megabytes_up", "megabytes_down", "seconds")
        ]
        pair = ", ".join(f"{n}={v:g}" for n, v in zip(method.names, found["pair"], strict=True))
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
        f"{name}_rounds": first[name]["rounds"]
        for name in ("fagh", "fagh_paper", "sofim", "fedsgdm", "fedavg", "hybrid")
    }
    figures["best_other_rounds"], figures["best_other"] = best_other(first)
    ratios: dict[str, list[float | None]] = {"fedsgdm": [], "best_other": []}
    for setting in settings:
        found = results[setting]
        ours, control, other = found["fagh"]["rounds"], found["fedsgdm"]["rounds"], best_other(found)[0]
        # A control that never arrives needed more rounds than there were.
        ratios["fedsgdm"].append(None if ours is None else ours / (control or setting.rounds + 1))
        ratios["best_other"].append(None if ours is None else ours / (other or setting.rounds + 1))
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
    wanted = args.methods.split(",") if args.methods else [method.key for method in METHODS]
    if unknown := set(wanted) - {method.key for method in METHODS}:
        raise SystemExit(f"--methods: unknown {', '.join(sorted(unknown))}")
    if not settings:
        raise SystemExit(f"--networks: expected lenet, logistic or both, found {args.networks!r}")

    def split(seed: int) -> mnist.Digits:
        digits = mnist.load_digits(seed)
        rows = QUICK_ROWS if args.quick else len(digits.train_y)
        return mnist.Digits(
            digits.name, digits.train_x[:rows], digits.train_y[:rows], digits.test_x, digits.test_y
        )

    results: dict[Setting, dict[str, dict[str, Any]]] = {setting: {} for setting in settings}
    for setting in settings:
        for method in METHODS:
            if method.key not in wanted:
                continue
            pair, runs = measure(split, setting, method, seeds, args)
            evaluations, passes = work(method, split(seeds[0]), setting, seeds[0])
            results[setting][method.key] = {
                **summary(method, setting, runs, evaluations),
                "pair": pair,
                "seeds": len(seeds),
                "per_round": evaluations,
                "passes_per_round": passes,
            }
    if len(wanted) < len(METHODS):
        console.print("--methods: the parts stand in the cache; run without it for the table")
        return
    figures = {"data": split(args.seed).name, "seeds": len(seeds), **headline(settings, results)}
    for setting in settings:
        for key, found in results[setting].items():
            prefix = f"{setting.network}_{setting.clients}_{key}"
            figures |= {
                f"{prefix}_{name}": value for name, value in found.items() if name not in ("pair", "seeds")
            }
            figures |= {
                f"{prefix}_{name}": value
                for name, value in zip(("first", "second"), found["pair"], strict=True)
            }
    rows = [HEAD, *(row for setting in settings for row in table(setting, results[setting]))]
    report(args, figures, rows, f"Second-order updates, {figures['data']}, mean ± sd of {len(seeds)} seeds")


if __name__ == "__main__":
    main()
