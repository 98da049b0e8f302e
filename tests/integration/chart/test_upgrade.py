"""Upgrades: what must not change does not, and by `lookup` at a live API server what a rollout made is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import helm_python as helm
import pytest
import yaml

from medforge.rollout.routing import Place, Routing, parse
from medforge.rollout.services import PREVIOUS, canary_of, with_release
from medforge.rollout.services import RELEASE as RELEASED
from tests.integration.chart.api import serving
from tests.unit.chart.rendering import (
    CHART,
    EVERYTHING,
    PILOT,
    PRODUCTION,
    RELEASE,
    SCHEDULE,
    SETS,
    Object,
    Values,
    merged,
    objects,
    one,
)

IMMUTABLE = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
    "PersistentVolumeClaim": ("accessModes", "storageClassName"),
}
FIRST = PRODUCTION["stable"]["release"]


def live(values: Values, cluster: list[Object], tmp_path: Path) -> tuple[list[Object], list[str]]:
    """The chart's objects as an upgrade renders them at a cluster with these objects, and what was looked up."""
    with serving(cluster, "med") as (kubeconfig, asked), helm.Chart.load(CHART) as chart:
        file = tmp_path / "kubeconfig"
        file.write_text(kubeconfig)
        with helm.Config(kubeconfig_path=file, namespace="med") as config:
            rendered = config.render(chart, values, name="medforge", namespace="med")
    found = [
        document
        for template, text in rendered.items()
        if template.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return found, asked


def after_a_rollout(values: Values) -> list[Object]:
    """Stable and routing as `medforge deploy … promote` leaves them, with another canary under way."""
    found = copy.deepcopy(objects(values))
    stable, routing = one(found, "InferenceService"), one(found, "ConfigMap", "medforge-routing")
    stable["metadata"]["namespace"] = routing["metadata"]["namespace"] = "med"
    changed = with_release(stable, RELEASE, {RELEASED: RELEASE, PREVIOUS: FIRST})
    stable["metadata"]["annotations"] |= changed["metadata"]["annotations"]
    stable["spec"]["predictor"]["model"] |= changed["spec"]["predictor"]["model"]
    canary = canary_of(stable, "medforge-canary", "ef" * 32, "run")
    url = parse(routing["data"]["routing.json"], "").stable.url
    candidate = Place(url.replace("stable", "canary"), "ef" * 32)
    routing["data"]["routing.json"] = json.dumps(Routing(Place(url, RELEASE), candidate, 0.1).document())
    return [stable, canary, routing]


def test_an_upgrade_keeps_what_a_rollout_made(tmp_path: Path) -> None:
    cluster = after_a_rollout(PRODUCTION)
    found, asked = live(merged(PRODUCTION, {"predictor": {"maxBatch": 16}}), cluster, tmp_path)
    stable = one(found, "InferenceService")
    assert stable["metadata"]["annotations"]["medforge.io/release"] == RELEASE
    assert stable["metadata"]["annotations"]["medforge.io/previous-release"] == FIRST
    assert stable["spec"]["predictor"]["model"] == cluster[0]["spec"]["predictor"]["model"]
    assert FIRST not in json.dumps(stable["spec"])
    assert one(found, "ConfigMap", "medforge-routing")["data"] == cluster[2]["data"]
    assert "--max-batch=16" in one(found, "ServingRuntime")["spec"]["containers"][0]["args"]
    assert {path.rpartition("/")[2] for path in asked} == {"medforge-stable", "medforge-routing"}


def test_the_first_install_takes_the_values(tmp_path: Path) -> None:
    found, asked = live(PRODUCTION, [], tmp_path)
    assert asked
    assert found == objects(PRODUCTION)


def test_an_upgrade_without_a_release_in_the_values_goes_on_serving(tmp_path: Path) -> None:
    values = merged(PRODUCTION, {"stable": {"release": ""}})
    assert not [o for o in objects(values) if o["kind"] == "InferenceService"]
    found, _ = live(values, after_a_rollout(PRODUCTION), tmp_path)
    assert one(found, "InferenceService")["metadata"]["annotations"]["medforge.io/release"] == RELEASE


def test_with_gitops_the_values_count_and_nothing_is_looked_up(tmp_path: Path) -> None:
    found, asked = live(SETS["gitops"], after_a_rollout(PRODUCTION), tmp_path)
    assert asked == []
    assert one(found, "InferenceService", "medforge-stable")["metadata"]["annotations"]["medforge.io/release"] == FIRST


@pytest.mark.parametrize("kind", IMMUTABLE)
def test_what_kubernetes_does_not_let_change_stays(kind: str) -> None:
    """Between two renders with nearly every value changed but size, class and access of disks."""
    before = objects(merged(PILOT, {"stable": {"release": FIRST}, "reviewers": PRODUCTION["reviewers"]}))
    after = objects(
        merged(
            PILOT,
            {key: EVERYTHING[key] for key in ("commonLabels", "predictor", "reviewers", "rollout", "stable", "tests")},
            {"images": EVERYTHING["images"], "gateway": {"podAnnotations": {"a": "b"}, "service": {"port": 8443}},
             "seaweedfs": {"resources": {"limits": {"memory": "4Gi"}}}, "pipelines": {"schedule": SCHEDULE}},
        )
    )  # fmt: skip
    names = {o["metadata"]["name"] for o in before if o["kind"] == kind}
    assert names and names <= {o["metadata"]["name"] for o in after if o["kind"] == kind}
    for name in names:
        old, new = one(before, kind, name)["spec"], one(after, kind, name)["spec"]
        assert old != new or kind == "PersistentVolumeClaim"
        for field in IMMUTABLE[kind]:
            assert old.get(field) == new.get(field), (name, field)


def test_a_new_version_of_the_chart_loads_no_model_anew(tmp_path: Path) -> None:
    """Nothing of the InferenceService, whose labels its pods bear, names the chart's version."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    stable = one(objects(PRODUCTION), "InferenceService")
    assert about["version"] not in json.dumps(stable["metadata"]["labels"])
    assert "helm.sh/chart" not in stable["metadata"]["labels"]


def test_two_releases_in_a_namespace_share_no_name() -> None:
    one_of, other = ({(o["kind"], o["metadata"]["name"]) for o in objects(PILOT, name)} for name in ("med-a", "med-b"))
    assert one_of & other == {("ConfigMap", "kfp-launcher")}
