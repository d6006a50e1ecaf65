"""AG News with most clients hostile: LoRA on MiniLM, five attacks against four defences, by fedllm's own clients.

Twenty clients train adapters in this process, one after the other; 16 of them attack from round 3 on, after the two
rounds that VERT's warm-up trusts. The oracle asks the honest ones only. A gap is its accuracy minus a defence's, in
points. Multi-Krum allows for the most attackers that it can, temporal cosine keeps the true number of honest clients,
VERT is told nothing. Finished runs are kept in ``--partial FILE`` and not repeated while the code that decides them is
the same.
"""

from __future__ import annotations

import copy
import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from federation import Federation, pretend_to_be_flower
from flwr.app import Message, RecordDict
from harness import Finished, arguments, chosen, console, report
from poisoning_cells import OWN, VERT, code_digest

from fedllm import registry
from fedllm.config import RunConfig, Scalar
from fedllm.events import EventBus
from fedllm.records import CONFIG, SERVER_ROUND, encode

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, SHARE, ONSET = 20, 0.8, 3
COMMON: dict[str, Scalar] = {
    "task": "sequence-classification",
    "strategy": "fedavg",
    "client": "backprop",
    "model.name": "packaged:minilm",
    "model.device": "cpu",
    "lora.rank": 8,
    "lora.target-modules": "query,value",
    "data.max-length": 64,
    "data.partitioner": "dirichlet",
    "data.alpha": 1.0,
    "data.min-partition-size": 16,
    "train.learning-rate": 3e-3,
    "train.head-learning-rate": 1e-2,
    "train.batch-size": 8,
    "train.local-steps": 6,
}
ATTACKS = ("sign-flip", "label-flip", "ipm", "alie", "min-max")
DEFENCES: Mapping[str, Mapping[str, Scalar]] = {
    "mean": {"defence": "none"},
    "multi-krum": {"defence": "multi-krum", "multi-krum.attackers": 0.49},
    "temporal-cosine": {"defence": "temporal-cosine", "temporal-cosine.keep": 0.2},
    "vert": {"defence": "vert"},
}
FORGED = ("ipm", "alie", "min-max")
"""Attacks that overwrite the hostile clients' replies by what they make of the honest ones'."""
ORACLE = ("any", "oracle")
"""Attack and defence of the run without the hostile clients, which is the same whatever these would send."""
HONEST_ONLY = "federation:HonestOnly"
GAME = (
    "federation", "fedllm.client", "fedllm.hostile", "fedllm.strategy", "fedllm.clients.attacks",
    "fedllm.clients.backprop", "fedllm.strategies.attacks.colluding", "fedllm.strategies.attacks.strategy",
    "fedllm.strategies.filtering", "fedllm.strategies.robust.rules", "fedllm.strategies.robust.strategy",
)  # fmt: skip
MODULES = {"vert": (*VERT, "fedllm.strategies.vert.strategy"), "temporal-cosine": OWN["temporal-cosine"]}
"""What decides a defence's runs besides the game."""
Cell = tuple[str, str]
"""Attack, defence."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run: accuracy, shares of honest and hostile replies kept under attack, processor seconds."""

    accuracy: float
    honest_kept: float
    hostile_kept: float
    seconds: float


class Arena(Federation):
    """The run's federation, in which hostile clients whose replies are overwritten unseen need not train.

    They answer as they did when they were honest for the last time, which changes no bit of what becomes of a round.
    """

    def __init__(
        self, config: RunConfig, clients: int, events: EventBus, hostile: Mapping[str, bool]
    ) -> None:
        super().__init__(config, clients, events)
        self._hostile, self._forged = hostile, config.attack in FORGED
        self._last: dict[int, RecordDict] = {}

    def _train(self, message: Message) -> Message:
        if not self._forged:
            return super()._train(message)
        node = message.metadata.dst_node_id
        server_round = int(cast(Any, message.content[CONFIG])[SERVER_ROUND])
        if server_round >= ONSET and self._hostile[str(node - 1)]:
            return Message(copy.deepcopy(self._last[node]), reply_to=message)
        reply = super()._train(message)
        if server_round < ONSET:
            self._last[node] = copy.deepcopy(reply.content)
        return reply


class Kept:
    """Counts verdicts from a round on; without a defence everything is kept."""

    def __init__(self, hostile: Mapping[str, bool]) -> None:
        self._hostile = hostile
        self._kept: dict[bool, list[bool]] = {True: [], False: []}

    def emit(self, event: Mapping[str, Any]) -> None:
        """Take a verdict."""
        if event["event"] == "verdict" and event["round"] >= ONSET:
            for name, kept in event["kept"].items():
                self._kept[self._hostile[name]].append(kept)

    def close(self) -> None:
        """Nothing is open."""

    def share(self, hostile: bool) -> float:
        """Of the replies of one side that were kept."""
        found = self._kept[hostile]
        return sum(found) / len(found) if found else 1.0


def cells() -> list[Cell]:
    """The oracle, no attack with and without VERT, then attacks × defences."""
    return [ORACLE, ("none", "mean"), ("none", "vert"), *((a, d) for a in ATTACKS for d in DEFENCES)]


def configuration(cell: Cell, data: Path, seed: int, rounds: int, steps: int, test_rows: int) -> RunConfig:
    """The configuration of one run."""
    attack, defence = cell
    hostile: dict[str, Scalar] = {
        "attack": HONEST_ONLY if cell == ORACLE else attack,
        "attack-fraction": SHARE,
        "attack-from-round": ONSET,
    }
    config = registry.config_from_flat(
        {
            **COMMON,
            **(hostile if attack != "none" else {}),
            **DEFENCES.get(defence, {}),
            "seed": seed,
            "rounds": rounds,
            "train.local-steps": steps,
            "data.source": str(data / "train.csv"),
            "data.test-file": str(data / "test.csv"),
            "data.test-rows": test_rows,
        }
    )
    registry.check(config)
    return config


def run(config: RunConfig, clients: int = CLIENTS) -> Outcome:
    """All rounds of a run, and its accuracy at the end."""
    started = time.process_time()
    hostile: dict[str, bool] = {}
    kept = Kept(hostile)
    federation = Arena(config, clients, EventBus([kept]), hostile)
    arrays = encode(federation.bundle.initial_state)
    for server_round in range(1, config.rounds + 1):
        if config.attack == "none":
            hostile.update({str(number): False for number in range(clients)})
        elif server_round == 2:  # roles are drawn in the first round
            hostile.update(federation.strategy.own_state()["hostile"])  # type: ignore[attr-defined]
        arrays = federation.round(server_round, arrays)
    return Outcome(
        federation.accuracy(arrays),
        kept.share(False),
        0.0 if config.attack in ("none", HONEST_ONLY) else kept.share(True),
        round(time.process_time() - started, 1),
    )


def summarise(outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """Flat figures: worst gaps to the oracle, and every cell; null where something was not run."""
    oracle = outcomes.get(ORACLE)
    figures: dict[str, Any] = {"oracle_accuracy": None if oracle is None else oracle.accuracy}
    for defence in DEFENCES:
        of_defence = {a: outcomes[a, defence] for a in ATTACKS if (a, defence) in outcomes}
        gaps = [100 * (oracle.accuracy - o.accuracy) for o in of_defence.values()] if oracle else []
        key = defence.replace("-", "_")
        figures[f"{key}_worst_gap_to_oracle"] = max(gaps, default=None)
        for attack, outcome in of_defence.items():
            figures[f"{key}_accuracy_{attack.replace('-', '_')}"] = outcome.accuracy
    mean, vert = outcomes.get(("none", "mean")), outcomes.get(("none", "vert"))
    figures["mean_accuracy_without_attack"] = mean and mean.accuracy
    figures["vert_accuracy_without_attack"] = vert and vert.accuracy
    figures["vert_loss_without_attack"] = 100 * (mean.accuracy - vert.accuracy) if mean and vert else None
    return figures | {"cells": len(outcomes)}


def save(outcomes: Mapping[Cell, Outcome], path: Path) -> None:
    """All cells as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("attack", "defence", *Outcome.__dataclass_fields__))
        writer.writerows((*cell, *asdict(outcome).values()) for cell, outcome in outcomes.items())


def _table(outcomes: Mapping[Cell, Outcome]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = [("attack", *DEFENCES, "oracle")]
    for attack in ("none", *ATTACKS):
        found = [outcomes.get((attack, defence)) for defence in DEFENCES]
        found.append(outcomes.get(ORACLE) if attack != "none" else None)
        rows.append((attack, *("–" if o is None else f"{o.accuracy:.3f}" for o in found)))
    return rows


def main() -> None:
    args = arguments(
        __doc__ or "",
        data=(str(ROOT.parent / "shared" / "data" / "ag_news"), "folder with train.csv and test.csv"),
        rounds=(12, "rounds of a run"),
        steps=(6, "local steps of a client in a round"),
        test_rows=(1000, "test rows that are evaluated on after the last round"),
        only=("", "attacks with commas, besides the oracle; none: all"),
        defences=("", "defences with commas; none: all"),
        partial=("", "JSON file of finished runs, read and added to"),
        csv=("benchmarks/results/poisoning_lora.csv", "all cells"),
    )
    data = Path(args.data).expanduser().resolve()
    if missing := [str(data / name) for name in ("train.csv", "test.csv") if not (data / name).is_file()]:
        raise SystemExit(
            f"not found: {', '.join(missing)}; pass --data FOLDER with AG News as train.csv and test.csv "
            "(columns text and label)"
        )
    only = chosen(args.only, ("none", *ATTACKS), "--only")
    defences = chosen(args.defences, list(DEFENCES), "--defences")
    sizes = (6, 2, 300) if args.quick else (args.rounds, args.steps, args.test_rows)
    pretend_to_be_flower()
    os.environ["RAY_JOB_ID"] = (
        "in this process"  # clients attack only where they are simulated, which this tells them
    )
    finished = Finished(args.partial)
    outcomes: dict[Cell, Outcome] = {}
    for cell in (cell for cell in cells() if cell == ORACLE or (cell[0] in only and cell[1] in defences)):
        config = configuration(cell, data, args.seed, *sizes)
        settings = {**config.to_flat(), "code": code_digest((*GAME, *MODULES.get(cell[1], ())))}
        found = finished.get(settings)
        outcome = Outcome(**found) if found else run(config)
        finished.put(settings, asdict(outcome))
        outcomes[cell] = outcome
        console.print(
            f"{cell[0]} against {cell[1]}: accuracy {outcome.accuracy:.3f}, kept {outcome.honest_kept:.0%} of the "
            f"honest and {outcome.hostile_kept:.0%} of the hostile, {outcome.seconds:.0f} s"
        )
        save(outcomes, Path(args.csv))
    figures = {"rounds": sizes[0], "local_steps": sizes[1], "test_rows": sizes[2], **summarise(outcomes)}
    report(
        args,
        figures,
        _table(outcomes),
        f"AG News, MiniLM with LoRA, accuracy with {SHARE:.0%} hostile clients",
    )


if __name__ == "__main__":
    main()
