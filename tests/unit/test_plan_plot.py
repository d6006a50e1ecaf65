"""The plan in words and as a picture."""

import pytest

from fedllm.history import RunHistory
from fedllm.narration import summary_line
from fedllm.plan_plot import plan_pictures, rank_grid, short_names

WEIGHTS = ["bert.layer.0.query", "bert.layer.0.value", "bert.layer.1.query"]


def planned(server_round, phase, **nodes):
    told = {
        name: {"bits": bits, "batch_size": 4, "ranks": dict(zip(WEIGHTS, ranks, strict=False))}
        for name, (bits, ranks) in nodes.items()
    }
    fields = {"round": server_round, "phase": phase, "weights": WEIGHTS, "nodes": told, "refused": {}}
    return {"event": "planned", "time": 1.0, **fields}


def started(server_round):
    return {"event": "round-started", "time": 1.0, "round": server_round, "nodes": ["a"]}


def history(*events):
    return RunHistory.of(events)


def test_rows_are_nodes_in_natural_order_and_columns_weights():
    plan = history(planned(2, "plan", n10=(4, [1]), n2=(8, [8, 0, 16]))).plans[0]
    assert rank_grid(plan) == (["n2", "n10"], [[8, 0, 16], [1, 0, 0]])


def test_names_lose_what_they_share():
    assert short_names(WEIGHTS) == ["0.query", "0.value", "1.query"]
    assert short_names(["query"]) == ["query"]


def test_the_last_plan_of_every_phase_is_drawn():
    run = history(
        planned(1, "warm-up", a=(16, [4, 4, 4])),
        started(1),
        planned(2, "plan", a=(16, [8, 8, 8]), b=(4, [2])),
        started(2),
        planned(4, "plan", a=(16, [16, 8, 8]), b=(4, [2])),
        started(4),
    )
    (warm, _), (plan, drawing) = plan_pictures(run.plans)
    assert warm == "Warm-up from round 1 on: 1 clients, 3 of 3 adapters, ranks 4 to 4"
    assert plan == "Plan from round 4 on: 2 clients, 4 of 6 adapters, ranks 2 to 16"
    assert drawing.startswith("<svg")
    for text in ("b · 4 bit · batch 4", "1.query", ">16<"):
        assert text in drawing, text


def test_a_resumed_run_forgets_the_plans_of_the_rounds_that_it_repeats():
    resumed = {"event": "run-resumed", "time": 2.0, "round": 2, "path": ""}
    run = history(planned(2, "plan", a=(4, [1])), started(2), planned(3, "plan", a=(4, [2])), resumed)
    assert [plan.round for plan in run.plans] == [2]
    run.update(started(3))
    assert [plan.round for plan in run.plans] == [2]


def test_without_a_plan_there_is_no_picture():
    assert plan_pictures(history(started(1)).plans) == []


@pytest.mark.parametrize("count", [2, 12])
def test_the_log_line_names_bits_batch_and_ranks(count):
    event = planned(3, "plan", **{f"n{i}": (8, [2, 4]) for i in range(count)})
    line = summary_line(history(event), event)
    assert line.startswith(
        f"round 3: plan for {count} clients; n0: 8 bits, batch 4, ranks 2 to 4 on 2 of 3 weights"
    )
    assert ("and 4 more" in line) == (count == 12)
