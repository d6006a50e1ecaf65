"""Aggregation of LoRA adapters of mixed ranks: error and time of all five ways, and of the SVD behind them.

Ten clients of ranks 64 to 4 hold adapters of one 512×512 module: independent ones, or noisy copies of one signal of
rank 8. The error is that of the global product against the dense weighted sum in float64. Then ten clients of total
rank 160 and a 4096×4096 module: QR-SVD of the stacked factors against an SVD of the dense sum, side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from flwr.app import RecordDict
from harness import arguments, console, report

from fedllm.accumulate import Reply
from fedllm.aggregation import AdapterAggregation
from fedllm.config import AggregationName
from fedllm.lora.factors import fold, stack
from fedllm.lora.svd import ProductSVD, dense_svd, product_svd
from fedllm.records import encode

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
WAYS: tuple[AggregationName, ...] = ("factor-average", "zero-pad", "svd", "stack", "exact")
SIGNALS = {"independent": 0, "shared": 8}
"""Rank of what the clients have in common."""
A, B = "layer.lora_A.weight", "layer.lora_B.weight"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Client:
    """An adapter in float32, lora_A [r, k] and lora_B [d, r], and its share of the examples."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    weight: float


def cohort(size: int, common: int, generator: torch.Generator) -> list[Client]:
    """Clients with random adapters; with ``common`` directions these hold one update of that rank, plus noise."""
    shares = torch._sample_dirichlet(torch.ones(len(RANKS)), generator).tolist()
    signal = ProductSVD(
        torch.linalg.qr(torch.randn(size, max(common, 1), generator=generator))[0],
        torch.linspace(2, 1, max(common, 1)),
        torch.linalg.qr(torch.randn(size, max(common, 1), generator=generator))[0].T,
    )
    clients = []
    for rank, share in zip(RANKS, shares, strict=True):
        lora_a = torch.randn(rank, size, generator=generator) * size**-0.5
        lora_b = torch.randn(size, rank, generator=generator) * size**-0.5
        if common:
            held = min(rank, common)
            root = signal.values[:held].sqrt()
            lora_a, lora_b = 0.1 * lora_a, 0.1 * lora_b
            lora_a[:held] += root[:, None] * signal.right[:held]
            lora_b[:, :held] += signal.left[:, :held] * root
        clients.append(Client(lora_a, lora_b, share))
    return clients


def timed(work: Callable[[], Result], repetitions: int) -> tuple[Result, float]:
    """The result and the median of the seconds."""
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, median(seconds)


def aggregate(way: AggregationName, clients: list[Client]) -> torch.Tensor:
    """The global product after a round from an empty adapter: what the server knows, at full rank if it keeps that."""
    size = clients[0].lora_a.shape[1]
    empty = {A: torch.ones(max(RANKS), size), B: torch.zeros(size, max(RANKS))}
    aggregation = AdapterAggregation(way, (), 0, None)
    accumulator = aggregation.accumulator(empty)
    for client in clients:
        sent = encode({A: empty[A][: len(client.lora_a)], B: empty[B][:, : len(client.lora_a)]})
        arrays = {A: client.lora_a, B: client.lora_b}
        accumulator.add(Reply("", client.weight, arrays, {}, RecordDict(), sent))
    adapter = accumulator.result()
    kept = aggregation.frozen(adapter) if way in ("stack", "exact") else adapter
    return kept[B].double() @ kept[A].double()


def compare_ways(seed: int, repetitions: int) -> tuple[dict[str, float], list[tuple[object, ...]]]:
    """Relative error and seconds of every way on both kinds of adapters."""
    figures: dict[str, float] = {}
    for name, common in SIGNALS.items():
        clients = cohort(512, common, torch.Generator().manual_seed(seed))
        target = sum(c.weight * (c.lora_b.double() @ c.lora_a.double()) for c in clients)
        assert isinstance(target, torch.Tensor)
        for way in WAYS:
            product, seconds = timed(partial(aggregate, way, clients), repetitions)
            error = torch.linalg.norm(product - target) / torch.linalg.norm(target)
            key = way.replace("-", "_")
            figures[f"{name}_{key}_relative_error"] = float(error)
            figures[f"{name}_{key}_seconds"] = seconds
    for way in ("exact", "stack"):
        figures[f"{way}_relative_error"] = max(figures[f"{name}_{way}_relative_error"] for name in SIGNALS)
    rows: list[tuple[object, ...]] = [
        ("512×512, rank 64 kept", *(f"{n}: {w}" for n in SIGNALS for w in ("error", "s")))
    ]
    for way in WAYS:
        keys = [f"{n}_{way.replace('-', '_')}_{w}" for n in SIGNALS for w in ("relative_error", "seconds")]
        rows.append((way, *(figures[key] for key in keys)))
    return figures, rows


def compare_svd(seed: int, repetitions: int, size: int) -> tuple[dict[str, float], list[tuple[object, ...]]]:
    """Seconds of both routes from the clients' adapters to singular triplets, and how far their values differ."""
    clients = cohort(size, 0, torch.Generator().manual_seed(seed))

    def ours(dtype: torch.dtype) -> ProductSVD:
        return product_svd(stack([(c.weight, fold(c.lora_a, c.lora_b, dtype=dtype)) for c in clients]))

    def dense() -> ProductSVD:
        total = torch.zeros(size, size)
        for client in clients:
            total.addmm_(client.lora_b, client.lora_a, alpha=client.weight)
        return dense_svd(total)

    single, single_seconds = timed(lambda: ours(torch.float32), repetitions)
    _, double_seconds = timed(lambda: ours(torch.float64), repetitions)
    console.print(f"SVD of the dense {size}×{size} sum: a minute or two …")
    oracle, dense_seconds = timed(dense, 1)
    rank = sum(RANKS)
    gap = (single.values[:rank] - oracle.values[:rank]).abs().max() / oracle.values[0]
    figures = {
        "size": size,
        "total_rank": rank,
        "dense_svd_seconds": dense_seconds,
        "qr_svd_seconds": single_seconds,
        "qr_svd_float64_seconds": double_seconds,
        "speedup_over_dense_svd": dense_seconds / single_seconds,
        "speedup_of_float64_over_dense_float32": dense_seconds / double_seconds,
        "singular_value_gap": float(gap),
    }
    rows: list[tuple[object, ...]] = [
        (f"{size}×{size}, total rank {rank}", "seconds", "times faster"),
        ("SVD of the dense sum, float32", dense_seconds, 1.0),
        ("QR-SVD of the factors, float32", single_seconds, figures["speedup_over_dense_svd"]),
        ("QR-SVD of the factors, float64", double_seconds, figures["speedup_of_float64_over_dense_float32"]),
    ]
    return figures, rows


def main() -> None:
    args = arguments(__doc__ or "", size=4096, repetitions=5)
    repetitions = min(args.repetitions, 3) if args.quick else args.repetitions
    svd_figures, svd_rows = compare_svd(args.seed, repetitions, args.size)
    figures, rows = compare_ways(args.seed, repetitions)
    report(args, {**figures, **svd_figures}, svd_rows, "From ten adapters to singular triplets")
    report(
        args, {**figures, **svd_figures}, rows, "Relative error of the global product, one round, ten clients"
    )


if __name__ == "__main__":
    main()
