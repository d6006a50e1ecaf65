"""What a round costs besides training: fedllm's loop against Flower's own FedAvg.start, same app, same run.

Clients send back what they got. Time: ten clients, a tiny array. Memory: growth of the ServerApp's process while 200
replies of 4 MB come in. Both loops run one after the other in the same process, ours first.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness import arguments, report, run_app, stage


def run(folder: Path, name: str, clients: int, **config: int) -> dict[str, dict[str, float]]:
    """Run the echo app and read its figures."""
    out = folder / f"{name}.json"
    app = stage("round_overhead", folder / name, {"out": str(out), "min-nodes": clients, **config})
    run_app(app, {"num-supernodes": clients, "client-resources-num-cpus": 1})
    figures: dict[str, dict[str, float]] = json.loads(out.read_text())
    return figures


def main() -> None:
    args = arguments(__doc__ or "", clients=10, memory_clients=200, megabytes=4)
    values = args.megabytes * 2**20 // 4
    with tempfile.TemporaryDirectory() as folder:
        time = run(Path(folder), "time", args.clients, rounds=5 if args.quick else 20, repeats=3)
        memory = run(Path(folder), "memory", args.memory_clients, rounds=1, values=values)
    ours, stock = time["ours"]["seconds"], time["stock"]["seconds"]
    ours_bytes, stock_bytes = memory["ours"]["growth"], memory["stock"]["growth"]
    figures = {
        "clients": args.clients,
        "stock_seconds_per_round": stock,
        "ours_seconds_per_round": ours,
        "ratio": stock / ours,
        "memory_clients": args.memory_clients,
        "reply_bytes": args.megabytes * 2**20,
        "stock_peak_growth_bytes": stock_bytes,
        "ours_peak_growth_bytes": ours_bytes,
        "memory_ratio": stock_bytes / max(ours_bytes, 1),
    }
    rows = [
        ("", "Flower", "fedllm", "ratio"),
        (f"seconds per round, {args.clients} clients", stock, ours, stock / ours),
        (
            f"server's peak growth in MB, {args.memory_clients} replies of {args.megabytes} MB",
            stock_bytes / 2**20,
            ours_bytes / 2**20,
            figures["memory_ratio"],
        ),
    ]
    report(args, figures, rows, "Round overhead")


if __name__ == "__main__":
    main()
