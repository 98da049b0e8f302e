"""A Kubernetes API server that only shows: the kinds that the chart looks up, and the objects that it is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.unit.chart.rendering import Object

_KINDS = {
    "v1": [("configmaps", "ConfigMap")],
    "serving.kserve.io/v1beta1": [("inferenceservices", "InferenceService")],
}


def _resources(version: str) -> Object:
    rows = [
        {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
        for name, kind in _KINDS[version]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": rows}


def _group() -> Object:
    version = {"groupVersion": "serving.kserve.io/v1beta1", "version": "v1beta1"}
    group = {"name": "serving.kserve.io", "versions": [version], "preferredVersion": version}
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}


def _documents(objects: list[Object], namespace: str) -> dict[str, Object]:
    """What is answered, by path."""
    found: dict[str, Any] = {
        "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": _group(),
        "/api/v1": _resources("v1"),
        "/apis/serving.kserve.io/v1beta1": _resources("serving.kserve.io/v1beta1"),
    }
    for o in objects:
        base = "/api/v1" if o["apiVersion"] == "v1" else f"/apis/{o['apiVersion']}"
        plural = {kind: name for name, kind in _KINDS[o["apiVersion"]]}[o["kind"]]
        found[f"{base}/namespaces/{namespace}/{plural}/{o['metadata']['name']}"] = o
    return found


@contextmanager
def serving(objects: list[Object], namespace: str) -> Iterator[tuple[str, list[str]]]:
    """Serve them while the block runs. Yields a kubeconfig's text, and the paths of objects that were asked for."""
    documents, asked = _documents(objects, namespace), list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if "/namespaces/" in path:
                asked.append(path)
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(documents.get(path, missing)).encode()
            self.send_response(200 if path in documents else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        cluster = {"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test", "clusters": [cluster],
            "users": [{"name": "test", "user": {"token": "x"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
        }  # fmt: skip
        yield json.dumps(config), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
