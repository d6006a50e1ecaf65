"""The benchmarks start, and what they write is flat JSON; what they measure is not run here."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED = {
    "code_identity.py",
    "federation.py",
    "harness.py",
    "mnist.py",
    "poisoning_arena.py",
    "poisoning_cells.py",
    "poisoning_cost.py",
    "poisoning_defences.py",
    "poisoning_figures.py",
    "second_order_methods.py",
}
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.name not in SHARED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_names_the_common_options(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert {"--json", "--quick", "--seed"} <= set(done.stdout.replace(",", " ").split())


def test_report_writes_flat_json_with_machine_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    out = tmp_path / "new" / "figures.json"
    args = argparse.Namespace(json=out, quick=True, seed=7)
    harness.report(args, {"ratio": 2.5, "rounds_to_086": None}, [("", "ratio"), ("speed", 2.5)], "Speed")

    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures | {"ratio": 2.5, "rounds_to_086": None, "seed": 7, "quick": True} == figures
    assert {"machine_cpus", "machine_memory_gib", "machine_gpu", "torch_version", "flwr_version"} <= set(
        figures
    )
    assert not any(isinstance(value, dict | list) for value in figures.values())


def test_stage_refuses_keys_that_the_app_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    with pytest.raises(KeyError, match="learning_rate"):
        harness.stage("ag_news_stock", tmp_path, {"learning_rate": 1.0})
    staged = harness.stage("ag_news_stock", tmp_path / "good", {"rounds": 3})
    assert "rounds = 3" in (staged / "pyproject.toml").read_text(encoding="utf-8")


def test_ag_news_says_what_to_pass_when_the_data_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ag_news

    monkeypatch.setattr(sys, "argv", ["ag_news.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data FOLDER") as refused:
        ag_news.main()
    assert str(tmp_path / "train.csv") in str(refused.value)


def test_ag_news_stock_app_takes_its_settings_from_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ag_news

    from fedllm import app_config, registry

    config = registry.config_from_flat(app_config.read_app(ag_news.ROOT / "examples" / "ag_news").config)
    stock = app_config.read_app(BENCHMARKS / "apps" / "ag_news_stock").config
    assert {key: stock[key] for key in ag_news.SHARED_KEYS} == {
        key: config.to_flat()[ours] for key, ours in ag_news.SHARED_KEYS.items()
    }
