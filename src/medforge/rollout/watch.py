"""A canary under watch: Prometheus' alerts with the label rollback="true", and whether enough callers came.

What is unknown is not good: rules that are not loaded or fail, a Prometheus that does not answer, a canary that nobody
asked.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

_RETRY_SECONDS = 10.0
_TELL_SECONDS = 60.0  # between two lines of progress


class CanaryError(ValueError):
    """The canary is not good, or nobody can say that it is."""


@dataclass(frozen=True)
class Patience:
    """How a canary is watched: for so many seconds, and until so many requests came, which may take `most_seconds`.

    `tries` looks in a row may fail, one each `every` seconds.
    """

    seconds: float = 1800.0
    most_seconds: float = 7200.0
    least_requests: int = 100
    tries: int = 5
    every: float = 15.0

    def __post_init__(self) -> None:
        if not (self.every > 0 and 0 <= self.seconds <= self.most_seconds and self.least_requests >= 0 < self.tries):
            raise ValueError(
                f"the watch makes no sense: {self.seconds:.0f} s, at most {self.most_seconds:.0f} s, "
                f"{self.least_requests} requests, {self.tries} tries"
            )


class Prometheus:
    """The HTTP API of a Prometheus. Its URL may have a path; `token` is a bearer token, "" for none."""

    def __init__(self, url: str, token: str = "") -> None:
        import urllib3

        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the Prometheus is {url!r}; write http://host:port (MEDFORGE_PROMETHEUS_URL)")
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = urllib3.Timeout(connect=5, read=_RETRY_SECONDS)
        self._http = urllib3.PoolManager(retries=False, timeout=timeout)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], url: str = "") -> Prometheus:
        """That of `url`, else of MEDFORGE_PROMETHEUS_URL; MEDFORGE_PROMETHEUS_TOKEN is its bearer token."""
        found = url or environment.get("MEDFORGE_PROMETHEUS_URL", "")
        if not found:
            raise ValueError("no Prometheus is named: give --prometheus URL, or set MEDFORGE_PROMETHEUS_URL")
        return cls(found, environment.get("MEDFORGE_PROMETHEUS_TOKEN", ""))

    def rules(self) -> list[dict[str, Any]]:
        """The alerting rules that are loaded."""
        groups = self._get("rules", {"type": "alert"})["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that are pending or firing."""
        found = self._get("alerts", {})["alerts"]
        if not isinstance(found, list):
            raise ValueError(f"{self._url}/api/v1/alerts gives no list")
        return found

    def number(self, query: str) -> float:
        """The sum of a query's samples; 0 without any."""
        result = self._get("query", {"query": query})["result"]
        return sum(float(one["value"][1]) for one in result)

    def _get(self, what: str, options: dict[str, str]) -> Any:
        """The data of an answer. ValueError if there is none."""
        from urllib3.exceptions import HTTPError

        url = f"{self._url}/api/v1/{what}"
        try:
            answer = self._http.request("GET", f"{url}?{urlencode(options)}", headers=self._headers)
            document = json.loads(answer.data)
            if answer.status == 200 and document["status"] == "success":
                return document["data"]
            why = f"{answer.status}: {str(document.get('error', 'no reason'))[:200]}"
        except HTTPError as error:
            why = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
        except (ValueError, LookupError, TypeError, AttributeError):
            why = f"{answer.status}, and no JSON of Prometheus'"
        raise ValueError(f"{url} does not answer ({why})")


def watch(
    prometheus: Prometheus,
    namespace: str,
    name: str,
    patience: Patience,
    wait: Callable[[float], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Returns {seconds, requests, looks} of a canary that stayed without alerts; CanaryError says what was wrong."""
    began, failed, looks, told = clock(), 0, 0, 0.0
    while True:
        try:
            _check_rules(prometheus, namespace, name)
            firing = [alert for alert in prometheus.alerts() if _counts(alert, namespace, name)]
            passed = clock() - began
            requests = prometheus.number(_requests(namespace, name, passed))
            failed = 0
        except (ValueError, LookupError, TypeError) as error:
            failed += 1
            say(f"watch: {error} ({failed} of {patience.tries})")
            if failed >= patience.tries:
                raise CanaryError(f"what the canary does is not known: {error}") from None
            wait(patience.every)
            continue
        looks += 1
        if firing:
            raise CanaryError("; ".join(sorted(_tell(alert) for alert in firing)))
        enough = requests >= patience.least_requests
        if passed >= patience.seconds and enough:
            return {"seconds": round(passed, 1), "requests": round(requests), "looks": looks}
        if passed >= patience.most_seconds:
            raise CanaryError(
                f"only {requests:.0f} requests came to the canary in {passed:.0f} s, {patience.least_requests} are "
                "needed to judge it: give it a larger share, or more time"
            )
        if passed - told >= _TELL_SECONDS:
            say(
                f"watch: {passed:.0f} of {patience.seconds:.0f} s, {requests:.0f} of {patience.least_requests} "
                "requests, no alert"
            )
            told = passed
        wait(patience.every)


def _check_rules(prometheus: Prometheus, namespace: str, name: str) -> None:
    """ValueError unless there are rules that would roll this canary back, and all of them can be evaluated."""
    rules = [
        rule
        for rule in prometheus.rules()
        if rule.get("labels", {}).get("rollback") == "true" and _sees(str(rule.get("query", "")), namespace, name)
    ]
    if not rules:
        raise ValueError(
            f'Prometheus has no alert with the label rollback="true" for {name}-gateway in {namespace}: install the '
            "chart's PrometheusRule (monitoring.rules.enabled)"
        )
    if broken := sorted(rule["name"] for rule in rules if rule.get("health") == "err"):
        raise ValueError(f"Prometheus cannot evaluate {', '.join(broken)}")


def _sees(query: str, namespace: str, name: str) -> bool:
    """Whether a rule's query looks at this installation: the chart narrows each one to its own."""
    return all(
        own in (given or [own])
        for own, given in (
            (namespace, re.findall(r'\bnamespace="([^"]*)"', query)),
            (f"{name}-gateway", re.findall(r'\bservice="([^"]*)"', query)),
        )
    )


def _counts(alert: dict[str, Any], namespace: str, name: str) -> bool:
    """Whether it fires, is one to roll back at, and is not of another namespace or installation."""
    labels = alert["labels"]
    services = {None, f"{name}-gateway", f"{name}-stable-predictor", f"{name}-canary-predictor"}
    ours = labels.get("namespace", namespace) == namespace and labels.get("service") in services
    return alert["state"] == "firing" and labels.get("rollback") == "true" and ours


def _tell(alert: dict[str, Any]) -> str:
    summary = alert.get("annotations", {}).get("summary", "")
    return f"alert {alert['labels']['alertname']}{f': {summary}' if summary else ''}"


def _requests(namespace: str, name: str, seconds: float) -> str:
    labels = f'track="candidate",namespace="{namespace}",service="{name}-gateway"'
    return f"sum(increase(medforge_gateway_routed_total{{{labels}}}[{max(1, round(seconds))}s]))"
