"""Clients of ranks 2, 4, 8 and 16 on AG News: how the adapters are averaged decides what is learnt.

The setting is that of examples/ag_news (MiniLM, ten clients, non-IID, five a round) with a global adapter of rank 16.
In one arm every client has rank 16; in the others ranks 2, 4, 8 and 16 take turns, and ``lora.aggregation`` differs.
``--partial FILE`` keeps the accuracy of every finished run, so that the benchmark can be interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean

from ag_news import ROOT, data_files, run_ours
from harness import Finished, arguments, console, report

RANK = 16
CLIENT_RANKS = "2,4,8,16"
EQUAL = "rank 16"
ARMS: dict[str, dict[str, str]] = {
    EQUAL: {},
    **{
        way: {"lora.client-ranks": CLIENT_RANKS, "lora.aggregation": way}
        for way in ("exact", "zero-pad", "factor-average")
    },
}


def markdown(rows: list[tuple[object, ...]]) -> str:
    """The table for the docs."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    cells.insert(1, ["---", *("---:" for _ in rows[0][1:])])
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main() -> None:
    args = arguments(
        __doc__ or "",
        data=str(ROOT.parent / "shared" / "data" / "ag_news"),
        rounds=10,
        seeds=3,
        train_rows=0,
        test_rows=4000,
        table="",
        partial="",
    )
    train, test = data_files(args.data)
    rounds, count = (min(args.rounds, 4), 1) if args.quick else (args.rounds, args.seeds)
    seeds = [args.seed + number for number in range(count)]
    common: dict[str, str | int] = {
        "lora.rank": RANK,
        "data.train-rows": args.train_rows,
        "data.test-rows": args.test_rows,
        "server.evaluate-every": rounds,
    }
    accuracy: dict[str, list[float]] = {arm: [] for arm in ARMS}
    finished = Finished(args.partial)
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            for arm, settings in ARMS.items():
                folder = Path(name) / f"{arm.replace(' ', '-')}-{seed}"
                values = {**common, **settings, "rounds": rounds, "seed": seed}
                found = finished.get(values)
                if found is None:
                    measured, _ = run_ours(folder, train, test, rounds, seed, common | settings)
                    found = measured.accuracy[-1]
                    finished.put(values, found)
                accuracy[arm].append(found)
                console.print(f"seed {seed}, {arm}: accuracy {found:.4f}")
    means = {arm: mean(values) for arm, values in accuracy.items()}
    figures = {
        "rounds": rounds,
        "seeds": len(seeds),
        "test_rows": args.test_rows,
        **{f"{key(arm)}_accuracy": value for arm, value in means.items()},
        **{
            f"{key(arm)}_accuracy_seed_{seed}": value
            for arm, values in accuracy.items()
            for seed, value in zip(seeds, values, strict=True)
        },
        **{f"exact_minus_{key(arm)}": means["exact"] - means[arm] for arm in ARMS if arm != "exact"},
    }
    rows: list[tuple[object, ...]] = [("", *(f"seed {seed}" for seed in seeds), "mean")]
    for arm, values in accuracy.items():
        label = "everyone at rank 16" if arm == EQUAL else f"ranks {CLIENT_RANKS}: {arm}"
        rows.append((label, *values, means[arm]))
    if args.table:
        Path(args.table).write_text(markdown(rows), encoding="utf-8")
        console.print(f"wrote {args.table}")
    report(args, figures, rows, f"AG News, accuracy after {rounds} rounds")


def key(arm: str) -> str:
    """The part of a JSON key that names an arm."""
    return arm.replace(" ", "").replace("-", "_")


if __name__ == "__main__":
    main()
