"""A hundred rounds take no more memory than ten, and nothing is left of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(4500)]

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize("side", ["simulated", "deployed"])
def test_a_hundred_rounds_take_no_more_memory_than_ten(side, tmp_path):
    found = tmp_path / "soak.json"
    subprocess.run(
        [sys.executable, str(SOAK), "--side", side, "--json", str(found)], check=True, timeout=4200
    )
    figures = json.loads(found.read_text())
    kinds = {
        "simulated": ("superlink", "serverapp", "worker"),
        "deployed": ("superlink", "serverapp", "worker", "supernode"),
    }
    for kind in kinds[side]:
        settled, last = figures[f"{side}_{kind}_settled_bytes"], figures[f"{side}_{kind}_last_bytes"]
        assert last - settled < max(0.05 * settled, 8 << 20), kind
    assert figures[f"{side}_left"] == ""
