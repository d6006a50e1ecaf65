"""The comparison of gradient modes: its figures from given runs; the runs themselves are not made here."""

import importlib.util
from pathlib import Path

import pytest

from fedllm.history import RunHistory
from tests.sample_run import Script

SCRIPT = Path(__file__).parents[2] / "examples" / "forward_mode" / "compare.py"
CONFIG = {
    "model.name": "tiny-random:bert",
    "task": "sequence-classification",
    "lora.rank": 1,
    "lora.target-modules": "query,value",
    "train.batch-size": 8,
    "data.max-length": 32,
}


@pytest.fixture
def compare():
    spec = importlib.util.spec_from_file_location("compare_forward_mode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(accuracies):
    script = Script()
    script.start(config=CONFIG)
    script.join(["0", "1"])
    for number, accuracy in enumerate(accuracies, start=1):
        script.round(number, ["0", "1"], metrics={"accuracy": accuracy})
    return script.events


def test_table_and_picture_have_accuracy_time_memory_and_bytes(compare, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    drawn = []
    monkeypatch.setattr(compare, "write_report", lambda folders, page: page)
    draw = compare.write_png

    def write_png(panels, path, title):
        drawn.extend(panels)
        draw(panels, path, title)

    monkeypatch.setattr(compare, "write_png", write_png)
    histories = {
        "backprop": RunHistory.of(events([0.5, 0.75])),
        "forward-ad": RunHistory.of(events([0.25, 0.5])),
    }
    compare.compare(histories, tmp_path)
    printed = capsys.readouterr().out
    assert "0.750" in printed
    assert "2000.0" in printed  # kB of every reply of the invented runs
    assert (tmp_path / "forward_mode.png").stat().st_size > 10_000
    by = {panel.title: panel for panel in drawn}
    assert set(by) == {"Accuracy by time", "Accuracy by bytes sent", "Accuracy by memory"}
    sent = {series.label: series.points for series in by["Accuracy by bytes sent"].series}
    assert sent["backprop"] == ((4.0, 0.5), (8.0, 0.75))
    memory = {series.label: series.points[0][0] for series in by["Accuracy by memory"].series}
    assert 0 < memory["forward-ad"] < memory["backprop"]


def test_only_targeted_layers_count(compare):
    narrow = compare.memory("backprop", CONFIG)
    wide = compare.memory("backprop", CONFIG | {"lora.target-modules": "query,key,value,dense"})
    assert narrow < wide
