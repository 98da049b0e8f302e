"""The InferenceServices of a rollout as documents: the release in one, a copy with another, and whether it serves it.

KServe's own Ready is not enough: in Standard mode it follows the Deployment's Available, which stays true while the
Deployment rolls from one release to the next, and `status.observedGeneration` is the Deployment's. So the Deployment
is looked at as `kubectl rollout status` does, and its pods' template has to name the release.
"""

from __future__ import annotations

import json
import re
from typing import Any

from medforge.rollout.kubernetes import MANAGER, Object

RELEASE, PREVIOUS = "medforge.io/release", "medforge.io/previous-release"
BACK_FROM = "medforge.io/rolling-back-from"  # while a promotion is taken back: the release that it was of
MANAGED, RUN = "medforge.io/managed-by-rollout", "medforge.io/rollout-run"
_URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)/releases/([0-9a-f]{64})/?")
_NOT_COPIED = {"helm.sh/chart", "app.kubernetes.io/managed-by"}


def release_of(service: Object) -> tuple[str, str]:
    """Bucket and digest of the release that an InferenceService names; ValueError if it names none."""
    name = service["metadata"]["name"]
    model = service.get("spec", {}).get("predictor", {}).get("model") or {}
    uri = str(model.get("storageUri", ""))
    found = _URI.fullmatch(uri)
    if not found:
        raise ValueError(
            f"InferenceService {name}: spec.predictor.model.storageUri is {uri!r}; a rollout needs "
            "s3://<bucket>/releases/<digest>/"
        )
    return found[1], found[2]


def check_managed(service: Object) -> None:
    """ValueError if the values file says what is served (rollout.managedBy: helm), and not a rollout."""
    if (service["metadata"].get("annotations") or {}).get(MANAGED) == "false":
        raise ValueError(
            f"InferenceService {service['metadata']['name']} is managed by Helm (rollout.managedBy: helm): change the "
            "release in the values, or set rollout.managedBy: medforge"
        )


def checks_itself(service: Object) -> bool:
    """Whether its pods prove the release before they serve it: MedForge's predictor does, and before vLLM an init
    container with `medforge verify-release`."""
    predictor = service["spec"]["predictor"]
    before = [word for one in predictor.get("initContainers") or [] for word in one.get("command") or []]
    given = predictor["model"].get("args") or []
    return "verify-release" in before or any(str(one).startswith("--release") for one in given)


def with_release(service: Object, digest: str, annotations: dict[str, str]) -> Object:
    """What to apply so that the service names a release, and has these annotations of ours and no others."""
    _, old = release_of(service)
    model = service["spec"]["predictor"]["model"]
    changed: dict[str, Any] = {"storageUri": model["storageUri"].replace(old, digest)}
    if model.get("args"):
        changed["args"] = [arg.replace(old, digest) for arg in model["args"]]
    predictor: dict[str, Any] = {"model": changed}
    if before := service["spec"]["predictor"].get("initContainers"):  # one brings and proves the release of vLLM
        predictor["initContainers"] = _with(before, old, digest)
    return _service(
        service["metadata"]["name"], service, {"annotations": {RELEASE: digest} | annotations}, {"predictor": predictor}
    )


def canary_of(stable: Object, name: str, digest: str, run: str) -> Object:
    """What to apply for a canary: the stable service's spec with another release, one replica at least, a new name."""
    _, old = release_of(stable)
    stable_name = stable["metadata"]["name"]
    renamed = {"stable": "canary", stable_name: name}
    spec = _renamed(stable["spec"], {stable_name: name})  # in selectors of its pods
    predictor = spec["predictor"]
    model = predictor["model"]
    model["storageUri"] = model["storageUri"].replace(old, digest)
    if model.get("args"):
        model["args"] = [arg.replace(old, digest) for arg in model["args"]]
    if before := predictor.get("initContainers"):
        predictor["initContainers"] = _with(before, old, digest)
    predictor["minReplicas"] = 1
    if "autoScaling" in predictor:  # an autoscaler's query names the service that it watches
        predictor["autoScaling"] = _with(predictor["autoScaling"], stable_name, name)
    labels = {
        key: renamed.get(value, value)
        for key, value in (stable["metadata"].get("labels") or {}).items()
        if key not in _NOT_COPIED
    }
    annotations = {
        key: value.replace(stable_name, name)
        for key, value in (stable["metadata"].get("annotations") or {}).items()
        if key.startswith("serving.kserve.io/")
    }
    return _service(
        name, stable,
        {
            "labels": labels | {"app.kubernetes.io/managed-by": MANAGER},
            "annotations": annotations | {RELEASE: digest, RUN: run},
        },
        spec,
    )  # fmt: skip


def _with(value: Any, old: str, new: str) -> Any:
    """A copy of a document with `new` for `old` in each of its texts."""
    return json.loads(json.dumps(value).replace(old, new))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A copy of a document in which a text that is one of the names is the other."""
    if isinstance(value, dict):
        return {key: _renamed(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


def _service(name: str, like: Object, metadata: dict[str, Any], spec: dict[str, Any]) -> Object:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": like["metadata"]["namespace"], **metadata},
        "spec": spec,
    }


def wanting(service: Object, deployment: Object | None, digest: str) -> str:
    """What is missing until all of the service's pods serve the release; "" if nothing is."""
    _, named = release_of(service)
    if named != digest:
        return f"it names release {named[:12]}, not {digest[:12]}"
    if deployment is None:
        return f"KServe has made no Deployment yet{_told(service)}"
    if digest not in json.dumps(deployment["spec"]["template"]):
        return f"its Deployment does not have the release yet{_told(service)}"
    status = deployment.get("status") or {}
    replicas = deployment["spec"].get("replicas", 1)
    counts = [status.get(name, 0) for name in ("updatedReplicas", "availableReplicas", "replicas")]
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 1):
        return "its Deployment has not been looked at yet"
    if replicas < 1 or counts != [replicas] * 3:
        return f"{counts[0]} of {replicas} pods are new, {counts[1]} available, {counts[2]} there{_told(service)}"
    ready = [one for one in _conditions(service) if one.get("type") == "Ready"]
    return "" if ready and ready[0].get("status") == "True" else f"it is not Ready{_told(service)}"


def _conditions(service: Object) -> list[dict[str, Any]]:
    return (service.get("status") or {}).get("conditions") or []


def _told(service: Object) -> str:
    """What KServe says of its trouble, in brackets; "" if nothing."""
    told = [
        f"{one['type']}: {one.get('reason') or one.get('status')} {one.get('message') or ''}".strip()
        for one in _conditions(service)
        if one.get("status") != "True" and (one.get("message") or one.get("reason"))
    ]
    failure = ((service.get("status") or {}).get("modelStatus") or {}).get("lastFailureInfo") or {}
    if failure:
        told.append(f"model: {failure.get('reason', '')} {' '.join(str(failure.get('message', '')).split())}".strip())
    return f" ({'; '.join(told)})" if told else ""
