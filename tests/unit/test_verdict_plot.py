"""Verdicts in the history and in the report."""

import json
import re

from fedllm.history import RunHistory
from fedllm.report import load_run, write_report
from fedllm.verdict_plot import verdict_picture
from tests.sample_run import finished_run, save


def event(server_round, kept, scores):
    return {
        "event": "verdict",
        "time": 1.0,
        "round": server_round,
        "defence": "VERT",
        "kept": kept,
        "scores": scores,
        "factors": {name: float(k) for name, k in kept.items()},
    }


def test_history_keeps_the_verdicts_of_a_round():
    history = RunHistory.of([event(2, {"a": True, "b": False}, {"a": 0.9, "b": None})])
    verdicts = history.rounds[2].verdicts
    assert verdicts["a"].kept
    assert verdicts["a"].score == 0.9
    assert not verdicts["b"].kept
    assert verdicts["b"].score != verdicts["b"].score


def test_a_round_that_starts_again_forgets_its_verdicts():
    again = {"event": "round-started", "time": 2.0, "round": 2, "nodes": ["a"]}
    history = RunHistory.of([event(2, {"a": False}, {"a": -0.5}), again])
    assert not history.rounds[2].verdicts


def test_picture_and_words():
    history = RunHistory.of(
        [
            event(1, {f"n{i}": True for i in range(3)}, {f"n{i}": 0.5 for i in range(3)}),
            event(2, {"n0": True, "n2": False}, {"n0": 0.5, "n2": -0.7}),
        ]
    )
    text, svg = verdict_picture(history.ordered_rounds)
    assert text.startswith("Rounds 1 to 2: 1 of 5 replies of 3 clients were rejected")
    assert svg.startswith("<svg")
    assert svg.count("<use") >= 1
    assert "n2" in svg
    assert verdict_picture([]) is None


def test_the_report_shows_them_escaped(tmp_path):
    save(finished_run().events, tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event(1, {"<b>": False}, {"<b>": -0.1})) + "\n")
    assert load_run(tmp_path).rounds[1].verdicts
    page = write_report([tmp_path]).read_text()
    assert "<h2>Verdicts</h2>" in page
    assert "<b>" not in re.sub(r"&lt;b&gt;", "", page)
