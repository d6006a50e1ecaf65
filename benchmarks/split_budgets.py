"""Do nodes of split learning stay within their budgets? The planned cut for each budget, predicted and measured.

For every budget the planner of ``hsplitlora`` chooses a cut and ranks; then the real client takes some steps in a fresh
process against a split server in another one. Measured is the growth of the process's resident memory, loading the
model included, over what it took before: everything counts, also the channel's buffers. Before that, a step of a tiny
model has loaded the libraries: a budget is what a node gives to model and training, beside the Python process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fedllm.clients.split import Split
from fedllm.strategies.fedpipe.plan import share_of
from fedllm.strategies.hsplitlora.cuts import CutPlan, ServerSide, plan_cut
from fedllm.strategies.hsplitlora.planning import planning_of
from harness import arguments, console, report
from split_training import beside_server, configuration, in_process, peak_memory

from fedllm import registry
from fedllm.config import TrainConfig
from fedllm.encoded import Encoded
from fedllm.errors import PlanError
from fedllm.lora.importance import Importance
from fedllm.lora.plans import NodeBudget
from fedllm.models import load_bundle
from fedllm.tasks import get_task
from fedllm.update import TrainJob

MB = 1_000_000


@dataclass(frozen=True)
class Setting:
    """The model, and the shape of a step.

    Attributes:
        model: name of the model.
        batch: examples in a step.
        length: tokens of every example.
        seed: of model, adapter and tokens.
    """

    model: str
    batch: int
    length: int
    seed: int


def plan(setting: Setting, budgets: list[float]) -> tuple[int, list[CutPlan | str]]:
    """Number of blocks, and for every budget in bytes the plan, or why there is none."""
    config = registry.config_from_flat(
        {
            "model.name": setting.model,
            "task": "causal-lm",
            "strategy": "hsplitlora",
            "client": "split",
            "lora.rank": 8,
            "seed": setting.seed,
            "train.batch-size": setting.batch,
            "train.local-steps": 1,
            "data.max-length": setting.length,
        }
    )
    spec, options = planning_of(config, load_bundle(config))
    alike = Importance({weight.name: 1.0 for weight in spec.weights})
    plans: list[CutPlan | str] = []
    for budget in budgets:
        # A fast node with a fast link takes as many blocks as it can hold: nothing but memory decides.
        node = NodeBudget(f"{budget / MB:g} MB", budget, 1, 1e15)
        try:
            plans.append(plan_cut(node, spec, alike, options, ServerSide(1e9), range(1, spec.num_blocks)))
        except PlanError as error:
            plans.append(str(error))
    return spec.num_blocks, plans


def load_libraries() -> None:
    """Do a step of a tiny model, which makes torch and transformers load what they load on first use."""
    bundle = load_bundle(configuration("tiny-random:llama", 0, 0))
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    get_task("causal-lm").loss(bundle.model, batch).backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW(bundle.trainable().values(), fused=True).step()


def train(port: int, setting: Setting, chosen: CutPlan, steps: int) -> int:
    """Take some steps as a client with this plan; returns the growth of the process's memory in bytes."""
    load_libraries()
    before = peak_memory()
    bundle = load_bundle(configuration(setting.model, chosen.cut, setting.seed))
    bundle.load_adapter_state(share_of(bundle.initial_state, chosen.client.ranks), any_ranks=True)
    generator = torch.Generator().manual_seed(setting.seed)
    tokens = torch.randint(
        5, len(bundle.tokenizer), (setting.batch * steps, setting.length), generator=generator
    )
    examples = Encoded.from_lists(tokens.tolist(), tokens.tolist())
    shape = TrainConfig(batch_size=setting.batch, local_steps=steps)
    job = TrainJob(
        bundle,
        get_task("causal-lm"),
        examples,
        shape,
        setting.seed,
        1,
        "0",
        bundle.adapter_state(),
        ask_importance=True,
    )
    Split(address=f"127.0.0.1:{port}", token="token").run(job)
    return peak_memory() - before


def measure(setting: Setting, chosen: CutPlan, steps: int) -> int:
    """Peak memory of a client with this plan, in bytes."""
    found: tuple[int, object] = beside_server(
        setting.model,
        setting.seed,
        chosen.cut,
        "fp32",
        lambda port: in_process(train, port, setting, chosen, steps),
    )
    return found[0]


def main() -> None:
    args = arguments(
        __doc__ or "", model="packaged:smollm2", megabytes="300,400,500,800,1200", batch=4, length=96, steps=4
    )
    setting = Setting(args.model, args.batch, args.length, args.seed)
    budgets = [float(value) * MB for value in args.megabytes.split(",")]
    blocks, plans = in_process(plan, setting, budgets)
    steps = 2 if args.quick else args.steps
    rows: list[tuple[object, ...]] = [
        ("budget MB", "cut", "mean rank", "predicted MB", "measured MB", "of the budget")
    ]
    ratios: list[float] = []
    figures: dict[str, float] = {}
    for budget, found in zip(budgets, plans, strict=True):
        if isinstance(found, str):
            console.print(found)
            rows.append((budget / MB, "none", "", "", "", ""))
            continue
        console.print(f"{budget / MB:g} MB: cut after block {found.cut} of {blocks} …")
        peak = measure(setting, found, steps)
        ratios.append(peak / budget)
        ranks = found.client.ranks
        predicted = found.client.predicted_bytes
        rows.append(
            (
                budget / MB,
                found.cut,
                sum(ranks.values()) / max(len(ranks), 1),
                predicted / MB,
                peak / MB,
                peak / budget,
            )
        )
        figures |= {
            f"budget_{budget / MB:g}_cut": found.cut,
            f"budget_{budget / MB:g}_predicted_bytes": predicted,
            f"budget_{budget / MB:g}_measured_bytes": peak,
        }
    if not ratios:
        raise SystemExit("no budget is enough for any cut: pass larger --megabytes")
    figures |= {"worst_measured_over_budget": max(ratios), "budgets": len(ratios)}
    title = f"Budgets of clients that split {args.model}, batch {args.batch}×{args.length}"
    report(args, figures, rows, title)


if __name__ == "__main__":
    main()
