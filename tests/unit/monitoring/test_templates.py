"""What the chart makes of rules and dashboards for an installation of another name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import helm_python as helm
import promql_parser
import pytest
import yaml

from tests.unit.monitoring.promql import CHART, alerts, matchers, rules, selectors
from tests.unit.monitoring.test_rules import THRESHOLD, promtool

PARTS = ("Chart.yaml", "values.yaml", "rules", "dashboards", "templates/_helpers.tpl", "templates/monitoring")


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> helm.Chart:
    """The chart's monitoring alone: what the rest of the values needs does not matter here."""
    folder = tmp_path_factory.mktemp("chart") / "medforge"
    (folder / "templates").mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (CHART / part).is_dir() else shutil.copy
        copy(CHART / part, folder / part)
    return helm.Chart.load(str(folder))


def render(chart: helm.Chart, **monitoring: Any) -> dict[str, list[dict[str, Any]]]:
    """The objects by kind, of a release `rel` in the namespace `hospital`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in chart.render({"monitoring": monitoring}, name="rel", namespace="hospital").values():
        for document in yaml.safe_load_all(text):
            if document:
                assert document["metadata"]["namespace"] == "hospital"
                found.setdefault(document["kind"], []).append(document)
    return found


def groups(chart: helm.Chart, **more: Any) -> list[dict[str, Any]]:
    (document,) = render(chart, rules={"enabled": True, **more})["PrometheusRule"]
    found: list[dict[str, Any]] = document["spec"]["groups"]
    return found


def test_nothing_is_made_unless_it_is_asked_for(chart: helm.Chart) -> None:
    assert render(chart) == {}


def test_rules_see_their_own_installation_only(chart: helm.Chart) -> None:
    made = [rule for group in groups(chart) for rule in group["rules"]]
    assert len(made) == len(rules())
    for rule in made:
        for selector in selectors(promql_parser.parse(rule["expr"])):
            asked = matchers(selector)
            assert asked["namespace"] == "hospital"
            told = (asked.get("service"), asked.get("inferenceservice"))
            assert told in (("rel-medforge-gateway", None), (None, "rel-medforge-(stable|canary)"))


def test_rules_stay_rules(chart: helm.Chart, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups(chart)}))
    promtool("check", "rules", path)


def test_values_take_the_places_of_numbers(chart: helm.Chart) -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]["thresholds"]
    values = {name: index + 0.25 for index, name in enumerate(defaults)}
    made = [rule for group in groups(chart, thresholds=values) for rule in group["rules"]]
    found = {(name, float(number)) for rule in made for number, name in THRESHOLD.findall(rule["expr"])}
    assert found == set(values.items())
    (before,) = (rule for rule in made if rule.get("alert") == "MedForgeDrift")
    assert before["for"] == alerts()["MedForgeDrift"]["for"]


def test_runbooks_of_ones_own(chart: helm.Chart) -> None:
    made = [rule for group in groups(chart, runbooks="https://wiki.local/ki") for rule in group["rules"]]
    leads = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in made if "alert" in rule}
    assert leads == {name: f"https://wiki.local/ki/{name}.md" for name in alerts()}
    assert all(rule["annotations"]["summary"] for rule in made if "alert" in rule)


def test_an_alert_is_left_out(chart: helm.Chart) -> None:
    made = [rule.get("alert") for group in groups(chart, disabled=["MedForgeDrift"]) for rule in group["rules"]]
    assert "MedForgeDrift" not in made
    assert len(made) == len(rules()) - 1
    with pytest.raises(helm.HelmError, match="there is no alert MedForgeDrfit"):
        groups(chart, disabled=["MedForgeDrfit"])


def test_scraping(chart: helm.Chart) -> None:
    made = render(chart, scrape={"enabled": True, "labels": {"release": "prometheus"}, "interval": "15s"})
    (service,), (pods,) = made["ServiceMonitor"], made["PodMonitor"]
    assert service["metadata"]["labels"]["release"] == pods["metadata"]["labels"]["release"] == "prometheus"
    assert service["spec"]["selector"]["matchLabels"] == {
        "app.kubernetes.io/name": "medforge",
        "app.kubernetes.io/instance": "rel",
        "app.kubernetes.io/component": "gateway",
    }
    (match,) = pods["spec"]["selector"]["matchExpressions"]
    assert match["values"] == ["rel-medforge-stable", "rel-medforge-canary"]
    (endpoint,) = pods["spec"]["podMetricsEndpoints"]
    assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("15s", "10s")
    assert endpoint["relabelings"][0]["targetLabel"] == "inferenceservice"


def test_dashboards_are_carried_whole(chart: helm.Chart) -> None:
    made = render(chart, dashboards={"enabled": True, "annotations": {"grafana_folder": "MedForge"}})["ConfigMap"]
    for document in made:
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert document["metadata"]["annotations"] == {"grafana_folder": "MedForge"}
        ((name, text),) = document["data"].items()
        assert json.loads(text) == json.loads((CHART / "dashboards" / name).read_text())
    assert len(made) == len(list((CHART / "dashboards").glob("*.json")))
