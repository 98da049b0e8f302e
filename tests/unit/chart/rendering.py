"""The chart, rendered: value sets that every test goes through, and what is in the manifests."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).resolve().parents[3] / "charts" / "medforge"
RELEASE = "ab" * 32
OTHER = "cd" * 32
DIGEST = f"sha256:{'0f' * 32}"
KEY = yaml.safe_load((CHART / "ci" / "site-values.yaml").read_text())["reviewers"]["keys"]
POD_KINDS = {"Deployment", "StatefulSet", "Job", "Pod"}

Values = dict[str, Any]
Object = dict[str, Any]


def merged(*parts: Mapping[str, Any]) -> Values:
    """Values over values, as Helm lays several files over each other: null takes a key away."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            if value is None:
                result.pop(key, None)
                continue
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def file(name: str) -> Values:
    """A values file of the chart."""
    values = yaml.safe_load((CHART / name).read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def at(path: str, value: Any) -> Values:
    """{a: {b: value}} of the path a.b."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


SITE = file("ci/site-values.yaml")
PILOT = file("values-pilot.yaml")
PRODUCTION = merged(file("values-production.yaml"), SITE)
LEAST = {"objectStore": {"endpoint": "s3.example:9000"}, "networkPolicy": {"enabled": False}}
PIPELINES = CHART.parents[1] / "pipelines"
RUN = yaml.safe_load((PIPELINES / "configs" / "vqa-rad-tiny.yaml").read_text(encoding="utf-8"))
POLICY = yaml.safe_load((PIPELINES / "policies" / "vqa-rad.yaml").read_text(encoding="utf-8"))
SCHEDULE = {
    "enabled": True,
    "run": RUN
    | {"name": "nightly", "data": RUN["data"] | {"source": "s3://medforge/sources/chest/"}, "policy": POLICY},
}
EVERYTHING = merged(
    PRODUCTION,
    {
        "commonLabels": {"team": "radiology"},
        "images": {"registry": "registry.hospital.example/mirror", "pullSecrets": ["mirror"]},
        "gateway": {
            "upstreamKey": True,
            "referenceConfigMap": "reference",
            "settings": {"allowed_hosts": ["medforge.hospital.example"], "rate": "60/minute", "drain_seconds": 12.5,
                         "oidc_issuer": "https://login.example", "oidc_audience": "medforge"},
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "k", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
            "podAnnotations": {"a": "b"},
            "service": {"annotations": {"a": "b"}},
        },
        "ingress": {"certManagerIssuer": "letsencrypt"},
        "predictor": {"dtype": "bfloat16", "nodeSelector": {"gpu": "h200"}, "runtimeClassName": "nvidia",
                      "priorityClassName": "high", "extraArgs": ["--max-wait-ms=10"]},
        "objectStore": {"caConfigMap": "site-ca", "externalSecret": {"enabled": True, "storeName": "vault"}},
        "gatewayExternalSecret": {"enabled": True, "storeName": "vault"},
        "pipelines": {"launcher": {"enabled": True}, "schedule": SCHEDULE | {"multiUser": True},
                      "namespace": "research", "serviceAccount": "default-editor", "trainJobs": True,
                      "cluster": {"steps": {"train": {"gpu": {"count": 1}}}}},
        "networkPolicy": {"identityProvider": {"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}]}},
        "rollout": {"serviceAccounts": [{"name": "default-editor", "namespace": "research"}]},
        "tests": {"apiKeySecret": "test-key"},
    },
)  # fmt: skip
VLLM = {"predictor": {"runtime": "vllm", "maxModelLen": 8192, "gpu": {"count": 2}}}

SETS: dict[str, Values] = {
    "least": LEAST,
    "pilot": PILOT,
    "pilot-served": merged(PILOT, {"stable": {"release": RELEASE}, "reviewers": {"keys": KEY}}),
    "production": PRODUCTION,
    "air-gapped": merged(
        file("values-production.yaml"), file("values-airgapped.yaml"), SITE,
        {"images": {"registry": "registry.hospital.example/mirror"}},
    ),
    "everything": EVERYTHING,
    "vllm": merged(PRODUCTION, VLLM, {"objectStore": {"caConfigMap": "site-ca"}}),
    "another runtime": merged(
        PRODUCTION, VLLM, {"predictor": {"existingRuntime": "kserve-vllmserver", "gpu": {"count": 1}}}
    ),
    "gitops": merged(
        PRODUCTION,
        {"rollout": {"managedBy": "helm"}, "canary": {"enabled": True, "release": OTHER, "weight": 0.25}},
    ),
    "route": merged(
        PRODUCTION,
        {"ingress": {"enabled": False},
         "route": {"enabled": True, "hostnames": ["medforge.hospital.example"],
                   "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}]}},
    ),
    "no disk": merged(PRODUCTION, {"gateway": {"data": {"kind": "emptyDir", "auditMayBeLost": True}}}),
    "keys elsewhere": merged(
        PRODUCTION,
        {"reviewers": {"keys": {"dr-smith.pub": None}, "existingConfigMap": "reviewers", "files": ["a.pub", "b.pub"]}},
    ),
}  # fmt: skip


def render(values: Values, name: str = "medforge", namespace: str = "med") -> dict[str, str]:
    """Manifests by template, as `helm template` gives them. Raises helm's errors for values that do not fit."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return chart.render(values, name=name, namespace=namespace)


def objects(values: Values, name: str = "medforge", namespace: str = "med") -> list[Object]:
    """The objects of the manifests. Keys that stand twice in one mapping are an error, as for Kubernetes."""
    return [
        document
        for template, text in render(values, name, namespace).items()
        if template.endswith(".yaml")
        for document in yaml.load_all(text, Loader=_Strict)
        if document
    ]


def one(found: list[Object], kind: str, name: str = "") -> Object:
    """The object of a kind, and of a name where there are several."""
    matching = [o for o in found if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    assert len(matching) == 1, [(o["kind"], o["metadata"]["name"]) for o in found]
    return matching[0]


def pods(found: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Where, metadata and spec of every pod: those of the core kinds, and those that KServe makes of ours.

    KServe lays the InferenceService's predictor over its ServingRuntime; a runtime that is not ours is not known.
    """
    for o in found:
        where = f"{o['kind']} {o['metadata']['name']}"
        if o["kind"] == "Pod":
            yield where, o["metadata"], o["spec"]
        elif o["kind"] in POD_KINDS:
            yield where, o["spec"]["template"]["metadata"], o["spec"]["template"]["spec"]
        elif o["kind"] == "InferenceService":
            runtimes = {r["metadata"]["name"]: r["spec"] for r in found if r["kind"] == "ServingRuntime"}
            predictor = {k: v for k, v in o["spec"]["predictor"].items() if k in _POD_FIELDS}
            labels = o["metadata"]["labels"] | {"serving.kserve.io/inferenceservice": o["metadata"]["name"]}
            if runtime := runtimes.get(o["spec"]["predictor"]["model"]["runtime"]):
                spec = {k: v for k, v in runtime.items() if k in _POD_FIELDS} | predictor
                spec["volumes"] = runtime["volumes"] + predictor.get("volumes", [])
                model = o["spec"]["predictor"]["model"]
                mounts = runtime["containers"][0]["volumeMounts"] + model.get("volumeMounts", [])
                own = {"resources": model["resources"], "volumeMounts": mounts}
                yield where, {"labels": labels}, spec | {"containers": [merged(runtime["containers"][0], own)]}


def containers(spec: Object) -> list[Object]:
    """All containers of a pod, those that run before the others too."""
    return [*spec.get("initContainers", []), *spec["containers"]]


_POD_FIELDS = {
    "containers", "volumes", "securityContext", "serviceAccountName", "automountServiceAccountToken", "nodeSelector",
    "tolerations", "topologySpreadConstraints", "terminationGracePeriodSeconds", "imagePullSecrets",
    "priorityClassName", "runtimeClassName", "initContainers",
}  # fmt: skip


class _Strict(yaml.CSafeLoader):
    """YAML without keys that stand twice, which the plain loader takes in silence."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[str, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{node.start_mark}: {twice} twice")
    return dict(loader.construct_pairs(node, deep=True))


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
