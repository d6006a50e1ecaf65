"""examples/second_order as Flower runs it: its own ServerApp and ClientApp in real processes."""

import json
import shutil
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedllm.superlink import PrivateSuperLink

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "second_order"


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"network": "logistic"}, 0.8),
        ({"network": "lenet"}, 0.5),
        ({"network": "logistic", "preset": "paper", "rho": 5.0}, 0.5),
    ],
    ids=["ours", "lenet", "paper"],
)
def test_the_example_learns_digits(tmp_path, settings, least):
    pytest.importorskip("sklearn")
    app, out = tmp_path / "app", tmp_path / "figures.json"
    shutil.copytree(EXAMPLE, app, ignore=shutil.ignore_patterns("__pycache__"))
    pyproject = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    config = pyproject["tool"]["flwr"]["app"]["config"]
    assert set(settings) <= set(config)
    config |= {**settings, "rounds": 6, "alpha": 1.0, "out": str(out)}
    (app / "pyproject.toml").write_text(tomli_w.dumps(pyproject), encoding="utf-8")
    with PrivateSuperLink() as link:
        run = link.start_run(app, {"num-supernodes": 4, "client-resources-num-cpus": 1})
        ends = time.monotonic() + 600
        while not (status := link.status(run)).finished:
            assert time.monotonic() < ends, link.app_log(run)[-3000:]
            time.sleep(1)
        assert status.completed, f"{status}\n{link.app_log(run)[-3000:]}"
    accuracy = json.loads(out.read_text(encoding="utf-8"))["accuracy"]
    assert len(accuracy) == 7  # before the first round, too
    assert accuracy[-1] >= least > accuracy[0]
