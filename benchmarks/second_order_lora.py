"""LoRA on MiniLM, AG News: FAGH and SOFIM against FedAdam at equal client compute, rounds to an accuracy.

Ten clients (Dirichlet 0.5), all in every round, on the library's own client updates and server steps, in one process.
*Equal client compute* is the number of examples that a client sends forward and backward in a round, ``--passes``: a
gradient on that many rows (FedAdam, SOFIM), a gradient and a Hessian product on half as many rows (FAGH, the product
counted like a gradient), local AdamW steps on batches of 16 (FedAdam on adapters), or a gradient, a product and local
SGD steps on a third of the rows (the hybrid, ``fagh-opt``). The rows of a round follow from (seed, round, client), the
same ones for every method; a client's weight is the number of rows that it holds.

``fagh_default`` is FAGH as ``strategy = "fagh"`` has it. Its secant pairs and its damping compare rounds, in which
other rows take part; ``fagh`` and ``fagh_opt`` do without both.

Each method tries the same number of settings of its step size on a seed of its own; a trial is broken off when another
one was as fast. What is finished stands in ``--cache``, one file for each method, whose identity is the configuration
and the code that the method runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from code_identity import code_identity
from fedllm.clients.backprop import Backprop
from fedllm.clients.second_order import BackpropAndHessianRow, FullGradient, GradientAndHessianRow
from fedllm.strategies.second_order.optimizer import flatten, moved, unflatten
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.updates import Sofim
from harness import Progress, arguments, chosen, console, report
from second_order_methods import Adaptive

from fedllm.config import RunConfig
from fedllm.data import client_examples, label_names, test_examples
from fedllm.models import ModelBundle, load_bundle
from fedllm.records import HESSIAN_DIRECTION, HESSIAN_ROW
from fedllm.seeding import derive_seed
from fedllm.tasks import get_task
from fedllm.update import ClientUpdate, TrainJob

HERE = Path(__file__).resolve().parent
CLIENTS, BATCH = 10, 16
PACKAGES = ("fedllm.strategies.second_order", "fedllm.clients", "fedllm.curvature", "fedllm.batches")
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A client update, how many gradients it takes of a row, and the server's step for a step size.

    Attributes:
        title: in the table.
        build: makes the client update.
        gradients_per_row: gradients, and Hessian products, that it takes of a row.
        rates: step sizes that are tried.
        server: makes the update of a run.
        sends_adapters: whether replies are adapters; their moves are read as gradients, against the way they go.
        local_rate: of the clients' SGD; moves are divided by it times the steps. 0: the configuration's, not divided.
    """

    title: str
    build: Callable[[], ClientUpdate]
    gradients_per_row: int
    rates: Sequence[float]
    server: Callable[[float], Any]
    sends_adapters: bool = False
    local_rate: float = 0.0

    @cached_property
    def client(self) -> ClientUpdate:
        """The client update; it keeps nothing between rounds."""
        return self.build()


METHODS = {
    "fedadam": Method(
        "FedAdam on gradients",
        FullGradient,
        1,
        (1e-3, 3e-3, 1e-2),
        lambda rate: Adaptive(rate, 1e-5),
    ),
    "fedadam_local": Method(
        "FedAdam on local steps",
        Backprop,
        1,
        (3e-3, 1e-2, 2e-2),
        lambda rate: Adaptive(rate, 1e-3),
        sends_adapters=True,
    ),
    "sofim": Method("SOFIM", FullGradient, 1, (0.3, 1.0, 3.0), lambda rate: Sofim(eta=rate * 0.1, rho=0.1)),
    "fagh": Method(
        "FAGH, rank-k (ours), fixed damping, no secants",
        GradientAndHessianRow,
        2,
        (3e-3, 1e-2, 2e-2),
        lambda rate: Fagh(rho=1 / rate, secants=False, damping="fixed"),
    ),
    "fagh_default": Method(
        "FAGH, rank-k (ours), default",
        GradientAndHessianRow,
        2,
        (3e-3, 1e-2, 2e-2),
        lambda rate: Fagh(rho=1 / rate),
    ),
    "fagh_opt": Method(
        "FAGH on local SGD steps (ours, hybrid)",
        lambda: BackpropAndHessianRow(optimizer="sgd", max_grad_norm=0.0),
        3,
        (3e-3, 1e-2, 2e-2),
        lambda rate: Fagh(rho=1 / rate, secants=False, damping="fixed"),
        sends_adapters=True,
        local_rate=0.1,
    ),
}


class Federation:
    """The clients of a seed and the model, which they share.

    Args:
        config: of the run.
        passes: examples that a client sends forward and backward in a round.
    """

    def __init__(self, config: RunConfig, passes: int) -> None:
        self.config, self.passes = config, passes
        self.task = get_task(config.task)
        self.bundle: ModelBundle = load_bundle(config, label_names(config))
        tokenizer = self.bundle.tokenizer
        self.clients = [client_examples(config, tokenizer, index, CLIENTS) for index in range(CLIENTS)]
        found = test_examples(config, tokenizer)
        assert found is not None
        self.test = found

    def round(self, method: Method, server: Any, state: State, number: int) -> State:
        """The next adapter."""
        asked = server.request() if isinstance(server, Fagh) else None
        inputs = {} if asked is None else {HESSIAN_DIRECTION: unflatten(asked, state)}
        total, row, weight = torch.zeros(()), torch.zeros(()), 0
        losses: dict[str, tuple[float, float]] = {}
        train = self.config.train.model_copy(update={"local_epochs": 1.0, "local_steps": 0})
        if method.local_rate:
            rates = {"learning_rate": method.local_rate, "head_learning_rate": method.local_rate}
            train = train.model_copy(update=rates)
        for index, examples in enumerate(self.clients):
            seed = derive_seed(self.config.seed, number, str(index))
            count = min(self.passes // method.gradients_per_row, len(examples))
            drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
            self.bundle.load_adapter_state(state)
            result = method.client.run(
                TrainJob(
                    self.bundle,
                    self.task,
                    examples.select(drawn),
                    train,
                    seed,
                    number,
                    str(index),
                    state,
                    inputs=inputs,
                )
            )
            arrays = flatten(result.arrays, state)
            if method.sends_adapters:
                arrays = flatten(state, state) - arrays
                if method.local_rate:
                    arrays /= method.local_rate * result.metrics["steps"]
            total = total + len(examples) * arrays
            losses[str(index)] = (float(len(examples)), result.loss)
            if asked is not None:
                row = row + len(examples) * flatten(result.extras[HESSIAN_ROW], state)
            weight += len(examples)
        if isinstance(server, Fagh):
            step = server.step(total / weight, None if asked is None else row / weight, asked, losses)
        else:
            step = server.step(total / weight)
        return moved(state, step)

    def judge(self, state: State) -> Mapping[str, float]:
        """Metrics on the test rows."""
        self.bundle.load_adapter_state(state)
        size = self.config.server.evaluate_batch_size
        pad = self.bundle.tokenizer.pad_token_id
        return self.task.evaluate(self.bundle.model, self.test, size, pad, self.bundle.device)


def play(
    federation: Federation, method: Method, rate: float, target: float, rounds: int, label: str
) -> dict[str, Any]:
    """Run until the target is reached or the rounds are over."""
    state, server = dict(federation.bundle.initial_state), method.server(rate)
    accuracies: list[float] = []
    seconds = 0.0
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        state = federation.round(method, server, state, number)
        seconds += time.perf_counter() - started
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
            break
        metrics = federation.judge(state)
        accuracies.append(metrics["accuracy"])
        console.print(
            f"  {label} round {number}: accuracy {metrics['accuracy']:.3f}, loss {metrics['loss']:.3f}"
        )
        if accuracies[-1] >= target or not metrics["loss"] < 20:
            break
    reached = len(accuracies) if accuracies and accuracies[-1] >= target else None
    return {
        "rounds": reached,
        "best": max(accuracies, default=0.0),
        "seconds_per_round": seconds / max(len(accuracies), 1),
    }


def configuration(args: Any, seed: int, quick: bool) -> RunConfig:
    """The setting of examples/ag_news, with all clients."""
    folder = Path(args.data).expanduser().resolve()
    return RunConfig.from_flat(
        {
            "seed": seed,
            "model.name": args.model,
            "model.device": "cpu",
            "data.source": str(folder / "train.csv"),
            "data.test-file": str(folder / "test.csv"),
            "data.text-column": "text",
            "data.label-column": "label",
            "data.max-length": 24 if quick else 32,
            "data.test-rows": 300 if quick else 500,
            "data.partitioner": "dirichlet",
            "data.alpha": 0.5,
            "data.min-partition-size": args.passes,
            "train.learning-rate": 3e-3,
            "train.head-learning-rate": 1e-2,
            "train.batch-size": BATCH,
        }
    )


def identity_of(method: Method, args: Any, limits: tuple[int, int, float]) -> str:
    """What the stored results of a method depend on: configuration, data, torch, and the code that it runs."""
    flat = configuration(args, args.seed, args.quick).to_flat()
    files = [
        (Path(name).name, Path(name).stat().st_size) for name in (flat["data.source"], flat["data.test-file"])
    ]
    settings = sorted((k, v) for k, v in flat.items() if k not in ("data.source", "data.test-file"))
    method_settings = (method.rates, method.gradients_per_row, method.sends_adapters, method.local_rate)
    return code_identity(
        (method.build, method.server, Federation, play),
        PACKAGES,
        (settings, files, limits, args.quick, method_settings, CLIENTS, BATCH, torch.__version__),
    )


def main() -> None:
    args = arguments(
        __doc__ or "",
        data=str(HERE.parents[1] / "shared" / "data" / "ag_news"),
        model="packaged:minilm",
        passes=64,
        seeds=3,
        rounds=30,
        target=0.85,
        methods=",".join(METHODS),
        cache=str(HERE / "results" / "second_order_lora"),
    )
    if args.passes % (2 * BATCH):
        raise SystemExit(f"--passes: expected a multiple of {2 * BATCH}, found {args.passes}")
    if missing := [n for n in ("train.csv", "test.csv") if not (Path(args.data).expanduser() / n).is_file()]:
        raise SystemExit(f"not found: {', '.join(missing)} in {args.data}; pass --data FOLDER with AG News")
    methods = chosen(args.methods, list(METHODS), "--methods")
    quick: bool = args.quick
    passes, rounds, target = (32, 12, 0.7) if quick else (args.passes, args.rounds, args.target)
    args.passes = passes
    seeds = range(args.seed, args.seed + (1 if quick else args.seeds))
    tuning = derive_seed(args.seed, "tuning") % 1_000_000
    figures: dict[str, Any] = {"target": target, "passes_per_client": passes, "seeds": len(seeds)}
    rows: list[Sequence[object]] = [("", f"rounds to {target:g}", "best accuracy", "seconds a round", "rate")]
    for key in methods:
        method = METHODS[key]
        identity = identity_of(method, args, (passes, rounds, target))
        path = Path(args.cache) / f"{key}{'-quick' if quick else ''}.json"
        progress = Progress(path, identity, trials={}, runs={})
        known = progress.content
        console.print(f"[bold]{method.title}[/bold]")
        for rate in method.rates[1:2] if quick else method.rates:
            if f"{rate:g}" not in known["trials"]:
                federation = Federation(configuration(args, tuning, quick), passes)
                limit = min([rounds, *(t["rounds"] for t in known["trials"].values() if t["rounds"])])
                known["trials"][f"{rate:g}"] = play(
                    federation, method, rate, target, limit, f"trial {rate:g}"
                )
                progress.write()
        best = min(
            known["trials"],
            key=lambda r: (known["trials"][r]["rounds"] or math.inf, -known["trials"][r]["best"]),
        )
        for seed in seeds:
            if str(seed) not in known["runs"]:
                federation = Federation(configuration(args, seed, quick), passes)
                known["runs"][str(seed)] = play(
                    federation, method, float(best), target, rounds, f"seed {seed}"
                )
                progress.write()
        runs = [known["runs"][str(seed)] for seed in seeds]
        done = [run["rounds"] for run in runs if run["rounds"] is not None]
        whole = len(done) == len(runs)
        figures |= {
            f"{key}_rounds": mean(done) if whole else None,
            f"{key}_rounds_sd": stdev(done) if whole and len(done) > 1 else None,
            f"{key}_reached": len(done),
            f"{key}_best_accuracy": mean(run["best"] for run in runs),
            f"{key}_seconds_per_round": mean(run["seconds_per_round"] for run in runs),
            f"{key}_rate": float(best),
        }
        shown = f"{mean(done):.1f}" if whole else f"not in {rounds} ({len(done)} of {len(runs)} seeds)"
        rows.append(
            (method.title, shown, figures[f"{key}_best_accuracy"], figures[f"{key}_seconds_per_round"], best)
        )
    report(
        args, figures, rows, f"AG News, {args.model} with LoRA, {CLIENTS} clients, {passes} passes a round"
    )


if __name__ == "__main__":
    main()
