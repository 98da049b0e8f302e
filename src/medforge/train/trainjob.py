"""A stage on several machines of a cluster: a Kubeflow TrainJob is made, followed, and removed.

The TrainJob has the name of its stage's digest, so that a step that was killed finds its own again. It is removed when
the step ends, whichever way. https://www.kubeflow.org/docs/components/trainer/
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from medforge.storage import Store
from medforge.train import passage
from medforge.train.job import Job

_JOBS = "apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs"
_PODS = "api/v1/namespaces/{namespace}/pods"
_NODE_0 = (
    "jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name=node,"
    "batch.kubernetes.io/job-completion-index=0"
)
_PATIENCE = 300.0  # seconds for which an API that cannot be reached is asked again
_STARTED = ("Running", "Succeeded", "Failed")


class Api(Protocol):
    """Where the Kubernetes API is and who we are to it; `medforge.rollout.kubeconfig.Cluster` is one."""

    @property
    def url(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def tls(self) -> Any: ...
    @property
    def token(self) -> Callable[[], str] | None: ...


class ApiError(ValueError):
    """The API server refused a request, or could not be asked (status 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def run(api: Api, store: Store, job: Job, nodes: str, poll: float = 5.0) -> None:
    """Train the job on `job.parallel.nodes` machines; its folders then hold what node 0 made.

    `nodes` is JSON: {"bucket": where inputs and outputs pass, "spec": the TrainJob's spec without its command}.
    Raises RuntimeError with the node's own words unless the TrainJob ends as Complete, ApiError when the API refuses,
    SystemExit(143) after SIGTERM. `poll` is in seconds.
    """
    given = json.loads(nodes)
    place = passage.send(store, given["bucket"], job)
    if not place.is_done(store):
        name = f"medforge-{job.stage.name}"[:40].rstrip("-") + f"-{place.id[:10]}"
        with _stopped_by_sigterm():
            client = _Client(api)
            remove = ("DELETE", f"{_JOBS}/{name}", {"propagationPolicy": "Foreground"})
            try:
                _start(client, body(name, given["spec"], place), poll)
                _follow(client, name, place, store, poll)
            except BaseException:
                with suppress(ApiError):  # what is told is why it failed, not that an account may not delete, too
                    client.send(*remove, missing=True)
                raise
            client.send(*remove, missing=True)
    passage.collect(store, place, job)


def body(name: str, spec: Mapping[str, Any], place: passage.Passage) -> dict[str, Any]:
    """The TrainJob that does the job at `place`."""
    command = {"command": ["python", "-m", "medforge.train.node"], "args": [place.url]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "medforge"}},
        "spec": {**spec, "trainer": {**spec["trainer"], **command}},
    }


def _start(client: _Client, wanted: dict[str, Any], poll: float) -> None:
    """Make the TrainJob, or find the one that an attempt before this left; one that failed is made anew."""
    name = wanted["metadata"]["name"]
    while True:
        try:
            client.send("POST", _JOBS, body=wanted)
            print(f"TrainJob {client.namespace}/{name}: made", flush=True)
            return
        except ApiError as error:
            if error.status != 409:
                raise
        there = client.send("GET", f"{_JOBS}/{name}", missing=True)
        if there and not there["metadata"].get("deletionTimestamp"):
            if _ended(there)[0] != "Failed":
                print(f"TrainJob {client.namespace}/{name}: is there already, and is followed", flush=True)
                return
            client.send("DELETE", f"{_JOBS}/{name}", {"propagationPolicy": "Foreground"}, missing=True)
        time.sleep(poll)  # it is on its way out


def _follow(client: _Client, name: str, place: passage.Passage, store: Store, poll: float) -> None:
    log = _Log(client, name)
    failing_since: float | None = None
    while True:
        try:
            found = client.send("GET", f"{_JOBS}/{name}", missing=True)
            log.show()
            failing_since = None
        except ApiError as error:
            failing_since = failing_since or time.monotonic()
            if error.status not in (0, 429) and error.status < 500:
                raise
            if time.monotonic() - failing_since > _PATIENCE:
                raise
            print(f"TrainJob {name}: {error}; it is asked again", flush=True)
            time.sleep(poll)
            continue
        if found is None:
            raise RuntimeError(f"TrainJob {name}: was removed by somebody else before it ended")
        state, why = _ended(found)
        if state == "Complete":
            return
        if state == "Failed":
            words = place.error(store) or why or "its pods' logs say why"
            raise RuntimeError(f"TrainJob {name} failed: {words}")
        time.sleep(poll)


def _ended(found: Mapping[str, Any]) -> tuple[str, str]:
    """("Complete" or "Failed", the reason), or ("", "") while it runs."""
    for condition in (found.get("status") or {}).get("conditions") or []:
        if condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True":
            return condition["type"], f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return "", ""


class _Log:
    """What node 0 prints, from the line after the last that was shown."""

    def __init__(self, client: _Client, name: str) -> None:
        self._client = client
        self._selector = _NODE_0.format(name=name)
        self._last = ""  # the time stamp of the last line that was shown

    def show(self) -> None:
        """Print what is new; nothing before the pod runs."""
        pods = self._client.send("GET", _PODS, {"labelSelector": self._selector}) or {}
        started = [pod for pod in pods.get("items", []) if (pod.get("status") or {}).get("phase") in _STARTED]
        if not started:
            return
        pod = max(started, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
        options = {"timestamps": "true", "container": "node"} | ({"sinceTime": self._last} if self._last else {})
        for line in self._client.text(f"{_PODS}/{pod['metadata']['name']}/log", options).splitlines():
            stamp, _, words = line.partition(" ")
            if stamp > self._last:  # sinceTime is in whole seconds, so that lines come again
                print(words, flush=True)
                self._last = stamp


class _Client:
    """The few requests of this module."""

    def __init__(self, api: Api) -> None:
        import urllib3

        self._api, self.namespace = api, api.namespace
        retry = urllib3.Retry(total=2, backoff_factor=0.5, status=0, redirect=0)
        timeout = urllib3.Timeout(connect=5, read=60)
        self._http = urllib3.PoolManager(ssl_context=api.tls, retries=retry, timeout=timeout)

    def send(
        self,
        method: str,
        path: str,
        options: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        missing: bool = False,
    ) -> dict[str, Any] | None:
        """The object that the API answers with; None for one that is `missing`."""
        data = self._ask(method, path, options, body, missing)
        return None if data is None else dict(json.loads(data))

    def text(self, path: str, options: Mapping[str, str]) -> str:
        """The text of a log."""
        return (self._ask("GET", path, options, None, True) or b"").decode(errors="replace")

    def _ask(
        self,
        method: str,
        path: str,
        options: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        missing: bool,
    ) -> bytes | None:
        from urllib3.exceptions import HTTPError

        path = path.format(namespace=quote(self.namespace, safe=""))
        headers = {"accept": "application/json"}
        if self._api.token is not None:
            headers["authorization"] = f"Bearer {self._api.token()}"
        if body is not None:
            headers["content-type"] = "application/json"
        url = f"{self._api.url}/{path}{f'?{urlencode(options)}' if options else ''}"
        try:
            answer = self._http.request(
                method, url, body=json.dumps(body) if body is not None else None, headers=headers
            )
        except HTTPError as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
            raise ApiError(0, f"{self._api.url}: the Kubernetes API cannot be reached ({reason})") from None
        if answer.status == 404 and missing:
            return None
        if answer.status >= 300:
            raise ApiError(answer.status, f"{method} {path}: {_why(answer.status, answer.data)}")
        return bytes(answer.data)


def _why(status: int, data: bytes) -> str:
    try:
        message = str(json.loads(data).get("message") or "")
    except (ValueError, AttributeError):
        message = data[:200].decode(errors="replace")
    mend = {
        401: "; the token is not valid (any more)",
        403: "; the run's ServiceAccount needs create, get and delete on trainjobs and get, list on pods and pods/log",
        404: "; is Kubeflow's trainer (v2) installed, and is it the right namespace?",
    }.get(status, "")
    return f"the Kubernetes API answers {status}: {' '.join(message.split())}{mend}"


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exit does, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
