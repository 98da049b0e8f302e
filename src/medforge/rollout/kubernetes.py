"""The little of the Kubernetes API that a rollout needs: get, server-side apply, delete, events.

https://kubernetes.io/docs/reference/using-api/server-side-apply/
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from medforge.rollout.kubeconfig import Cluster, find

MANAGER = "medforge-rollout"
Object = dict[str, Any]

INFERENCE_SERVICES = "apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices"
DEPLOYMENTS = "apis/apps/v1/namespaces/{namespace}/deployments"
CONFIG_MAPS = "api/v1/namespaces/{namespace}/configmaps"
EVENTS = "api/v1/namespaces/{namespace}/events"


class ApiError(ValueError):
    """The API server refused a request, or could not be asked (status 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether the same request may be answered in a while: the API server is away, full or in trouble."""
        return self.status in (0, 429) or self.status >= 500


class Kubernetes:
    """Objects of one namespace."""

    def __init__(self, cluster: Cluster, namespace: str = "") -> None:
        """Nothing is sent before the first call."""
        import urllib3

        self.namespace = namespace or cluster.namespace
        self._cluster = cluster
        # each request may be sent twice: reads, deletions and applied configurations are idempotent
        retry = urllib3.Retry(
            total=3, backoff_factor=0.2, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None,
            raise_on_status=False,
        )  # fmt: skip
        timeout = urllib3.Timeout(connect=5, read=30)
        self._http = urllib3.PoolManager(ssl_context=cluster.tls, retries=retry, timeout=timeout)

    @classmethod
    def from_environment(cls, namespace: str = "", environment: Mapping[str, str] | None = None) -> Kubernetes:
        """The cluster that this process runs in or that the kubeconfig names; MEDFORGE_NAMESPACE names a namespace."""
        values = os.environ if environment is None else environment
        return cls(find(values), namespace or values.get("MEDFORGE_NAMESPACE", ""))

    def get(self, kind: str, name: str) -> Object | None:
        """An object; None if there is none of that name."""
        return self._send("GET", kind, name, missing=True)

    def apply(self, kind: str, wanted: Object, force: bool = False) -> Object:
        """Server-side apply; returns the object. ApiError 409 if another manager has another value, unless `force`.

        A `metadata.resourceVersion` in `wanted` makes it a 409 too if the object has changed since.
        """
        options = {"fieldManager": MANAGER, "force": str(force).lower()}
        applied = self._send("PATCH", kind, wanted["metadata"]["name"], options, wanted)
        assert applied is not None
        return applied

    def delete(self, kind: str, name: str) -> None:
        """Delete an object and, in the background, what belongs to it; one that is not there is no error."""
        self._send("DELETE", kind, name, {"propagationPolicy": "Background"}, missing=True)

    def events(self, name: str) -> list[str]:
        """The last warnings about objects whose names begin with `name`, oldest first, each as one line."""
        listed = self._send("GET", EVENTS, "", {"fieldSelector": "type=Warning"}) or {}
        about = [
            event for event in listed.get("items", [])
            if str(event.get("involvedObject", {}).get("name", "")).startswith(name)
        ]  # fmt: skip
        about.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
        return [f"{event.get('reason')}: {' '.join(str(event.get('message', '')).split())}" for event in about[-5:]]

    def _send(
        self,
        method: str,
        kind: str,
        name: str,
        options: Mapping[str, str] | None = None,
        body: Object | None = None,
        missing: bool = False,
    ) -> Object | None:
        from urllib3.exceptions import HTTPError

        path = kind.format(namespace=quote(self.namespace, safe="")) + (f"/{quote(name, safe='')}" if name else "")
        url = f"{self._cluster.url}/{path}{f'?{urlencode(options)}' if options else ''}"
        headers = {"accept": "application/json"}
        if self._cluster.token is not None:
            headers["authorization"] = f"Bearer {self._cluster.token()}"
        if body is not None:
            headers["content-type"] = "application/apply-patch+yaml"  # JSON is YAML
        data = None if body is None else json.dumps(body).encode()
        what = f"{method} {path}"
        try:
            answer = self._http.request(method, url, body=data, headers=headers)
        except HTTPError as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
            raise ApiError(0, f"{self._cluster.url}: the Kubernetes API cannot be reached ({reason})") from None
        if answer.status == 404 and missing and _is_about_an_object(answer.data):
            return None
        if answer.status >= 300:
            raise ApiError(answer.status, _why(answer.status, answer.data, what))
        try:
            return dict(json.loads(answer.data))
        except (ValueError, TypeError):
            raise ApiError(answer.status, f"{what}: {self._cluster.url} does not answer as Kubernetes does") from None


def _status(data: bytes) -> Object:
    """The Status document in an answer; {} if it is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_about_an_object(data: bytes) -> bool:
    """Whether a 404 says that an object is missing, and not that its kind (KServe) is."""
    return bool((_status(data).get("details") or {}).get("name"))


def _why(status: int, data: bytes, what: str) -> str:
    message = " ".join(str(_status(data).get("message") or data[:200].decode(errors="replace")).split())
    mend = {
        401: "; the token or certificate is not valid (any more)",
        403: "; the rollout's ServiceAccount needs this right (the chart's Role gives it)",
        404: "; is KServe installed, and is it the right cluster and namespace?",
        409: "; somebody else changes the same thing",
    }.get(status, "")
    return f"{what}: the Kubernetes API answers {status}: {message}{mend}"
