"""The dependency rule of docs/architecture.md, read off the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {
        "errors",
        "seeding",
        "config",
        "tasks",
        "lora",
        "records",
        "packing",
        "encoded",
        "batches",
        "generation",
        "tokenization",
    }
    | {"allocator", "live_memory", "tangents", "outcomes", "curvature", "logs", "kept", "interruption"},
    {"models", "model_sources", "base_models", "tiny_models", "lora_targets", "checkpoint", "events", "sinks"}
    | {"metrics", "prometheus_sink"}
    | {"data", "data_sources", "run_rows", "rows", "chatterbot", "token_cache", "partition", "progress_bars"}
    | {"history", "narration", "frozen"}
    | {
        "adapter_ranks",
        "model_spec",
        "importance_report",
        "planned",
        "resources",
        "peak_memory",
        "model_version",
    },
    {
        "accumulate",
        "spool",
        "nodes",
        "exchange",
        "strategy",
        "rounds",
        "update",
        "split",
        "registry",
        "wrapper",
        "hostile",
    }
    | {"adapter_means", "aggregation"},
    {"server", "client", "report", "plots", "plan_plot", "verdict_plot", "progress"},
    {"server_app", "client_app", "simulate", "superlink", "watch", "doctor", "scaffold", "listing"}
    | {"app_config", "processes", "mode_advice", "flower", "node", "ray_cluster"},
    {"cli", "node_cli", "study"},
    {"__main__"},
]
PURE = {"torch", "numpy", "scipy", *sys.stdlib_module_names}


def imports(path):
    """Modules that a file imports, at its top level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("fedllm"), ids=lambda path: path.name)
def test_core_knows_no_strategy_and_no_client(path):
    wrong = [name for name in imports(path) if name.startswith(("fedllm.strategies", "fedllm.clients"))]
    assert not wrong


def test_strategies_and_clients_never_import_each_other():
    for folder, other in (("strategies", "fedllm.clients"), ("clients", "fedllm.strategies")):
        for path in sources(folder):
            assert not [name for name in imports(path) if name.startswith(other)], path


def test_layers_import_downwards_only():
    for level, names in enumerate(LAYERS):
        higher = set().union(*LAYERS[level + 1 :])
        for name in names:
            for path in [ROOT / "fedllm" / f"{name}.py", *sources(f"fedllm/{name}")]:
                if path.exists():
                    wrong = {n.split(".")[1] for n in imports(path) if n.startswith("fedllm.")} & higher
                    assert not wrong, f"{path.name} imports {wrong}"


def test_every_module_has_a_layer():
    known = set().union(*LAYERS) | {"__init__"}
    assert {
        path.relative_to(ROOT / "fedllm").parts[0].removesuffix(".py") for path in sources("fedllm")
    } <= known


def test_adapter_algebra_is_pure():
    for path in sources("fedllm/lora"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= PURE | {"fedllm"}, path


@pytest.mark.parametrize("folder", ["fedllm", "strategies", "clients"])
def test_only_flowers_public_api_is_imported(folder):
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    for path in sources(folder):
        wrong = [name for name in imports(path) if name.startswith("flwr.") and not name.startswith(public)]
        assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("folder", ["fedllm", "strategies", "clients", "examples", "benchmarks"])
def test_nothing_is_unpickled(folder):
    for path in sources(folder):
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(imports(path)), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path
