"""What the tests of benchmarks share: their modules, and tables of invented texts."""

import importlib
import random
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name, monkeypatch):
    """A benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def write_texts(folder, train_rows, test_rows):
    """Write train.csv and test.csv, whose rows are the first of train.csv, with four classes."""
    chooser = random.Random(0)
    rows = [
        f"{chooser.choice(['up', 'down'])} {chooser.randrange(10)},{chooser.choice('abcd')}"
        for _ in range(train_rows)
    ]
    for name, lines in (("train.csv", rows), ("test.csv", rows[:test_rows])):
        (folder / name).write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder
