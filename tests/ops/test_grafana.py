"""The dashboards: as their code says, laid out without overlap, and of metrics that workers have."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from producer.ledger.calls import Backlog
from workers.gpu import GpuReading
from workers.metrics import Metrics, WorkerState

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "ops" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


@pytest.fixture(scope="module")
def code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", GRAFANA / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.name)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())  # type: ignore[no-any-return]


def expressions() -> list[str]:
    """All of both dashboards, and of the alerts."""
    of_panels = [
        target["expr"]
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]
    rules = yaml.safe_load((ROOT / "ops" / "prometheus" / "alerts.yml").read_text())
    return of_panels + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_the_files_are_what_the_code_writes(code: ModuleType) -> None:
    written = {name: code.as_text(content) for name, content in code.dashboards().items()}

    assert {path.name: path.read_text() for path in DASHBOARDS} == written


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_below
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_everything_asks_the_datasource_that_is_provisioned(dashboard: dict[str, Any]) -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    (datasource,) = provisioned["datasources"]

    asked = [target["datasource"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked += [variable["datasource"] for variable in dashboard["templating"]["list"]]
    assert asked
    assert all(each == {"type": datasource["type"], "uid": datasource["uid"]} for each in asked)


def test_a_variable_that_is_used_is_defined(dashboard: dict[str, Any]) -> None:
    used = set(re.findall(r"\$(\w+)", json.dumps([panel.get("targets") for panel in dashboard["panels"]])))
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}

    assert used - {"__rate_interval"} == defined


def test_only_metrics_that_a_worker_has_are_asked_for() -> None:
    metrics = Metrics(model="m")
    metrics.watch(WorkerState)
    backlog = Backlog((0,) * 10, (0.0,) * 10, 0, 0, 0, 0, 1, 0, {})
    metrics.watch_backlog(lambda: (backlog, 0))
    metrics.watch_gpu(lambda: GpuReading("H100", 1, 2, 0.5, 40.0, 100.0))
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    known = {
        family.name + suffix
        for family in metrics.registry.collect()
        for suffix in suffixes.get(family.type, ("",))
    }
    # The engine has no process here, and Prometheus itself says what is up.
    known |= {"up", "glmq_engine_process_cpu_seconds_total", "glmq_engine_process_resident_memory_bytes"}

    asked = {
        name
        for expression in expressions()
        for name in re.findall(r"\b(?:vllm:|glmq_|celery_|process_)\w+|\bup\b", _without_labels(expression))
    }
    assert len(asked) > 50
    assert asked <= known, asked - known


def _without_labels(expression: str) -> str:
    return re.sub(r"\{[^}]*\}|by \([^)]*\)|on \([^)]*\)", "", expression)
