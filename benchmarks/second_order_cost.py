"""What the second order costs: a client's Hessian row beside a gradient step, and a server's update of many parameters.

Clients: ``fedllm.curvature.gradient_and_hvp`` with and without a direction, in turn, on a language model with LoRA and
on a LeNet-size network; the medians of the seconds, and the most bytes of tensors that live at a time beyond the model
and its batch. Server: one ``step`` of an update on ``--parameters`` numbers in float32, the median of some. Its vectors
are what ``step`` is given, what the update holds between rounds, and what lives at a time in between, in units of
4 × parameters bytes. Those of a whole round, on ``--fagh-parameters`` in 100 tensors, also count the model, the float64
sums of the replies and one decoded reply, but no messages. Rank-k FAGH holds two vectors for every product and is
measured on ``--fagh-parameters``. Seconds are scaled to 100 million parameters, in which all updates are linear.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import mnist
import torch
from fedllm.strategies.second_order.fagh import FAGH
from fedllm.strategies.second_order.fagh_optimizer import FaghOptimizer
from fedllm.strategies.second_order.rank_k import Fagh
from fedllm.strategies.second_order.strategies import SOFIM, GradientStrategy
from fedllm.strategies.second_order.updates import FaghPaper, Sofim
from flwr.app import RecordDict
from harness import arguments, console, report
from torch import Tensor
from torch.nn import functional as F

from fedllm import registry
from fedllm.accumulate import Reply
from fedllm.curvature import gradient_and_hvp
from fedllm.live_memory import LiveMemory
from fedllm.models import load_bundle
from fedllm.records import HESSIAN_ROW, encode
from fedllm.tasks import get_task

SCALE = 100_000_000
FLOAT = 4  # bytes
MIB = 2**20


@dataclass(frozen=True)
class Client:
    """A loss, what it depends on, and one batch."""

    title: str
    loss: Callable[[Any], Tensor]
    parameters: Mapping[str, Tensor]
    batch: Any
    held: list[Tensor]

    def step(self, direction: Mapping[str, Tensor] | None) -> None:
        """The gradient, and the Hessian's product with a direction if there is one."""
        gradient_and_hvp(self.loss, self.parameters, [(self.batch, 1.0)], direction)


def language_model(name: str, rows: int, length: int, seed: int) -> Client:
    """A classifier with LoRA as a run trains it, and random tokens."""
    config = registry.config_from_flat({"model.name": name, "model.device": "cpu", "seed": seed})
    bundle = load_bundle(config, ("a", "b", "c", "d"))
    task = get_task("sequence-classification")
    bundle.model.eval()
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(5, 1000, (rows, length), generator=generator)
        % bundle.model.config.vocab_size,
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "labels": torch.randint(0, 4, (rows,), generator=generator),
    }
    held = [*bundle.model.parameters(), *bundle.model.buffers(), *batch.values()]
    title = f"{name} with LoRA, {rows}×{length} tokens"
    return Client(title, lambda b: task.loss(bundle.model, b), bundle.trainable(), batch, held)


def lenet(rows: int, seed: int) -> Client:
    """The network of ``second_order.py`` on random images."""
    module = mnist.FlatModel("lenet", seed).module
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(rows, 1, 28, 28, generator=generator),
        torch.randint(0, 10, (rows,), generator=generator),
    )
    parameters = dict(module.named_parameters())
    held = [*parameters.values(), x, y]
    return Client(
        f"LeNet, {rows} images", lambda b: F.cross_entropy(module(b[0]), b[1]), parameters, (x, y), held
    )


def measure_client(client: Client, repeats: int, seed: int) -> dict[str, float]:
    """Medians of interleaved repeats, and peaks; of a gradient, of gradient and row, and their ratios."""
    generator = torch.Generator().manual_seed(seed)
    row = {name: torch.randn(p.shape, generator=generator) for name, p in client.parameters.items()}
    directions: dict[str, Mapping[str, Tensor] | None] = {"gradient": None, "row": row}
    figures: dict[str, float] = {}
    for name, direction in directions.items():
        memory = LiveMemory()
        memory.ignore([*client.held, *row.values()])
        gc.collect()
        with memory:
            client.step(direction)
        figures[f"{name}_peak_bytes"] = memory.peak
    times: dict[str, list[float]] = {name: [] for name in directions}
    for _ in range(repeats):
        for name, direction in directions.items():
            started = time.perf_counter()
            client.step(direction)
            times[name].append(time.perf_counter() - started)
    figures |= {f"{name}_seconds": median(values) for name, values in times.items()}
    for what in ("seconds", "peak"):
        unit = "_bytes" if what == "peak" else ""
        figures[f"row_over_gradient_{what}"] = (
            figures[f"row_{what}{unit}"] / figures[f"gradient_{what}{unit}"]
        )
    return figures


def tensors_in(state: object) -> Iterator[Tensor]:
    """All tensors of a state dict."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list):
        for value in state:
            yield from tensors_in(value)


class Quadratic:
    """Rounds of an update on ½ Σ hᵢ wᵢ², as a server sees them; no more vectors than it needs."""

    def __init__(self, update: Any, parameters: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.update, self.parameters = update, parameters
        self.h = torch.rand(parameters, generator=generator).add_(0.1)
        self.gradient = torch.randn(parameters, generator=generator)

    def given(self) -> dict[str, Any]:
        """What the next step is given."""
        losses = {"a": (1.0, 1.0)}
        if isinstance(self.update, Sofim):
            return {"gradient": self.gradient, "losses": losses}
        asked = self.update.request()
        row = None if asked is None else self.h if isinstance(asked, int) else self.h * asked
        return {"gradient": self.gradient, "row": row, "direction": asked, "losses": losses}

    def round(self) -> tuple[float, float]:
        """Wall and processor seconds of a step."""
        given = self.given()
        wall, processor = time.perf_counter(), time.process_time()
        step = self.update.step(**given)
        times = time.perf_counter() - wall, time.process_time() - processor
        self.gradient.addcmul_(self.h, step)
        return times

    def vectors(self) -> float:
        """The most that lives at a time during a step, in vectors."""
        given = self.given()
        held = [*tensors_in(given), *tensors_in(self.update.state_dict())]
        held = list({tensor.untyped_storage()._cdata: tensor for tensor in held}.values())
        memory = LiveMemory()
        memory.ignore(held)
        with memory:
            self.update.step(**given)
        return (sum(tensor.nbytes for tensor in held) + memory.peak) / (FLOAT * self.parameters)


def measure_update(
    build: Callable[[], Any], parameters: int, warm: int, repeats: int, seed: int
) -> dict[str, float]:
    """Medians of the seconds of a step, scaled, and its vectors, after ``warm`` rounds."""
    server = Quadratic(build(), parameters, seed)
    for _ in range(warm):
        server.round()
    times = [server.round() for _ in range(repeats)]
    factor = SCALE / parameters
    return {
        "100m_seconds": median(wall for wall, _ in times) * factor,
        "100m_cpu_seconds": median(processor for _, processor in times) * factor,
        "vectors_peak": server.vectors(),
    }


def round_vectors(strategy: GradientStrategy, parameters: int, warm: int, seed: int) -> float:
    """The most that lives at a time while two replies are folded and a step is taken, in vectors, after some rounds."""
    names, generator = [f"tensor-{index}" for index in range(100)], torch.Generator().manual_seed(seed)
    optimizer = strategy.server_optimizer
    assert optimizer is not None

    def random() -> dict[str, Tensor]:
        return {name: torch.randn(parameters // 100, generator=generator) for name in names}

    def play(current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(optimizer, FaghOptimizer):
            optimizer.ask(current)
        folding = strategy.accumulator()
        for node, row in enumerate(rows):
            folding.add(Reply(f"node-{node}", 1.0, random(), {"loss": 1.0}, row))
        return optimizer.step(1, current, folding.result())

    rows = [RecordDict({HESSIAN_ROW: encode(random())}) for _ in range(2)]
    current = random()
    for _ in range(warm):
        current = play(current)
    held = [*current.values(), *tensors_in(optimizer.state_dict())]
    held = list({tensor.untyped_storage()._cdata: tensor for tensor in held}.values())
    memory = LiveMemory()
    memory.ignore(held)
    with memory:
        play(current)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in held)
    return (kept + memory.peak) / (FLOAT * parameters)


def main() -> None:
    args = arguments(
        __doc__ or "",
        model="packaged:minilm",
        repeats=9,
        parameters=100_000_000,
        fagh_parameters=5_000_000,
        memory=20,
        threads=0,
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.repeats, args.parameters, args.fagh_parameters = 3, 10_000_000, 500_000
    figures: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "parameters": args.parameters,
        "fagh_parameters": args.fagh_parameters,
        "fagh_memory": args.memory,
    }
    rows: list[list[object]] = [
        ["client", "gradient s", "with row s", "/", "gradient MiB", "with row MiB", "/"]
    ]
    clients = {
        "lora": lambda: language_model(args.model, 16, 48, args.seed),
        "lenet": lambda: lenet(400, args.seed),
    }
    for key, build in clients.items():
        client = build()
        found = measure_client(client, args.repeats, args.seed)
        figures |= {f"{key}_{name}": value for name, value in found.items()}
        rows.append(
            [
                client.title,
                found["gradient_seconds"],
                found["row_seconds"],
                found["row_over_gradient_seconds"],
                found["gradient_peak_bytes"] / MIB,
                found["row_peak_bytes"] / MIB,
                found["row_over_gradient_peak"],
            ]
        )
    for name in ("row_over_gradient_seconds", "row_over_gradient_peak"):
        figures[name] = max(figures[f"{key}_{name}"] for key in clients)
    lines: list[list[object]] = [
        ["server update", "seconds at 100 M", "CPU seconds", "vectors at the peak", "of a round"]
    ]
    updates: list[tuple[str, str, Callable[[], Any], GradientStrategy, int, int]] = [
        ("fagh_paper", "FAGH as published", FaghPaper, FAGH(preset="paper"), args.parameters, 2),
        ("sofim", "SOFIM", Sofim, SOFIM(), args.parameters, 2),
        # A round brings a product that was asked for, and a secant.
        (
            "fagh",
            f"FAGH, k = {args.memory} (ours)",
            lambda: Fagh(memory=args.memory),
            FAGH(memory=args.memory),
            args.fagh_parameters,
            args.memory,
        ),
    ]
    for key, title, make, strategy, parameters, warm in updates:
        found = measure_update(make, parameters, warm, max(args.repeats // 3, 1), args.seed)
        found["round_vectors_peak"] = round_vectors(strategy, args.fagh_parameters, warm, args.seed)
        figures |= {f"{key}_{name}": value for name, value in found.items()}
        lines.append([title, *found.values()])
    console.print(f"{figures['threads']} threads")
    report(args, figures, rows, "A client's step")
    args.json = None
    report(args, {}, lines, "A server's step")


if __name__ == "__main__":
    main()
