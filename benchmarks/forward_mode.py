"""AG News within equal time: forward mode against zeroth order and back-propagation, by fedllm's own clients.

Every method gets the same model, adapter, heads, data, clients and seconds. A round runs in this process, one client
after the other: the strategy's messages go to the code that Flower's ClientApp calls, so that nothing but computing is
timed, and a process that another one slows down loses nothing: the budget is the processor time of one thread, which is
wall-clock time on an idle core. Evaluation is not counted.

Finished runs are kept in ``--partial FILE`` and not repeated. Learning rates are each method's own: the paper's preset
has the largest of the paper's grid, back-propagation that of examples/ag_news. One row trains the heads alone:
what Spry has beyond it comes from forward mode, since both differentiate heads exactly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from federation import Federation, pretend_to_be_flower
from harness import Finished, arguments, chosen, console, report

from fedllm import registry
from fedllm.config import RunConfig, Scalar
from fedllm.data import load_client_rows
from fedllm.records import encode

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, FEW_CLIENTS, PER_ROUND = 100, 40, 10
COMMON: dict[str, Scalar] = {
    "task": "sequence-classification",
    "model.name": "packaged:minilm",
    "model.device": "cpu",
    "lora.rank": 1,
    "lora.alpha": 1.0,
    "lora.target-modules": "query,value",
    "data.max-length": 64,
    "data.partitioner": "dirichlet",
    "train.batch-size": 8,
    "train.local-steps": 5,
}
"""As in the paper: LoRA of rank 1 and α = 1 on query and value, batches of 8, ten of 100 clients a round. Five steps a
round: about 13, an epoch of one of the paper's clients, let clients that differ this much drift apart. With a
concentration of 0.1 no draw gives each of 100 clients a row: there it is ten of 40."""


@dataclass(frozen=True)
class Method:
    """One row of the table: a strategy, a client update, and their settings."""

    title: str
    strategy: str
    client: str
    settings: Mapping[str, Scalar] = field(default_factory=dict)


METHODS = {
    "spry": Method(
        "Spry, ours",
        "spry",
        "forward-ad",
        {"train.learning-rate": 0.3, "train.head-learning-rate": 3.0},
    ),
    "spry_paper": Method(
        "Spry, paper's preset",
        "spry",
        "forward-ad",
        {"spry.preset": "paper", "train.learning-rate": 1e-3},
    ),
    "heads": Method(
        "heads alone, exactly, otherwise as Spry, ours",
        "spry",
        "backprop-top-k",
        {
            "backprop-top-k.blocks": 0,
            "backprop-top-k.optimizer": "sgd",
            "backprop-top-k.max-grad-norm": 0.0,
            "train.head-learning-rate": 3.0,
        },
    ),
    "fedmezo": Method("FedMeZO", "fedavg", "zeroth-order", {"train.learning-rate": 1e-2}),
    "fwdllm": Method(
        "FwdLLM",
        "spry",
        "fwdllm",
        {
            "spry.dealing": "all",
            "spry.server": "sgd",
            "spry.send-direction": True,
            "train.learning-rate": 1e-1,
        },
    ),
    "backprop_checkpointed": Method(
        "back-propagation, checkpointed",
        "fedavg",
        "backprop-checkpointed",
        {"train.learning-rate": 3e-3, "train.head-learning-rate": 1e-2},
    ),
    "backprop": Method(
        "back-propagation",
        "fedavg",
        "backprop",
        {"train.learning-rate": 3e-3, "train.head-learning-rate": 1e-2},
    ),
}
ZEROTH_ORDER = ("fedmezo", "fwdllm")


@dataclass(frozen=True)
class Outcome:
    """What a run reached.

    Attributes:
        accuracy: on the test rows after the last round.
        rounds: finished within the budget.
        steps: local steps of all clients together.
        bytes_up: sent by all clients together.
        curve: seconds used and accuracy, at some of the rounds.
    """

    accuracy: float
    rounds: int
    steps: int
    bytes_up: int
    curve: list[tuple[float, float]]


def run(config: RunConfig, seconds: float, looks: int = 4) -> Outcome:
    """Rounds until the budget is spent; the one that crosses it still counts, for every method alike.

    Args:
        config: of the run.
        seconds: the budget, of processor time.
        looks: evaluations, evenly over the budget.
    """
    federation = Federation(config, clients_of(config.data.alpha))
    arrays = encode(federation.bundle.initial_state)
    federation.first_client(arrays)  # warms up caches and checks the model, and is then forgotten
    federation = Federation(config, clients_of(config.data.alpha))
    used, rounds, due = 0.0, 0, seconds / looks
    curve = []
    while used < seconds:
        started = time.process_time()
        rounds += 1
        arrays = federation.round(rounds, arrays)
        used += time.process_time() - started
        if used >= min(due, seconds):
            curve.append((used, federation.accuracy(arrays)))
            due += seconds / looks
    return Outcome(curve[-1][1], rounds, federation.steps, federation.bytes_up, curve)


def clients_of(alpha: float) -> int:
    """How many clients there are at a concentration."""
    return CLIENTS if alpha >= 1 else FEW_CLIENTS


def configuration(method: Method, data: Path, alpha: float, seed: int, test_rows: int) -> RunConfig:
    """The configuration of one run."""
    config = registry.config_from_flat(
        {
            **COMMON,
            "strategy": method.strategy,
            "client": method.client,
            "seed": seed,
            "data.source": str(data / "train.csv"),
            "data.test-file": str(data / "test.csv"),
            "data.alpha": alpha,
            "data.min-partition-size": 8 if alpha >= 1 else 1,
            "server.fraction-train": PER_ROUND / clients_of(alpha),
            "data.test-rows": test_rows,
            **method.settings,
        }
    )
    registry.check(config)
    return config


def planned(seed: int, quick: bool) -> Iterator[tuple[float, int]]:
    """Concentration and seed of every run of a method."""
    for offset in range(1 if quick else 3):
        yield 1.0, seed + offset
    yield 0.1, seed


def main() -> None:
    args = arguments(
        __doc__ or "",
        data=str(ROOT.parent / "shared" / "data" / "ag_news"),
        minutes=5.0,
        partial="",
        only="",
        test_rows=2000,
    )
    data = Path(args.data).expanduser().resolve()
    if missing := [str(data / name) for name in ("train.csv", "test.csv") if not (data / name).is_file()]:
        raise SystemExit(
            f"not found: {', '.join(missing)}; pass --data FOLDER with AG News as train.csv and test.csv "
            "(columns text and label)"
        )
    names = chosen(args.only, list(METHODS), "--only")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # a client takes one thread for each processor
    pretend_to_be_flower()
    test_rows = 500 if args.quick else args.test_rows
    for alpha, seed in planned(args.seed, args.quick):  # before hours are spent
        load_client_rows(configuration(METHODS[names[0]], data, alpha, seed, test_rows), 0, clients_of(alpha))
    minutes = min(args.minutes, 0.5) if args.quick else args.minutes
    finished = Finished(args.partial)
    outcomes: dict[str, dict[tuple[float, int], Outcome]] = {name: {} for name in names}
    for alpha, seed in planned(args.seed, args.quick):
        for name in names:
            config = configuration(METHODS[name], data, alpha, seed, test_rows)
            settings = {**config.to_flat(), "minutes": minutes}
            found = finished.get(settings)
            curve = not args.quick and (alpha, seed) == (1.0, args.seed)  # the one whose course is reported
            outcome = (
                run(config, 60 * minutes, looks=4 if curve else 1) if found is None else Outcome(**found)
            )
            finished.put(settings, asdict(outcome))
            outcomes[name][alpha, seed] = outcome
            console.print(
                f"{name}, alpha {alpha}, seed {seed}: accuracy {outcome.accuracy:.3f} after {outcome.rounds} rounds, "
                f"{outcome.steps} steps"
            )
    figures = summarise(outcomes, args.seed)
    rows = [
        ("", "alpha 1.0", "alpha 0.1", "rounds", "kB up per round and client"),
        *(
            (
                METHODS[name].title,
                figures[f"{name}_accuracy"],
                figures[f"{name}_accuracy_alpha_01"],
                figures[f"{name}_rounds"],
                figures[f"{name}_kilobytes_up"],
            )
            for name in names
        ),
    ]
    report(
        args,
        {"minutes": minutes, **figures},
        rows,
        f"AG News, MiniLM, accuracy after {minutes:g} minutes of one thread",
    )


def summarise(outcomes: Mapping[str, Mapping[tuple[float, int], Outcome]], seed: int) -> dict[str, Any]:
    """Flat figures: means over seeds, and every run by itself."""
    figures: dict[str, Any] = {}
    for name, of_method in outcomes.items():
        alike = {s: outcome for (alpha, s), outcome in of_method.items() if alpha == 1.0}
        first = alike[seed]
        figures |= {
            f"{name}_accuracy": mean(outcome.accuracy for outcome in alike.values()),
            f"{name}_accuracy_alpha_01": of_method[0.1, seed].accuracy,
            f"{name}_rounds": first.rounds,
            f"{name}_steps": first.steps,
            f"{name}_kilobytes_up": first.bytes_up / first.rounds / PER_ROUND / 1000,
            **{f"{name}_accuracy_seed_{s}": outcome.accuracy for s, outcome in alike.items()},
            **{f"{name}_accuracy_at_{round(t)}_s": value for t, value in first.curve},
        }
    zeroth = [name for name in ZEROTH_ORDER if name in outcomes]
    if zeroth:
        figures["best_zeroth_order_accuracy"] = max(figures[f"{name}_accuracy"] for name in zeroth)
    return figures


if __name__ == "__main__":
    main()
