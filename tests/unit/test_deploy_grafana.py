"""The dashboard shows only what there is."""

import json
import re

from fedllm.node.health import WorkerHealth
from fedllm.node.metrics import _WorkerCollector
from fedllm.prometheus_sink import METRICS, PREFIX
from tests.deploy_files import DEPLOY

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_sum", "_count", "_bucket")}


def known():
    """Labels by metric, as Prometheus gets them."""
    found = {
        f"{PREFIX}{metric.name}{suffix}": {"run", *metric.labels}
        for metric in METRICS
        for suffix in SUFFIXES[metric.kind]
    }
    for family in _WorkerCollector(lambda: WorkerHealth(pid=1, version="1", started_at=0.0)).collect():
        found |= {sample.name: {"instance", *sample.labels} for sample in family.samples}
    return found


def dashboard():
    return json.loads((DEPLOY / "grafana" / "fedllm.json").read_text())


def test_every_metric_and_label_exists():
    labels, shown = known(), set()
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"\bfedllm_\w+", target["expr"])
            assert names, panel["title"]
            assert set(names) <= labels.keys(), panel["title"]
            shown |= set(names)
            used = {
                label
                for part in re.findall(r"[({]([\w, ]+?)(?:\)|=)", target["expr"])
                for label in part.split(", ")
            }
            used = {label for label in used if not label.startswith("fedllm_")}
            used |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert used <= set.union(*(labels[name] for name in names)), panel["title"]
    assert len(shown) > 20


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in panels)
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_list_of_runs_comes_from_a_metric_that_every_run_has():
    run = next(variable for variable in dashboard()["templating"]["list"] if variable["name"] == "run")
    assert run["query"]["query"] == "label_values(fedllm_run_info, run)"
    assert "fedllm_run_info" in known()
