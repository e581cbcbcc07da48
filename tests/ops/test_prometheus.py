"""The alerts: valid, each shown firing and silent, each with a section for whoever it wakes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "ops" / "prometheus"
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
CASES: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
RUNBOOK = (ROOT / "ops" / "runbook.md").read_text()


def promtool(folder: Path, *arguments: str) -> None:
    ran = subprocess.run(
        [folder / "promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_prometheus_accepts_its_configuration_and_the_rules(prometheus_folder: Path) -> None:
    promtool(prometheus_folder, "check", "config", "prometheus.yml")
    promtool(prometheus_folder, "check", "rules", "--lint-fatal", "alerts.yml")


def test_every_alert_fires_when_it_should_and_only_then(prometheus_folder: Path) -> None:
    promtool(prometheus_folder, "test", "rules", "alerts_test.yml")


def test_a_threshold_that_is_wrong_would_be_noticed(prometheus_folder: Path, tmp_path: Path) -> None:
    """Of each alert, with its comparisons turned round, the cases must fail."""
    survivors = []
    for alert in ALERTS:
        rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if rule["alert"] == alert["alert"]:
                    rule["expr"] = rule["expr"].replace("== 0", "!= 0").replace("== 1", "!= 1")
                    rule["expr"] = re.sub(r">(?= [\d.]+\s*($|and\b))", "<", rule["expr"].strip())
                    assert rule["expr"] != alert["expr"].strip(), f"nothing to turn round in {alert['alert']}"
        (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
        cases = {
            "rule_files": ["alerts.yml"],
            "evaluation_interval": "30s",
            "tests": [case for case in CASES if case["name"].startswith(f"{alert['alert']}:")],
        }
        (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
        ran = subprocess.run(
            [prometheus_folder / "promtool", "test", "rules", tmp_path / "cases.yml"],
            capture_output=True,
            timeout=60,
        )
        if ran.returncode == 0:
            survivors.append(alert["alert"])
    assert survivors == []


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_shown_silent_and_firing(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    cases = [case for group in CASES for case in group["alert_rule_test"] if case["alertname"] == name]
    assert any(case["exp_alerts"] for case in cases), f"no case shows {name} firing"
    assert any(not case["exp_alerts"] for case in cases), f"no case shows {name} silent"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_urgent_it_is_and_where_help_is(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["runbook"] == f"ops/runbook.md#{name.lower()}"
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert section is not None, f"ops/runbook.md has no section {name}"
    for part in ("**Means**", "**Look**", "**Do**"):
        assert part in section[1], f"the section {name} lacks {part}"


def test_the_runbook_knows_no_alert_that_is_gone() -> None:
    sections = set(re.findall(r"^## (Glmq\w+)$", RUNBOOK, re.MULTILINE))
    assert sections == {alert["alert"] for alert in ALERTS}
