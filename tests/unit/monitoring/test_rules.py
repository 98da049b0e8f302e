"""The alerts: what they ask for exists, each is tried in both ways, and each has a runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.unit.monitoring.promql import (
    CHART,
    PROMTOOL_TESTS,
    RULES,
    RUNBOOKS,
    alerts,
    grouped,
    known,
    rules,
    selectors,
    walk,
    wrong,
)

ALERTS = sorted(alerts())
THRESHOLD = re.compile(r"([0-9.]+)\)*  # (\w+)$", re.MULTILINE)


def promtool(*arguments: str | Path) -> None:
    """Run it; AssertionError with what it says if it fails. Skips where it is missing."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    ended = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@cache
def tried(firing: bool) -> frozenset[str]:
    """The alerts that a test of promtool expects to fire, or to be silent, for some service."""
    found: set[str] = set()
    for path in PROMTOOL_TESTS:
        for scenario in yaml.safe_load(path.read_text())["tests"]:
            for one in scenario["promql_expr_test"]:
                asked = re.search(r'alertname=~?"([^"]+)"', one["expr"])
                if asked and bool(one["exp_samples"]) == firing:
                    found |= set(asked[1].split("|"))
    return frozenset(found)


def test_rules_are_prometheus_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", PROMTOOL_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent(path: Path) -> None:
    promtool("test", "rules", path)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tried_in_both_ways(alert: str) -> None:
    assert (alert in tried(firing=True), alert in tried(firing=False)) == (True, True)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_ask_for_what_is_shown(rule: dict[str, Any]) -> None:
    assert wrong(rule["expr"], known()) == []


def test_a_query_for_what_nobody_shows_is_found() -> None:
    names = known()
    assert wrong("sum by (pod) (medforge_gateway_in_flight)", names) == []
    assert wrong("medforge_gateway_requests", names) == ["no metric medforge_gateway_requests"]
    assert wrong('medforge_gateway_refused_total{track="stable"}', names) == [
        "medforge_gateway_refused_total has no label track"
    ]
    assert wrong('medforge_gateway_refused_total{reason="queues"}', names) == ["reason=queues is nowhere in the code"]
    assert wrong("sum by (route) (medforge_gateway_in_flight)", names) == ["no label route"]
    assert wrong("a_sum / on (digest) medforge:match_score:mean1d", names) == ["no metric a_sum", "no label digest"]


def test_a_service_and_its_namespace_are_told() -> None:
    """Two installations under one Prometheus are two services: nothing is summed over them."""
    for rule in rules():
        for node in walk(promql_parser.parse(rule["expr"])):
            labels = grouped(node)
            if isinstance(node, promql_parser.AggregateExpr) or labels:
                assert "namespace" in labels, rule
                assert "service" in labels or "inferenceservice" in labels, rule


@pytest.mark.parametrize("name", ALERTS)
def test_labels_and_annotations(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["labels"]) <= {"severity", "rollback", "track"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert "namespace" in rule["annotations"]["description"]
    assert Path(rule["annotations"]["runbook_url"]).name == f"{name}.md"


def test_what_ends_a_canary_is_about_the_candidate() -> None:
    ending = {name for name, rule in alerts().items() if rule["labels"].get("rollback")}
    assert ending == {name for name in ALERTS if name.startswith("MedForgeCanary")}
    for name in ending:
        assert alerts()[name]["labels"]["rollback"] == "true"
        tree = promql_parser.parse(alerts()[name]["expr"])
        assert any('track="candidate"' in str(node) for node in selectors(tree))


def test_thresholds_are_those_of_the_values() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]["thresholds"]
    written: dict[str, set[float]] = {}
    for rule in rules():
        marked = THRESHOLD.findall(rule["expr"])
        assert len(marked) == rule["expr"].count("#"), rule["expr"]
        for number, name in marked:
            written.setdefault(name, set()).add(float(number))
    assert written == {name: {float(value)} for name, value in defaults.items()}


def test_each_alert_has_a_runbook_and_the_reverse() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    assert sorted(path.stem for path in RUNBOOKS.glob("MedForge*.md")) == ALERTS
    assert sorted(re.findall(r"\]\((MedForge\w+)\.md\)", index)) == ALERTS


@pytest.mark.parametrize("name", ALERTS)
def test_a_runbook_says_all_that_it_has_to(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["What it means", "Who is affected", "Look at", "Do", "Do not", "Escalate"]
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        assert (RUNBOOKS / link).exists(), link


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_queries_of_runbooks_ask_for_what_is_shown(path: Path) -> None:
    for block in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL):
        for query in block.strip().split("\n\n"):
            assert wrong(query, known()) == [], query
