"""Split fine-tuning on E2E NLG with five unequal nodes: perplexity of HSplitLoRA, SplitLoRA and zero-padding.

Five nodes of unequal strength learn to turn meaning representations into sentences; all arms see the same number of
samples of the same partitions, and the same learning rates.

* ``hsplitlora``: every node has the cut and the rank that it can bear; products are merged without error.
* ``splitlora``: all nodes have the cut and the rank of the weakest one, and the server has that rank too.
* ``hetlora``: no split; every node holds the whole model and its own rank, factors are zero-padded and averaged.

``--partial FILE`` keeps finished runs, so that the benchmark can be interrupted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from harness import Finished, arguments, console, report, run_app

from fedllm import app_config, registry
from fedllm.events import read_events
from fedllm.models import load_bundle
from fedllm.simulate import federation_config, prepare
from fedllm.split.model import SplitModel

ROOT = Path(__file__).resolve().parents[1]
RANKS = (2, 4, 8, 16, 16)
DEPTHS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Share of the blocks that each node holds; the budgets are spread 1:4."""


@dataclass(frozen=True)
class Outcome:
    """One run: perplexity before the first round and after the last, and samples that clients trained on."""

    before: float
    after: float
    samples: int


def count_blocks(model: str) -> int:
    """Blocks of a model."""
    config = registry.config_from_flat({"model.name": model, "task": "causal-lm"})
    return SplitModel(load_bundle(config).model.get_base_model()).num_blocks


def arms(blocks: int) -> dict[str, dict[str, str | int]]:
    """Settings by arm."""
    cuts = [min(max(round(blocks * depth), 1), blocks - 1) for depth in DEPTHS]
    return {
        "hsplitlora": {
            "hsplitlora.cuts": ",".join(map(str, cuts)),
            "lora.client-ranks": ",".join(map(str, RANKS)),
            "lora.rank": max(RANKS),
        },
        "splitlora": {"hsplitlora.cuts": str(min(cuts)), "lora.rank": min(RANKS)},
        "hetlora": {
            "strategy": "fedavg",
            "client": "backprop",
            "lora.client-ranks": ",".join(map(str, RANKS)),
            "lora.rank": max(RANKS),
            "lora.aggregation": "zero-pad",
        },
    }


def run_arm(folder: Path, settings: Mapping[str, str | int], rounds: int, seed: int) -> Outcome:
    """Run ``examples/split_learning`` with other settings to its end."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    overrides += [f"seed={seed}", f"run.root={json.dumps(str(folder / 'runs'))}"]
    job = prepare(ROOT / "examples" / "split_learning", overrides, name="arm", rounds=rounds)
    run_app(app_config.stage(job.app, job.config, folder / "app"), federation_config(job.config))
    events = read_events(job.run_dir / "events.jsonl")
    if lost := [f"node {e['node']}: {e['reason']}" for e in events if e["event"] == "node-dropped"]:
        raise RuntimeError("the arms would see unequal numbers of samples: " + "; ".join(lost))
    measured = [event["metrics"]["perplexity"] for event in events if event["event"] == "evaluated"]
    replies = sum(event["replies"] for event in events if event["event"] == "aggregated")
    return Outcome(
        measured[0], measured[-1], replies * job.config.train.local_steps * job.config.train.batch_size
    )


def data_files(folder: str) -> tuple[Path, Path]:
    """The training and the test file in a folder; ends the program if one is not there."""
    train, test = (Path(folder).expanduser().resolve() / name for name in ("train.csv", "test.csv"))
    if missing := [str(path) for path in (train, test) if not path.is_file()]:
        raise SystemExit(
            f"not found: {', '.join(missing)}; pass --data FOLDER with E2E NLG as train.csv and test.csv "
            "(columns mr and ref)"
        )
    return train, test


def main() -> None:
    args = arguments(
        __doc__ or "",
        data=str(ROOT.parent / "shared" / "data" / "e2e_nlg"),
        model="packaged:smollm2",
        rounds=10,
        steps=20,
        seeds=3,
        train_rows=0,
        test_rows=400,
        gpus_per_client=0.0,
        partial="",
    )
    train, test = data_files(args.data)
    rounds, steps, count = (2, 4, 1) if args.quick else (args.rounds, args.steps, args.seeds)
    common: dict[str, str | int] = {
        "model.name": args.model,
        "data.source": str(train),
        "data.test-file": str(test),
        "data.prompt-column": "mr",
        "data.response-column": "ref",
        "data.train-rows": 400 if args.quick else args.train_rows,
        "data.test-rows": 32 if args.quick else args.test_rows,
        "train.local-steps": steps,
        "server.evaluate-every": rounds,
        "server.node-timeout": 600,  # a machine with few CPUs takes long to start all workers
        "split.connect-timeout": 600.0,
        "simulation.gpus-per-client": args.gpus_per_client,
    }
    settings = arms(count_blocks(args.model))
    finished = Finished(args.partial)
    outcomes: dict[str, list[Outcome]] = {arm: [] for arm in settings}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(args.seed, args.seed + count):
            for arm, own in settings.items():
                values = {**common, **own, "rounds": rounds, "seed": seed}
                found = finished.get(values)
                folder = Path(name) / f"{arm}-{seed}"
                outcome = run_arm(folder, common | own, rounds, seed) if found is None else Outcome(**found)
                finished.put(values, asdict(outcome))
                outcomes[arm].append(outcome)
                console.print(f"seed {seed}, {arm}: perplexity {outcome.before:.4g} → {outcome.after:.4g}")
    if len({outcome.samples for found in outcomes.values() for outcome in found}) != 1:
        raise RuntimeError("the arms have seen different numbers of samples")
    perplexity = {arm: [outcome.after for outcome in found] for arm, found in outcomes.items()}
    means = {arm: mean(values) for arm, values in perplexity.items()}
    figures = {
        **{f"{arm}_perplexity": value for arm, value in means.items()},
        "hsplitlora_minus_splitlora": means["hsplitlora"] - means["splitlora"],
        "hsplitlora_minus_hetlora": means["hsplitlora"] - means["hetlora"],
        "perplexity_before": mean(outcome.before for found in outcomes.values() for outcome in found),
        "samples": outcomes["hsplitlora"][0].samples,
        "rounds": rounds,
        "seeds": count,
        **{
            f"{arm}_perplexity_seed_{args.seed + place}": value
            for arm, values in perplexity.items()
            for place, value in enumerate(values)
        },
    }
    rows: list[tuple[object, ...]] = [("method", "cuts", "ranks", "perplexity", "spread over seeds")]
    rows += [
        (
            arm,
            own.get("hsplitlora.cuts", "none"),
            own.get("lora.client-ranks", own["lora.rank"]),
            means[arm],
            stdev(perplexity[arm]) if count > 1 else "",
        )
        for arm, own in settings.items()
    ]
    report(args, figures, rows, f"E2E NLG with {args.model}, five nodes, {rounds} rounds of {steps} steps")


if __name__ == "__main__":
    main()
