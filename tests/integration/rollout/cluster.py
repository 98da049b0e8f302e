"""A little of a Kubernetes cluster with KServe on a real port: what a rollout needs of it, and faults to order.

Server-side apply is that of https://kubernetes.io/docs/reference/using-api/server-side-apply/: fields have managers,
another manager's value is a conflict unless forced, what a manager no longer applies is removed. Documents are checked
against the models of the kubernetes and kserve packages: an unknown field is a 400.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE, TOKEN = "med", "a-token-of-the-tests"
_KINDS = {
    "inferenceservices": ("kserve", "V1beta1InferenceService"),
    "configmaps": ("kubernetes.client", "V1ConfigMap"),
    "deployments": ("kubernetes.client", "V1Deployment"),
    "events": ("kubernetes.client", "CoreV1Event"),
}
_PATH = re.compile(rf"/(?:api|apis)/.+?/namespaces/{NAMESPACE}/([a-z]+)(?:/([a-z0-9.-]+))?")
Object = dict[str, Any]
Paths = dict[tuple[str, ...], Any]


def unknown_fields(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """The fields of `value` that the model `kind` of kserve or kubernetes does not have, as dotted paths."""
    if found := re.fullmatch(r"list\[(.+)\]", kind, re.IGNORECASE):
        for index, one in enumerate(value):
            yield from unknown_fields(one, found[1], f"{where}[{index}]")
    elif found := re.fullmatch(r"dict\(([^,]+), (.+)\)", kind):
        for key, one in value.items():
            yield from unknown_fields(one, found[2], f"{where}.{key}")
    elif (model := _model(kind)) is not None:
        names = {model.attribute_map[name]: text for name, text in model.openapi_types.items()}
        for key, one in value.items():
            if key not in names:
                yield f"{where}.{key}"
            elif one is not None:
                yield from unknown_fields(one, names[key], f"{where}.{key}")


def _model(kind: str) -> Any:
    for module in ("kserve", "kubernetes.client"):
        if (model := getattr(importlib.import_module(module), kind, None)) is not None and hasattr(
            model, "openapi_types"
        ):
            return model
    return None


def leaves(value: Any, path: tuple[str, ...] = ()) -> Paths:
    """Each leaf of nested objects by its path. Lists are leaves: those of a CRD are atomic."""
    if isinstance(value, dict) and value:
        return {at: leaf for key, one in value.items() for at, leaf in leaves(one, (*path, key)).items()}
    return {path: value}


class Cluster:
    """`objects` by kind and name. The other attributes are the script, and may be changed at any time."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.managers: dict[tuple[str, str], dict[str, set[tuple[str, ...]]]] = {}
        self.changes: list[str] = []  # each write, such as "apply medforge-canary"
        self.looks_until_ready = 2  # at a Deployment, after its release changed
        self.never_ready: set[str] = set()  # names of services
        self.faults: deque[tuple[str, str, int]] = deque()  # method, part of the path, status; each once
        self.before: Callable[[str, str], None] = lambda method, path: None  # is told of each request
        self._looks: dict[str, int] = {}
        self._version = 0
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def kubeconfig(self) -> str:
        """A kubeconfig (JSON is YAML)."""
        return json.dumps(
            {
                "current-context": "test",
                "contexts": [
                    {"name": "test", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}},
                ],
                "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                "users": [{"name": "u", "user": {"token": TOKEN}}],
            }
        )

    def install(self, digest: str, bucket: str, **annotations: str) -> None:
        """What the chart makes: the stable service, which is ready, and the routing."""
        self.apply("inferenceservices", stable_service(digest, bucket, annotations), "helm", False)
        url = f"http://medforge-stable-predictor.{NAMESPACE}.svc.cluster.local/openai/v1"
        routing = {"stable": {"url": url, "release": digest}, "candidate": None, "weight": 0}
        config = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "medforge-routing", "namespace": NAMESPACE, "labels": {"app": "medforge"}},
            "data": {"routing.json": json.dumps(routing)},
        }
        self.apply("configmaps", config, "helm", False)
        self._looks["medforge-stable"] = 99
        self.changes.clear()

    def saved(self) -> Any:
        """All that is there, for `restore`."""
        return copy.deepcopy((self.objects, self.managers, self._looks))

    def restore(self, saved: Any) -> None:
        """As it was when it was saved."""
        self.objects, self.managers, self._looks = copy.deepcopy(saved)

    @property
    def routing(self) -> dict[str, Any]:
        """What the gateways read."""
        return dict(json.loads(self.objects["configmaps", "medforge-routing"]["data"]["routing.json"]))

    def release(self, name: str) -> str | None:
        """The release that a service names everywhere; None without the service."""
        service = self.objects.get(("inferenceservices", name))
        if service is None:
            return None
        model = service["spec"]["predictor"]["model"]
        (digest,) = {
            model["storageUri"].split("/")[-2],
            model["args"][1].removeprefix("--release="),
            service["metadata"]["annotations"]["medforge.io/release"],
        }
        return str(digest)

    def answer(self, method: str, url: str, body: bytes, headers: Any) -> tuple[int, Object]:
        parts = urlsplit(url)
        self.before(method, parts.path)
        with self._lock:
            for fault in list(self.faults):
                if fault[0] == method and fault[1] in parts.path:
                    self.faults.remove(fault)
                    return fault[2], _status(fault[2], "as the script says")
            if headers.get("authorization") != f"Bearer {TOKEN}":
                return 401, _status(401, "Unauthorized")
            found = _PATH.fullmatch(parts.path)
            if not found or found[1] not in _KINDS:
                return 404, {}
            kind, name = found[1], found[2] or ""
            options = {key: value[0] for key, value in parse_qs(parts.query).items()}
            if method == "GET":
                return self._get(kind, name)
            if method == "DELETE":
                return self._delete(kind, name)
            if method == "PATCH" and headers.get("content-type") == "application/apply-patch+yaml":
                document = json.loads(body)
                return self.apply(kind, document, options["fieldManager"], options.get("force") == "true", name)
            return 405, _status(405, "no such verb here")

    def _get(self, kind: str, name: str) -> tuple[int, Object]:
        if kind == "events":
            about = {"name": "medforge-canary-predictor-0"}
            message = {"type": "Warning", "reason": "FailedScheduling", "message": "0/3 nodes: no GPU"}
            return 200, {"items": [message | {"involvedObject": about}]}
        if kind == "deployments":
            return self._deployment(name)
        if (kind, name) not in self.objects:
            return 404, _status(404, f'{kind} "{name}" not found', name)
        found = copy.deepcopy(self.objects[kind, name])
        if kind == "inferenceservices":
            bad = name in self.never_ready
            condition = {"type": "PredictorReady", "status": "False", "reason": "Crash", "message": "out of memory"}
            # as KServe does: it stays ready while its Deployment rolls
            conditions = [condition] if bad and name.endswith("canary") else [{"type": "Ready", "status": "True"}]
            found["status"] = {"conditions": conditions}
        return 200, found

    def _deployment(self, name: str) -> tuple[int, Object]:
        """KServe's: it has the release at the first look, and all of its pods are new some looks later."""
        service = name.removesuffix("-predictor")
        if ("inferenceservices", service) not in self.objects:
            return 404, _status(404, f'deployments.apps "{name}" not found', name)
        predictor = self.objects["inferenceservices", service]["spec"]["predictor"]
        looks = self._looks[service] = self._looks.get(service, 0) + 1
        new = 0 if service in self.never_ready or looks <= self.looks_until_ready else 1
        container = {"name": "kserve-container", "args": predictor["model"]["args"]}
        return 200, {
            "metadata": {"name": name, "generation": 2},
            "spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}},
            "status": {"observedGeneration": 2, "replicas": 1, "updatedReplicas": new, "availableReplicas": 1},
        }

    def _delete(self, kind: str, name: str) -> tuple[int, Object]:
        if (kind, name) not in self.objects:
            return 404, _status(404, f'{kind} "{name}" not found', name)
        del self.objects[kind, name], self.managers[kind, name]
        self.changes.append(f"delete {name}")
        return 200, {"kind": "Status", "status": "Success"}

    def apply(self, kind: str, wanted: Object, manager: str, force: bool, name: str = "") -> tuple[int, Object]:
        """Server-side apply."""
        if wrong := list(unknown_fields(wanted, _KINDS[kind][1])):
            return 400, _status(400, f"unknown field {', '.join(wrong)}")
        name = name or wanted["metadata"]["name"]
        if (wanted["metadata"]["name"], wanted["metadata"].get("namespace")) != (name, NAMESPACE):
            return 400, _status(400, "the name of the object does not match the name on the URL")
        live = self.objects.get((kind, name))
        version = wanted["metadata"].get("resourceVersion")
        if version and (live is None or version != live["metadata"]["resourceVersion"]):
            return 409, _status(409, "the object has been modified")
        owners = self.managers.setdefault((kind, name), {})
        ours = {path: value for path, value in leaves(wanted).items() if path != ("metadata", "resourceVersion")}
        have = leaves(live) if live else {}
        for other, paths in owners.items():
            clash = [path for path in paths & set(ours) if have.get(path) != ours[path]]
            if other != manager and clash:
                if not force:
                    fields = ", ".join(".".join(path) for path in clash)
                    return 409, _status(409, f'conflict with "{other}": {fields}')
                paths -= set(clash)
        kept = {path for other, paths in owners.items() if other != manager for path in paths}
        gone = owners.get(manager, set()) - set(ours) - kept
        merged = {path: value for path, value in {**have, **ours}.items() if path not in gone}
        before = {path: value for path, value in have.items() if path != ("metadata", "resourceVersion")}
        after = {path: value for path, value in merged.items() if path != ("metadata", "resourceVersion")}
        owners[manager] = set(ours)
        if live is None or before != after:
            self._version += 1
            if kind == "inferenceservices" and {p: v for p, v in before.items() if p[0] == "spec"} != {
                p: v for p, v in after.items() if p[0] == "spec"
            }:
                self._looks[name] = 0
            self.changes.append(f"apply {name}")
            self.objects[kind, name] = _nested(after)
            self.objects[kind, name]["metadata"]["resourceVersion"] = str(self._version)
        return 200, self.objects[kind, name]


def stable_service(digest: str, bucket: str, annotations: dict[str, str]) -> Object:
    """An InferenceService as the chart writes it."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": "medforge-stable",
            "namespace": NAMESPACE,
            "labels": {"helm.sh/chart": "medforge-1", "medforge.io/track": "stable"},
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "medforge.io/release": digest,
                **annotations,
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": 2,
                "topologySpreadConstraints": [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": {"serving.kserve.io/inferenceservice": "medforge-stable"}},
                    }
                ],
                "model": {
                    "modelFormat": {"name": "medforge"},
                    "storageUri": f"s3://{bucket}/releases/{digest}/",
                    "args": ["--model-dir=/mnt/models", f"--release={digest}"],
                },
            }
        },
    }


def _nested(paths: Paths) -> Object:
    made: Object = {}
    for path, value in paths.items():
        at = made
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = copy.deepcopy(value)
    return made


def _status(code: int, message: str, name: str = "") -> Object:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message, "details": {"name": name}}


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, document = cluster.answer(self.command, self.path, body, self.headers)
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PATCH = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
