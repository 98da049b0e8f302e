"""What the tests of a real API server need: a namespace, tokens, and who plays KServe and the nodes where none are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import urllib3

from medforge.rollout.kubeconfig import Cluster
from tests.unit.chart.rendering import Object, pods

SERVING = "/apis/serving.kserve.io"


class ApiError(Exception):
    """The API server's refusal; `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:1000]}")
        self.status = status


class Admin:
    """Plain requests to an API server with all rights; paths begin with /api or /apis."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._http = urllib3.PoolManager(ssl_context=cluster.tls, retries=urllib3.Retry(3, status=0), maxsize=4)

    def ask(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **headers: str
    ) -> Object:
        """The answer's document. ApiError for any refusal."""
        sent = {"content-type": content, "accept": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cluster.token is not None:
            sent["authorization"] = f"Bearer {self.cluster.token()}"
        data = None if body is None else json.dumps(body)
        answer = self._http.request(method, self.cluster.url + path, body=data, headers=sent, timeout=30)
        if answer.status >= 300:
            raise ApiError(answer.status, answer.data.decode())
        return dict(json.loads(answer.data))

    def apply(self, path: str, wanted: Object, **options: str) -> Object:
        """Server-side apply by the manager `test`, every field checked."""
        query = {"fieldManager": "test", "force": "true", "fieldValidation": "Strict"} | options
        text = "&".join(f"{name}={value}" for name, value in query.items())
        return self.ask("PATCH", f"{path}?{text}", wanted, "application/apply-patch+yaml")

    def status(self, path: str, status: Object) -> None:
        """Lay this over an object's status."""
        self.ask("PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json")

    def list(self, path: str) -> list[Object]:
        """The items; none where the kind is not known."""
        try:
            return list(self.ask("GET", path)["items"])
        except ApiError as error:
            if error.status != 404:
                raise
            return []

    def path(self, o: Object, namespace: str) -> str:
        """Where an object's kind lies; ApiError 404 if the server does not know the kind."""
        base = "/api/v1" if o["apiVersion"] == "v1" else f"/apis/{o['apiVersion']}"
        for kind in self.ask("GET", base)["resources"]:
            if kind["kind"] == o["kind"] and "/" not in kind["name"]:
                return f"{base}/namespaces/{namespace}/{kind['name']}"
        raise ApiError(404, f"{o['apiVersion']} has no {o['kind']}")


@contextmanager
def playing(admin: Admin, namespace: str) -> Iterator[None]:
    """Be KServe and the nodes while the block runs: predictors get Deployments, pods run, Jobs' and tests' succeed."""
    over = threading.Event()

    def play() -> None:
        while not over.wait(0.1):
            try:
                _kserve(admin, namespace)
                _nodes(admin, namespace)
            except ApiError as error:
                if error.status not in (404, 409):  # changed or gone in between: at the next round
                    raise

    player = threading.Thread(target=play)
    player.start()
    try:
        yield
    finally:
        over.set()
        player.join()


def _kserve(admin: Admin, namespace: str) -> None:
    """A Deployment for each InferenceService, from its ServingRuntime, and Ready as soon as that is available."""
    kinds = {"v1beta1": "InferenceService", "v1alpha1": "ServingRuntime"}
    found = [
        one | {"kind": kind}
        for version, kind in kinds.items()
        for one in admin.list(f"{SERVING}/{version}/namespaces/{namespace}/{kind.lower()}s")
    ]
    runtimes = [one for one in found if one["kind"] == "ServingRuntime"]
    for service in found:
        made_of = [] if service["kind"] != "InferenceService" else [*pods([service, *runtimes])]
        if not made_of:  # its runtime is not there yet
            continue
        _, metadata, spec = made_of[0]
        name, path = service["metadata"]["name"], f"/apis/apps/v1/namespaces/{namespace}/deployments"
        predictor = service["spec"]["predictor"]
        container = spec["containers"][0]
        container["args"] = [*container["args"], *predictor["model"].get("args", [])]
        owner = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "controller": True}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": f"{name}-predictor",
                "ownerReferences": [owner | {"name": name, "uid": service["metadata"]["uid"]}],
            },
            "spec": {
                "replicas": predictor.get("minReplicas", 1),
                "selector": {"matchLabels": {"serving.kserve.io/inferenceservice": name}},
                "template": {"metadata": {"labels": metadata["labels"]}, "spec": spec},
            },
        }
        made = admin.apply(f"{path}/{name}-predictor", deployment)
        ready = any(
            one["type"] == "Available" and one["status"] == "True"
            for one in made.get("status", {}).get("conditions", [])
        )
        told = {"conditions": [{"type": "Ready", "status": str(ready)}]}
        if service.get("status", {}).get("conditions") != told["conditions"]:
            admin.status(f"{SERVING}/v1beta1/namespaces/{namespace}/inferenceservices/{name}", told)


def _nodes(admin: Admin, namespace: str) -> None:
    """Every pod runs and is ready; those that end by themselves have succeeded."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    for pod in admin.list(path):
        if pod["status"].get("phase") != "Pending":
            continue
        ends = pod["spec"]["restartPolicy"] == "Never"
        ready = {"type": "Ready", "status": str(not ends), "lastTransitionTime": "2026-01-01T00:00:00Z"}
        told = {"phase": "Succeeded" if ends else "Running", "conditions": [ready]}
        admin.status(f"{path}/{pod['metadata']['name']}", told)
