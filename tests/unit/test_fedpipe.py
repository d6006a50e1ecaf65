"""FedPipe: what is planned when, what travels, and what happens when a node does not keep to the plan."""

import json
import math
from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch
from fedllm.strategies.fedpipe.plan import RoundPlan, modules_of, share_of
from fedllm.strategies.fedpipe.planner import CohortPlanner, Schedule
from flwr.app import ConfigRecord

from fedllm import client, registry, server
from fedllm.errors import ConfigError, PlanError
from fedllm.events import read_events
from fedllm.lora.importance import Importance
from fedllm.lora.plans import PlanOptions
from fedllm.lora.spec import ActivationSpec, BlockSpec, ModelSpec, WeightSpec
from fedllm.models import load_bundle
from fedllm.nodes import NodeInfo
from fedllm.planned import Planned
from fedllm.records import decode, encode
from tests.unit.test_server import WORDS, ClientGrid, write_rows

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="fedllm[quantization] is missing"
)
SPEC = ModelSpec(
    hidden_size=8,
    num_heads=2,
    feed_forward=16,
    vocabulary=0,
    blocks=(BlockSpec(1000, 900, 50),) * 2,
    weights=tuple(WeightSpec(f"layer.{i}.{name}", 8, 8, i) for i in range(2) for name in "qv"),
    embedding_parameters=500,
    output_parameters=0,
    head_parameters=10,
    largest_weight=128,
    activations={2: ActivationSpec(50.0, 4.0), 4: ActivationSpec(100.0, 8.0)},
)
NAMES = [weight.name for weight in SPEC.weights]
OPTIONS = PlanOptions(ranks=(1, 2, 4, 8), batch_sizes=(2, 4), sequence_length=8, steps=lambda n, b: 5)


def planner(**schedule):
    return CohortPlanner(SPEC, OPTIONS, Schedule(**schedule))


def node(name, memory=1_000_000, **more):
    description = {
        "memory-bytes": memory,
        "num-examples": 10,
        "flops-per-second": 1e9,
        "upload-rate": 1e6,
        "download-rate": 1e6,
    }
    record = ConfigRecord({k: v for k, v in {**description, **more}.items() if v is not None})
    return NodeInfo(int(name), name, (0, int(name), name), 10, record)


def report(**scores):
    return Importance({name: scores.get(name[-3:].replace(".", ""), 0.25) for name in NAMES})


# ---------------------------------------------------------------------------- planner


def test_a_warm_up_at_one_low_rank_comes_first_and_the_plan_follows_what_it_found():
    cohort = planner(probe_rank=2)
    first = cohort.plan([node("0"), node("1")])
    assert first.phase == "warm-up"
    assert {frozenset(plan.ranks.items()) for plan in first.nodes.values()} == {
        frozenset(dict.fromkeys(NAMES, 2).items())
    }
    assert all(plan.steps == 20 for plan in first.nodes.values())
    found = Importance(dict(zip(NAMES, (0.1, 0.1, 0.1, 0.7), strict=True)))
    assert cohort.finish({"0": found, "1": found}, {}) == []
    # Room for little beside the base: the weight that matters most is tuned, and at the rank that fits.
    second = cohort.plan([node("0"), node("1", memory=13_500)])
    assert second.phase == "plan"
    assert second.nodes["0"].ranks == dict.fromkeys(NAMES, 8)
    ranks = second.nodes["1"].ranks
    assert 0 < sum(ranks.values()) < 32
    assert ranks[NAMES[3]] == max(ranks.values())
    assert second.nodes["1"].predicted_bytes <= 13_500


def test_a_plan_holds_until_a_budget_changes_and_is_the_same_for_the_others():
    cohort = planner(warmup_rounds=0)
    nodes = [node("0"), node("1", 14_000)]
    first = cohort.plan(nodes)
    cohort.finish({}, {"0": 1_000_000.0, "1": 14_000.0})
    assert cohort.plan(nodes) is first
    cohort.finish({}, {"1": 20_000.0})  # told with a reply; the description is still the old one
    second = cohort.plan(nodes)
    assert second is not first
    assert second.nodes["0"] == first.nodes["0"]
    assert second.nodes["1"].value > first.nodes["1"].value
    third = cohort.plan([node("0"), node("1", 14_001)])  # a newer description counts
    assert third.budgets["1"] == 14_001
    assert cohort.plan([node("0")]) is third  # a node that is away changes nothing


def test_warm_ups_come_again():
    cohort = planner(warmup_rounds=2, replan_every=3)
    phases = []
    for _ in range(9):
        phases.append(cohort.plan([node("0")]).phase)
        cohort.finish({"0": report()}, {})
    assert phases == [*["warm-up"] * 2, *["plan"] * 3, *["warm-up"] * 2, *["plan"] * 2]


@pytest.mark.parametrize("memory", [0, -5.0, float("nan"), float("inf"), None, "much"])
def test_a_budget_that_is_none_is_refused_by_node_and_key(memory):
    cohort = planner()
    plan = cohort.plan([node("0"), node("1"), node("7", memory)])
    assert set(plan.nodes) == {"0", "1"}
    assert "node 7: " in cohort.refused["7"]
    assert "memory-bytes" in cohort.refused["7"]
    with pytest.raises(PlanError, match=r"0 of 1 nodes can take part.*node 7: .*memory-bytes"):
        planner().plan([node("7", memory)])


def test_a_node_that_cannot_hold_the_model_is_left_out_if_the_quorum_allows():
    cohort = planner(quorum=0.5)
    plan = cohort.plan([node("0"), node("1", 900)])
    assert set(plan.nodes) == {"0"}
    assert "node 1: needed are" in plan.refused["1"]
    assert "900" in plan.refused["1"]
    with pytest.raises(PlanError, match=r"1 of 2 nodes can take part, expected at least 2 \(server.quorum\)"):
        planner(quorum=0.9).plan([node("0"), node("1", 900)])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({NAMES[0]: math.nan}, "node 1: importance of layer.0.q"),
        ({NAMES[0]: -1.0}, "node 1: importance of layer.0.q"),
        (dict.fromkeys(NAMES, 0.0), "node 1: the importance of all 4 weights is 0"),
        ({"other": 1.0}, "node 1: importance score of other"),
    ],
)
def test_a_bad_report_is_named_and_not_used(bad, said):
    good = Importance(dict(zip(NAMES, (0.6, 0.2, 0.1, 0.1), strict=True)))
    cohort, alone = planner(), planner()
    nodes = [node("0"), node("1")]
    for each in (cohort, alone):
        each.plan(nodes)
    said_of = cohort.finish({"0": good, "1": Importance({**good.scores, **bad})}, {})
    assert len(said_of) == 1
    assert said in said_of[0]
    alone.finish({"0": good}, {})
    assert cohort.state_dict()["importance"] == alone.state_dict()["importance"]


def test_a_warm_up_without_reports_counts_every_weight_the_same_and_says_so():
    cohort, uniform = planner(), planner(warmup_rounds=0)
    cohort.plan([node("0", 14_000)])
    assert "no usable report of importance" in cohort.finish({}, {})[0]
    assert cohort.plan([node("0", 14_000)]).nodes == uniform.plan([node("0", 14_000)]).nodes


def test_a_report_on_a_part_of_the_weights_is_not_asked_for():
    """A node whose memory holds some candidates only has nothing to say of the rest."""
    cohort = planner(quorum=0.1)
    plan = cohort.plan([node("0"), node("1", 11_500)])
    assert plan.covers("0", NAMES)
    assert not plan.covers("1", NAMES)
    assert cohort.finish({"0": report(), "1": Importance({NAMES[0]: 1.0})}, {}) == []


def test_the_state_survives_json_and_speeds_are_kept():
    cohort = planner()
    cohort.plan([node("0"), node("1", 20_000)])
    cohort.finish({"0": report()}, {"1": 15_000.0})
    again = planner()
    again.load_state_dict(json.loads(json.dumps(cohort.state_dict())))
    # A resumed run measures another speed; the plan must not follow it.
    nodes = [node("0", **{"flops-per-second": 3e9}), node("1", 20_000)]
    assert again.plan(nodes).to_json() == cohort.plan([node("0"), node("1", 20_000)]).to_json()
    assert RoundPlan.from_json(json.loads(json.dumps(again.current.to_json()))) == again.current


def test_a_share_has_the_leading_ranks_and_all_heads():
    arrays = {
        "base_model.model.layer.q.lora_A.weight": torch.arange(12.0).reshape(4, 3),
        "base_model.model.layer.q.lora_B.weight": torch.arange(20.0).reshape(5, 4),
        "base_model.model.layer.v.lora_A.weight": torch.ones(4, 3),
        "base_model.model.layer.v.lora_B.weight": torch.ones(5, 4),
        "base_model.model.classifier.weight": torch.ones(2, 5),
    }
    share = share_of(arrays, {"layer.q": 2, "layer.v": 0})
    assert list(share) == [name for name in arrays if "layer.v" not in name]
    assert torch.equal(share["base_model.model.layer.q.lora_A.weight"], torch.arange(6.0).reshape(2, 3))
    assert modules_of(share) == {"layer.q": 2}
    assert modules_of(arrays) == {"layer.q": 4, "layer.v": 4}


# --------------------------------------------------------------------- whole runs


class Grid(ClientGrid):
    """Keeps what was sent and lets a test change budgets and replies."""

    def __init__(self, flat, budgets, change=lambda message, node, reply: reply):
        super().__init__(flat)
        self.budgets, self.change = dict(budgets), change
        self.sent = defaultdict(list)

    def context(self, node):
        context = super().context(node)
        name = str(context.node_config["partition-id"])
        settings = {"flops-per-second": 1e9, "memory-bytes": self.budgets[name]}
        context.node_config = {**context.node_config, **settings}
        return context

    def answer(self, message, node):
        name = str(self.context(node).node_config["partition-id"])
        self.sent[name, message.metadata.message_type].append(message)
        return self.change(message, name, super().answer(message, node))


RICH, MIDDLE, POOR = 2_000_000, 330_000, 200_000


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_use_own_cpus", lambda: None)
    return {
        "strategy": "fedpipe",
        "fedpipe.warmup-steps": 3,
        "fedpipe.bits": "32,16",
        "model.name": "tiny-random:bert",
        "lora.rank": 8,
        "data.source": str(write_rows(tmp_path / "train.csv", 0, 60)),
        "data.test-fraction": 0.2,
        "data.max-length": 16,
        "data.cache-dir": str(tmp_path / "cache"),
        "train.learning-rate": 1e-2,
        "train.batch-size": 8,
        "train.local-steps": 2,
        "rounds": 3,
        "server.min-nodes": 3,
        "server.node-timeout": 5.0,
        "run.root": str(tmp_path / "runs"),
        "run.name": "r",
    }


def run(flat, budgets=None, change=lambda message, node, reply: reply, **keys):
    flat = {**flat, **{key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}}
    grid = Grid(flat, budgets or {"0": RICH, "1": MIDDLE, "2": POOR}, change)
    return server.run(grid, flat), grid


def events_of(tmp_path, kind, name="r"):
    return [e for e in read_events(tmp_path / "runs" / name / "events.jsonl") if e["event"] == kind]


def test_a_run_sends_every_node_what_its_budget_holds(flat, tmp_path):
    result, grid = run(flat)
    warm, plan = events_of(tmp_path, "planned")
    assert (warm["phase"], plan["phase"]) == ("warm-up", "plan")
    assert (warm["round"], plan["round"]) == (1, 2)
    weights = set(plan["weights"])
    assert len(plan["nodes"]["0"]["ranks"]) == len(weights) == 12
    assert len(plan["nodes"]["2"]["ranks"]) < 12
    for name, told in plan["nodes"].items():
        assert told["bytes"] <= grid.budgets[name]
        message = grid.sent[name, "train"][1]
        planned = Planned.from_config(message.content["config"])
        assert (planned.bits, planned.batch_size, planned.bytes) == (
            told["bits"],
            told["batch_size"],
            told["bytes"],
        )
        assert modules_of(decode(message.content["arrays"])) == told["ranks"]
        assert not message.content["config"]["ask-importance"]
        assert grid.sent[name, "train"][0].content["config"]["ask-importance"]
    # The global adapter has every weight at the full rank, whoever held it.
    assert modules_of(decode(result.arrays)) == dict.fromkeys(
        modules_of(load_bundle(registry.config_from_flat(flat), tuple(sorted(WORDS))).initial_state), 8
    )
    timed = events_of(tmp_path, "round-timed")
    assert [event["round"] for event in timed] == [1, 2, 3]
    assert timed[1]["seconds"] == max(told["seconds"] for told in plan["nodes"].values())
    assert result.train_metrics_clientapp[2]["simulated-seconds"] == timed[1]["seconds"]
    assert json.loads((tmp_path / "runs/r/plan.json").read_text())["nodes"] == plan["nodes"]
    page = (tmp_path / "runs/r/report.html").read_text()
    assert "<h2>Plan</h2>" in page
    assert "2 · 16 bit · batch 2" in page
    assert not events_of(tmp_path, "warning")


def test_a_resumed_run_ends_with_the_same_bits(flat, tmp_path):
    whole, _ = run(flat, run__name="whole", rounds=4)
    run(flat, rounds=2)
    resumed, _ = run(flat, rounds=4, run__resume=True)
    expected, found = decode(whole.arrays), decode(resumed.arrays)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [e["round"] for e in events_of(tmp_path, "planned")] == [1, 2]


def test_the_run_goes_on_without_a_node_that_cannot_hold_the_model(flat, tmp_path):
    result, grid = run(flat, {"0": RICH, "1": RICH, "2": 50_000}, rounds=2)
    (rejected,) = events_of(tmp_path, "node-rejected")
    assert rejected["node"] == "2"
    assert "node 2: needed are" in rejected["reason"]
    assert "available are 50000" in rejected["reason"]
    assert grid.sent["2", "train"] == []
    assert max(result.train_metrics_clientapp) == 2


def test_a_reply_at_another_rank_than_planned_is_dropped_and_named(flat, tmp_path):
    def widened(message, name, reply):
        if name == "0" and message.content["config"]["server-round"] == 2:
            reply.content["arrays"] = encode(
                {
                    key: torch.cat([t, t], dim=0 if "lora_A" in key else 1) if "lora_" in key else t
                    for key, t in decode(reply.content["arrays"]).items()
                }
            )
        return reply

    run(flat, change=widened, rounds=2)
    (dropped,) = events_of(tmp_path, "node-dropped")
    assert dropped["node"] == "0"
    assert "has rank 16, expected rank 8" in dropped["reason"]


def test_nan_in_a_report_costs_the_report_and_not_the_adapter(flat, tmp_path):
    def spoiled(message, name, reply):
        if name == "0" and "importance" in reply.content:
            record = decode(reply.content["importance"])
            first = next(iter(record))
            reply.content["importance"] = encode({**record, first: record[first] * float("nan")})
        return reply

    run(flat, {"0": RICH, "1": RICH, "2": RICH}, change=spoiled, rounds=2)
    (warning,) = events_of(tmp_path, "warning")
    assert "round 1: node 0: importance of bert.encoder.layer.0" in warning["message"]
    assert "the report is not used, the adapter is" in warning["message"]
    assert [e["replies"] for e in events_of(tmp_path, "aggregated")] == [3, 3]


def test_a_budget_that_shrinks_between_plan_and_reply_costs_one_reply(flat, tmp_path):
    def shrinking(message, name, reply):
        if name == "1" and message.content["config"]["server-round"] == 1:
            grid.budgets["0"] = POOR  # node 0 has answered the round; its plan for the next one is too large
        return reply

    flat = {**flat, "rounds": 5}
    grid = Grid(flat, {"0": RICH, "1": MIDDLE, "2": POOR}, shrinking)
    server.run(grid, flat)
    dropped = events_of(tmp_path, "node-dropped")
    assert {e["node"] for e in dropped} == {"0"}
    assert "memory-bytes is now 200,000" in dropped[0]["reason"]
    assert len(dropped) <= 2  # it is asked again at once, and planned for when the answer is there
    last = events_of(tmp_path, "planned")[-1]
    assert last["nodes"]["0"]["bytes"] <= POOR
    assert events_of(tmp_path, "aggregated")[-1]["replies"] == 3


def test_a_budget_that_grows_is_used_in_the_next_round(flat, tmp_path):
    def growing(message, name, reply):
        if name == "0" and message.content["config"]["server-round"] == 2:
            grid.budgets["2"] = RICH
        return reply

    grid = Grid(flat, {"0": RICH, "1": RICH, "2": POOR}, growing)
    server.run(grid, flat)
    plans = events_of(tmp_path, "planned")
    assert len(plans[-1]["nodes"]["2"]["ranks"]) == 12 > len(plans[-2]["nodes"]["2"]["ranks"])


@needs_bitsandbytes
def test_bases_of_three_widths_take_part_in_one_run_and_take_its_adapter(flat, tmp_path):
    """Full width, 8 and 4 bits; a llama, whose embedding is small beside its blocks."""
    keys = {
        "model.name": "tiny-random:llama",
        "fedpipe.bits": "32,8,4",
        "fedpipe.batch-sizes": 4,
        "fedpipe.warmup-rounds": 0,
    }
    flat = {**flat, **keys, "model.cache-bundles": 4, "server.fraction-evaluate": 1.0, "rounds": 2}
    budgets = {"0": 1_000_000, "1": 350_000, "2": 292_000}
    result, _ = run(flat, budgets)
    plan = events_of(tmp_path, "planned")[-1]
    assert {name: told["bits"] for name, told in plan["nodes"].items()} == {"0": 32, "1": 8, "2": 4}
    assert [e["replies"] for e in events_of(tmp_path, "aggregated")] == [3, 3]
    state = decode(result.arrays)
    config = registry.config_from_flat(flat)
    logits = {}
    for bits in (32, 8, 4):
        bundle = load_bundle(Planned(bits, 4).apply(config), tuple(sorted(WORDS)))
        bundle.load_adapter_state(state, any_ranks=True)
        with torch.no_grad():
            logits[bits] = bundle.model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits
    for bits in (8, 4):
        assert 0 < (logits[bits] - logits[32]).norm() < 0.5 * logits[32].norm()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model.quantization": "8bit"}, "model.quantization is 8bit"),
        ({"lora.rank-pattern": "query=2"}, "lora.rank-pattern"),
        ({"fedpipe.ranks": "4,16"}, r"fedpipe.ranks: 16 exceeds lora.rank \(8\)"),
        ({"fedpipe.bits": "16,5"}, "fedpipe.bits: expected some of 32, 16, 8 and 4, found 5"),
        ({"fedpipe.warmup-steps": 1}, "fedpipe.warmup-steps"),
        ({"lora.target-modules": "pooler.dense"}, "no module of a transformer block"),
        ({"lora.client-ranks": "2,4"}, "FedPipe has a way of its own"),
        ({"simulation.memory-megabytes": "400,600"}, "simulation.memory-megabytes has 2 values"),
    ],
)
def test_settings_that_leave_nothing_to_plan_are_refused_before_work(flat, keys, said):
    with pytest.raises(ConfigError, match=said):
        run({**flat, **keys})
