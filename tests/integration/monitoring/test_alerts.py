"""The chart's own rules in a real Prometheus that scrapes a real gateway: alerts fire by what happens there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.prometheus import prometheus as running
from tests.integration.serving.conftest import fake, gateway, key, serve, settings
from tests.integration.serving.test_prometheus import ask
from tests.unit.gateway.conftest import Gateway, Serve, Settings, until
from tests.unit.gateway.fake import Fake
from tests.unit.monitoring.promql import RULES

__all__ = ["fake", "gateway", "key", "serve", "settings"]


def shortened(path: Path) -> str:
    """A rule file that is evaluated every second, and whose alerts wait for one."""
    document = yaml.safe_load(path.read_text())
    for group in document["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule |= {"for": "1s"} if "for" in rule else {}
    return yaml.safe_dump(document)


@pytest.fixture
def candidate() -> Iterator[Fake]:
    """A predictor for the candidate."""
    made = Fake()
    yield made
    made.close()


@pytest.fixture
def canary(serve: Serve, settings: Settings, candidate: Fake) -> Iterator[Gateway]:
    """A gateway that gives every caller the candidate."""
    with serve(settings.model_copy(update={"candidate": candidate.url, "candidate_weight": 1.0})) as running:
        yield running


@pytest.fixture
def prometheus(canary: Gateway, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of the API of a Prometheus with the rules, for which the gateway is that of an installation."""
    for path in RULES:
        (tmp_path / path.name).write_text(shortened(path))
    target = {"targets": [canary.url.removeprefix("http://")]}
    labels = {"namespace": "hospital", "service": "medforge-gateway", "pod": "gateway-0"}
    config = {
        "rule_files": [path.name for path in RULES],
        "scrape_configs": [{"job_name": "gateway", "static_configs": [target | {"labels": labels}]}],
    }
    with running(tmp_path, config) as client:
        yield client


def firing(client: httpx.Client) -> dict[str, dict[str, str]]:
    """The labels of the alerts that fire, by name."""
    alerts: list[dict[str, Any]] = client.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
    return {one["labels"]["alertname"]: one["labels"] for one in alerts if one["state"] == "firing"}


def scraped(client: httpx.Client, metric: str) -> float:
    """The sum of a metric as Prometheus has it."""
    result = client.get("/api/v1/query", params={"query": f"sum({metric})"}).raise_for_status().json()["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0


def test_a_candidate_that_fails_ends_its_canary(
    canary: Gateway, fake: Fake, candidate: Fake, prometheus: httpx.Client
) -> None:
    attempts = 'medforge_gateway_upstream_seconds_count{track="candidate"}'
    assert ask(canary).json()["decision"] == "answered"
    candidate.statuses.append(500)
    assert ask(canary).json()["release"]["track"] == "stable"  # which stands in for it
    until(lambda: scraped(prometheus, attempts) >= 2, 20)  # its series are known, so that what follows is an increase
    until(lambda: firing(prometheus) == {}, 20)  # before the first scrape the gateway itself is missing
    for _ in range(20):
        candidate.statuses.extend((200, 500))
        assert ask(canary).status_code == ask(canary).status_code == 200
    until(lambda: scraped(prometheus, attempts) >= 42, 20)
    until(lambda: "MedForgeCanaryErrors" in firing(prometheus), 20)
    labels = firing(prometheus)["MedForgeCanaryErrors"]
    assert {name: labels[name] for name in ("rollback", "namespace", "service", "track", "severity")} == {
        "rollback": "true",
        "namespace": "hospital",
        "service": "medforge-gateway",
        "track": "candidate",
        "severity": "critical",
    }
    assert set(firing(prometheus)) == {"MedForgeCanaryErrors"}  # callers had their answers: nobody else is told


def test_a_stable_predictor_that_is_away(canary: Gateway, fake: Fake, prometheus: httpx.Client) -> None:
    until(lambda: scraped(prometheus, 'medforge_gateway_upstream_ready{track="stable"}') == 1, 20)
    assert "MedForgeUpstreamDown" not in firing(prometheus)
    fake.stop()
    until(lambda: "MedForgeUpstreamDown" in firing(prometheus), 30)
    fake.start()
    until(lambda: "MedForgeUpstreamDown" not in firing(prometheus), 30)
