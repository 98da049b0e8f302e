"""Every set of values, rendered, against what others say of such manifests: Helm, Kubernetes' schemas, KServe's models,
the Pod Security standard; and against itself: what is named is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import helm_python as helm
import kserve.models
import kubernetes.client
import kubernetes_validate
import pytest

from tests.unit.chart.rendering import CHART, SETS, Object, containers, objects, one, pods, render

OLDER, NEWEST = ("1.29", "1.33"), "1.37"
OTHERS_KINDS = {
    "InferenceService", "ServingRuntime", "HTTPRoute", "ExternalSecret", "ServiceMonitor", "PodMonitor",
    "PrometheusRule",
}  # fmt: skip
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


@cache
def validate(document: str, version: str) -> None:
    """Check an object, as JSON, once: most are the same in every set. Raises ValidationError."""
    kubernetes_validate.validate(json.loads(document), version, strict=True)


@pytest.fixture(params=SETS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(name: str) -> list[Object]:
    return objects(SETS[name])


def test_helm_lints_it(name: str) -> None:
    report = helm.lint(CHART, SETS[name], strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_no_line_ends_in_blanks_and_no_value_is_lost(name: str) -> None:
    for template, text in render(SETS[name]).items():
        if template.endswith(".yaml") and "/monitoring/" not in template:
            assert not re.search(r"<no value>|%!|map\[", text), template


def test_kubernetes_knows_every_field(found: list[Object]) -> None:
    assert len([validate(json.dumps(o), NEWEST) for o in found if o["kind"] not in OTHERS_KINDS]) > 10


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("name", ["pilot", "everything"])
def test_older_versions_of_kubernetes_know_every_field(name: str, version: str) -> None:
    for o in objects(SETS[name]):
        if o["kind"] not in OTHERS_KINDS:
            validate(json.dumps(o), version)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    deployment = one(objects(SETS["least"]), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
        kubernetes_validate.validate(deployment, "1.33", strict=True)


def test_kserve_knows_every_field(found: list[Object]) -> None:
    for o in found:
        if o["kind"] in ("InferenceService", "ServingRuntime"):
            version = o["apiVersion"].rpartition("/")[2].capitalize()
            assert list(unknown(o, f"{version}{o['kind']}", o["kind"])) == []


def test_a_field_that_kserve_does_not_know_is_found() -> None:
    service = one(objects(SETS["production"]), "InferenceService")
    service["spec"]["predictor"]["model"]["storageURI"] = service["spec"]["predictor"]["topologySpreadConstraints"][0][
        "maxSkw"
    ] = 1
    assert len(list(unknown(service, "V1beta1InferenceService", ""))) == 2


def unknown(value: Any, kind: str, where: str) -> Iterator[str]:
    """Where a value differs from a model of kserve's or kubernetes' client: an unknown field, another type."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: is no list"
            return
        for number, item in enumerate(value):
            yield from unknown(item, found[1], f"{where}[{number}]")
    elif found := re.fullmatch(r"dict\((\w+), (.+)\)", kind):
        if not isinstance(value, dict):
            yield f"{where}: is no mapping"
            return
        for key, item in value.items():
            yield from unknown(item, found[2], f"{where}.{key}")
    elif kind in ("str", "int", "float", "bool", "datetime"):
        types_of = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "datetime": (str,)}
        if not isinstance(value, types_of[kind]) or (kind in ("int", "float") and isinstance(value, bool)):
            yield f"{where}: is no {kind}: {value!r}"
    elif kind in ("object", "IntOrString", "ResourceQuantity") or "Quantity" in kind:
        if isinstance(value, (dict, list)) and kind != "object":
            yield f"{where}: is no quantity"
    else:
        kind = kind.removeprefix("K8sIoApiAppsV1").removeprefix("K8sIoApiAutoscalingV2")
        names = (kind, f"V1{kind}", f"V2{kind}")
        model = next(
            (m for module in (kserve.models, kubernetes.client) for n in names if (m := getattr(module, n, None))), None
        )
        if model is None:
            yield f"{where}: no model {kind}"
            return
        if not isinstance(value, dict):
            yield f"{where}: is no {kind}"
            return
        types = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
        for key, item in value.items():
            if key not in types:
                yield f"{where}.{key}: {kind} has no such field"
            else:
                yield from unknown(item, types[key], f"{where}.{key}")


def test_pods_keep_the_restricted_standard(found: list[Object]) -> None:
    for where, _, spec in pods(found):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        assert all(set(volume) - {"name"} <= VOLUMES for volume in spec.get("volumes", [])), where
        for container in containers(spec):
            security = spec["securityContext"] | container["securityContext"]
            assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001, where
            assert security["seccompProfile"]["type"] == "RuntimeDefault", where
            assert security["capabilities"] == {"drop": ["ALL"]} and not security["allowPrivilegeEscalation"], where
            assert security["readOnlyRootFilesystem"] is True, where
            assert all("hostPort" not in port for port in container.get("ports", [])), where


def test_pods_ask_for_what_they_need_and_no_token(found: list[Object]) -> None:
    for where, _, spec in pods(found):
        assert spec["automountServiceAccountToken"] is False, where
        for container in containers(spec):
            resources = container["resources"]
            assert set(resources["requests"]) >= {"cpu", "memory"} and "memory" in resources["limits"], where
            gpus = [resources[kind].get("nvidia.com/gpu") for kind in ("requests", "limits")]
            assert gpus[0] == gpus[1], where
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], where


def test_what_is_named_is_there(found: list[Object]) -> None:
    """Accounts, claims and volumes of pods; ConfigMaps of the release's own name."""
    there = {(o["kind"], o["metadata"]["name"]) for o in found}
    assert len(there) == len(found), "an object stands twice"
    for where, _, spec in pods(found):
        assert ("ServiceAccount", spec["serviceAccountName"]) in there, where
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        claimed = {
            template["metadata"]["name"]
            for o in found
            if f"{o['kind']} {o['metadata']['name']}" == where and o["kind"] == "StatefulSet"
            for template in o["spec"]["volumeClaimTemplates"]
        }
        mounts = [(container["name"], mount) for container in containers(spec) for mount in container["volumeMounts"]]
        assert {mount["name"] for _, mount in mounts} == set(volumes) | claimed, where
        assert len({(name, mount["mountPath"]) for name, mount in mounts}) == len(mounts), where
        assert all("subPath" not in mount for _, mount in mounts), where
        for volume in volumes.values():
            if name := volume.get("configMap", {}).get("name", ""):
                assert ("ConfigMap", name) in there or not name.startswith("medforge-"), (where, name)
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there, where


def test_selectors_find_their_pods_and_no_others(found: list[Object]) -> None:
    labels = {where: metadata["labels"] for where, metadata, _ in pods(found)}

    def chosen(selector: dict[str, str]) -> set[str]:
        return {where for where, own in labels.items() if selector.items() <= own.items()}

    for o in found:
        name = o["metadata"]["name"]
        if o["kind"] == "Service":
            assert len(chosen(o["spec"]["selector"])) == 1, name
        elif o["kind"] in ("Deployment", "StatefulSet"):
            assert chosen(o["spec"]["selector"]["matchLabels"]) == {f"{o['kind']} {name}"}
        elif o["kind"] == "PodDisruptionBudget" and "gateway" in name:
            assert chosen(o["spec"]["selector"]["matchLabels"]) == {"Deployment medforge-gateway"}
    for where, metadata, spec in pods(found):
        for spread in spec.get("topologySpreadConstraints", []):
            assert spread["labelSelector"]["matchLabels"].items() <= metadata["labels"].items(), where


def test_names_and_labels_are_short_enough(name: str) -> None:
    """KServe makes DNS labels (63) of <name>-stable-predictor, and Deployments add a hash to pods."""
    for o in objects(SETS[name] | {"fullnameOverride": "a" * 60}, namespace="n" * 63):
        most = 63 - len("-predictor") if o["kind"] == "InferenceService" else 63
        assert len(o["metadata"]["name"]) <= most, o["metadata"]["name"]
        for key, value in o["metadata"]["labels"].items():
            assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value), (key, value)


def test_no_secret_is_made_of_values(found: list[Object]) -> None:
    assert not [o for o in found if o["kind"] == "Secret"]


def test_a_mirror_is_asked_for_every_image() -> None:
    for name in ("air-gapped", "everything"):
        for where, _, spec in pods(objects(SETS[name])):
            for container in containers(spec):
                assert container["image"].startswith("registry.hospital.example/mirror/"), where
                assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), where
                assert "imagePullSecrets" in spec, where


def test_nothing_is_reached_but_what_is_named() -> None:
    """Each pod is under the default deny, and each destination of its policies is in the values."""
    found = objects(SETS["air-gapped"])
    policies = {o["metadata"]["name"]: o["spec"] for o in found if o["kind"] == "NetworkPolicy"}
    deny = policies["medforge-default-deny"]
    assert "egress" not in deny and "ingress" not in deny and deny["policyTypes"] == ["Ingress", "Egress"]
    for where, metadata, _ in pods(found):
        assert deny["podSelector"]["matchLabels"].items() <= metadata["labels"].items(), where
    blocks = {
        peer["ipBlock"]["cidr"]
        for spec in policies.values()
        for rule in spec.get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer
    }
    assert blocks == {"10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"}
    for name, spec in policies.items():
        assert all(rule["to"] and rule["ports"] for rule in spec.get("egress", [])), name
        assert all(rule["from"] and rule["ports"] for rule in spec.get("ingress", [])), name


def test_accounts_may_do_little(found: list[Object]) -> None:
    roles = {o["metadata"]["name"]: o for o in found if "Role" in o["kind"] and "Binding" not in o["kind"]}
    bindings = [o for o in found if "Binding" in o["kind"]]
    assert {o["kind"] for o in [*roles.values(), *bindings]} <= {"Role", "RoleBinding"}
    assert sorted(o["roleRef"]["name"] for o in bindings) == sorted(roles)
    for binding in bindings:
        assert binding["metadata"].get("namespace") == roles[binding["roleRef"]["name"]]["metadata"].get("namespace")
    for role in roles.values():
        for rule in role["rules"]:
            assert not {"*", "secrets", "pods/exec"} & {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}
            # a rule that names objects and creates, lists or watches them allows nothing
            assert not ("resourceNames" in rule and {"create", "list", "watch"} & set(rule["verbs"]))
    for rule in roles.get("medforge-rollout", {"rules": []})["rules"]:
        assert "resourceNames" in rule or rule["verbs"] in (["create"], ["list"])
        assert "pods" not in rule["resources"]


def test_who_may_do_what() -> None:
    """Of all accounts only these three may do anything, each in one namespace."""
    found = objects(SETS["everything"])
    bound = {
        o["metadata"]["name"]: (
            o["metadata"].get("namespace", "med"),
            [(s["namespace"], s["name"]) for s in o["subjects"]],
        )
        for o in found
        if o["kind"] == "RoleBinding"
    }
    runs = ("research", "default-editor")
    assert bound == {
        "medforge-rollout": ("med", [("med", "medforge-rollout"), runs]),
        "medforge-trainjobs": ("research", [runs]),
        "medforge-schedule": ("research", [("med", "medforge-jobs")]),
    }
    assert not [o for o in objects(SETS["production"]) if o["kind"] == "RoleBinding" and "rollout" not in str(o)]
