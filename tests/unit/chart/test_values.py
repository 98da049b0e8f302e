"""Mistakes in values: each is told by its field, with what mends it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import helm_python as helm
import jsonschema
import pytest

from pipelines.cron import parse as parse_cron
from serving.gateway.settings import Settings
from tests.unit.chart.rendering import CHART, OTHER, PILOT, PRODUCTION, SCHEDULE, SITE, Values, at, file, merged, render

CHARTS_OWN = {
    "environment", "host", "port", "data_dir", "secret_key", "stable", "candidate", "candidate_weight",
    "stable_release", "candidate_release", "upstream_key", "redis", "database", "reference", "routing",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "mend"),
    [
        (at("commonLabels", {"app.kubernetes.io/name": "x"}), "commonLabels.app.kubernetes.io/name", "choose another"),
        (at("gateway.redis", False), "gateway: 10 pods share", "set gateway.postgres and gateway.redis"),
        (at("gateway.autoscaling.minReplicas", 11), "gateway.autoscaling", "more than maxReplicas"),
        (at("gateway.data.accessMode", "ReadWriteOnce"), "gateway.data.accessMode", "ReadWriteMany"),
        (at("gateway.data.kind", "emptyDir"), "gateway.data.kind", "auditMayBeLost: true"),
        (at("gateway.data.auditMayBeLost", True), "gateway.data.auditMayBeLost", "no effect"),
        (at("gateway.settings.authentication", False), "gateway.settings.authentication", "does not allow"),
        (at("ingress.host", ""), "ingress.host is empty", "give the name"),
        (at("ingress.tlsSecret", ""), "ingress.tlsSecret is empty", "kubernetes.io/tls"),
        (at("route.enabled", True), "ingress.enabled and route.enabled", "choose one"),
        (at("images.gateway.digest", ""), "images.gateway.digest is empty", "skopeo inspect"),
        (at("seaweedfs.enabled", True), "objectStore.endpoint has no effect", "choose one"),
        (at("objectStore.endpoint", ""), "objectStore.endpoint is empty", "seaweedfs.enabled for a pilot"),
        (at("objectStore.externalSecret.enabled", True), "objectStore.externalSecret.storeName", "ClusterSecretStore"),
        (at("reviewers.keys", {"dr-smith.pub": None}), "reviewers.keys is empty", "public key"),
        (at("reviewers.existingConfigMap", "x"), "reviewers.keys has no effect", "choose one"),
        (at("reviewers.files", ["x.pub"]), "reviewers.files has no effect", "existingConfigMap"),
        (at("canary", {"enabled": True, "release": OTHER}), "canary.enabled", "medforge deploy RELEASE --canary"),
        (at("canary.release", OTHER), "canary.release has no effect", "canary.enabled"),
        (
            {"rollout": {"managedBy": "helm"}, "canary": {"enabled": True, "release": SITE["stable"]["release"]}},
            "canary.release", "stable's own",
        ),
        (at("predictor.keda.enabled", False), "predictor.maxReplicas has no effect", "predictor.keda.enabled"),
        (at("predictor.keda.serverAddress", ""), "predictor.keda.serverAddress", "Prometheus' URL"),
        (at("predictor.minReplicas", 7), "predictor: minReplicas", "more than maxReplicas"),
        (at("predictor.maxSurge", 0), "maxSurge and maxUnavailable", "no pod could ever be replaced"),
        (at("predictor.maxModelLen", 4096), "predictor.maxModelLen has no effect", "runtime medforge"),
        (at("predictor", {"runtime": "vllm", "queue": 5}), "predictor.queue has no effect", "extraArgs"),
        (at("predictor.existingRuntime", "x"), "predictor.existingRuntime", "runtime: vllm"),
        (at("pipelines.schedule.enabled", True), "pipelines.schedule.run is empty", "pipelines/configs"),
        (at("pipelines.schedule.multiUser", True), "pipelines.schedule.multiUser", "pipelines.schedule.enabled"),
        (at("pipelines.trainJobs", True), "pipelines.serviceAccount is empty", "name it"),
        (at("pipelines.serviceAccount", "runner"), "pipelines.serviceAccount has no effect", "pipelines.trainJobs"),
        (at("predictor.runtime", "vllm") | at("reviewers.keys", {"dr-smith.pub": None}), "reviewers.keys is empty",
         "no release is served"),
        (at("pipelines.schedule", {"enabled": True, "run": {"name": "x"}, "cron": "0 0,30/5 1-25 * * *"}),
         "pipelines.schedule.cron", "hour 25 is not within 0 to 23"),
        (at("networkPolicy.redis.to", []), "networkPolicy.redis.to is empty", "name its peers"),
        (at("networkPolicy.ingressFrom", []), "networkPolicy.ingressFrom is empty", "Ingress controller"),
        (at("gateway.settings", {"oidc_issuer": "https://x", "oidc_audience": "y"}), "networkPolicy.identityProvider",
         "could not be reached"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together(change: Values, field: str, mend: str) -> None:
    with pytest.raises(helm.HelmRenderError) as told:
        render(merged(PRODUCTION, change))
    lines = [line for line in str(told.value).splitlines() if field in line]
    assert len(lines) == 1 and lines[0].startswith("  - ") and mend in lines[0], str(told.value)


@pytest.mark.parametrize(
    "cron", ["59 00 23 31 12 6", "0 08 02 09 1-12 ?", "*/90 0 2 * JAN-DEC mon,WED", "0 0 2 1/99 * *"]
)
def test_what_kubeflow_takes_is_taken(cron: str) -> None:
    parse_cron(cron, datetime(2026, 1, 1, tzinfo=timezone.utc))
    render(merged(PRODUCTION, {"pipelines": {"schedule": SCHEDULE | {"cron": cron}}}))


def test_vllm_is_taken_by_digest_only() -> None:
    with pytest.raises(helm.HelmRenderError, match=r"images\.vllm\.digest is empty, and vLLM is taken by digest only"):
        render(merged(PILOT, {"predictor": {"runtime": "vllm"}}))


def test_all_that_production_needs_of_a_site_is_told_at_once() -> None:
    with pytest.raises(helm.HelmRenderError) as told:
        render(file("values-production.yaml"))
    for field in ("ingress.host", "images.gateway.digest", "images.predictor.digest", "images.data.digest",
                  "objectStore.endpoint", "networkPolicy.database.to", "networkPolicy.redis.to"):  # fmt: skip
        assert f"  - {field}" in str(told.value)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"gatway": {}}, "gatway"),
        (at("gateway.replica", 2), "replica"),
        (at("gateway.replicas", 0), "/gateway/replicas"),
        (at("gateway.replicas", "2"), "/gateway/replicas"),
        (at("gateway.settings.rates", "1/minute"), "rates"),
        (at("gateway.settings.rate", "1 per minute"), "/gateway/settings/rate"),
        (at("gateway.settings.stable", "http://elsewhere"), "stable"),
        (at("gateway.settings.match_threshold", 1.5), "/gateway/settings/match_threshold"),
        (at("stable.release", "latest"), "/stable/release"),
        (at("images.gateway.digest", "sha256:123"), "/images/gateway/digest"),
        (at("images.gateway.repository", "gateway@sha256:1"), "/images/gateway/repository"),
        (at("objectStore.endpoint", "https://s3.example"), "/objectStore/endpoint"),
        (at("objectStore.bucket", "Med_Forge"), "/objectStore/bucket"),
        (at("reviewers.keys", {"x.pub": "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"}), "x.pub"),
        (at("reviewers.keys", {"../x.pub": ""}), "/reviewers/keys"),
        (at("predictor.runtime", "triton"), "/predictor/runtime"),
        (at("predictor.gpu.count", -1), "/predictor/gpu/count"),
        (at("predictor.resources.limits.memory", "16 GB"), "/predictor/resources/limits/memory"),
        (at("pipelines.schedule.cron", "0 2 * * *"), "/pipelines/schedule/cron"),
        (at("images.registry", "https://registry.example"), "/images/registry"),
        (at("networkPolicy.ingressFrom", [{}]), "/networkPolicy/ingressFrom/0"),
        (at("rollout.managedBy", "argo"), "/rollout/managedBy"),
        (at("canary.weight", 10), "/canary/weight"),
        (at("monitoring.rules.thresholds.availability", 99.5), "/monitoring/rules/thresholds/availability"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(change: Values, where: str) -> None:
    with pytest.raises(helm.HelmValuesError) as told:
        render(merged(PRODUCTION, change))
    assert where in str(told.value)


def schema() -> dict[str, Any]:
    found = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_schema_is_one_and_knows_every_value() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    values, defs = file("values.yaml"), schema()["$defs"]

    def compare(value: Any, part: dict[str, Any], where: str) -> None:
        if "$ref" in part:
            part = defs[part["$ref"].rpartition("/")[2]]
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, where
        known = set(part["properties"])
        assert set(value) <= known, where
        if where.rpartition(".")[2] not in ("resources", "settings"):
            assert known - set(value) <= {"global"}, f"{where}: {known - set(value)} have no default"
        for key, item in value.items():
            compare(item, part["properties"][key], f"{where}.{key}")

    compare(values, schema(), "values")


def test_the_schemas_settings_are_the_gateways() -> None:
    """Each setting of the gateway is either the chart's own or may be given, with the gateway's bounds."""
    part = schema()["$defs"]["gatewaySettings"]["properties"]
    assert not CHARTS_OWN & set(part)
    assert set(part) == set(Settings.model_fields) - CHARTS_OWN
    theirs = Settings.model_json_schema()["properties"]
    for name, told in part.items():
        for bound in ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum"):
            if "$ref" not in told:
                assert told.get(bound) == theirs[name].get(bound), (name, bound)
