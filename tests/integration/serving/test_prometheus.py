"""A real Prometheus scrapes the gateway, and finds there what was done."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import png
from tests.integration.prometheus import need
from tests.integration.prometheus import prometheus as running
from tests.unit.gateway.conftest import Gateway, until
from tests.unit.gateway.fake import RELEASE, Fake


@pytest.fixture
def prometheus(gateway: Gateway, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of the API of a Prometheus that scrapes the gateway every second."""
    target = {"targets": [gateway.url.removeprefix("http://")]}
    with running(tmp_path, {"scrape_configs": [{"job_name": "gateway", "static_configs": [target]}]}) as client:
        yield client


def query(client: httpx.Client, text: str) -> float | None:
    """The value of a query with one sample; None where there is none yet."""
    document = client.get("/api/v1/query", params={"query": text}).raise_for_status().json()
    result: list[dict[str, Any]] = document["data"]["result"]
    assert len(result) <= 1, result
    return float(result[0]["value"][1]) if result else None


def ask(gateway: Gateway, **changes: object) -> httpx.Response:
    image = base64.b64encode(png()).decode()
    body = {"question": "Is there a nodule?", "images": [{"data": image}]} | changes
    return gateway.client.post("/v1/diagnose", json=body)


def test_prometheus_finds_requests_latency_and_abstentions(
    gateway: Gateway, fake: Fake, prometheus: httpx.Client
) -> None:
    assert ask(gateway).json()["decision"] == "answered"
    fake.match = 0.1
    for _ in range(2):
        assert ask(gateway).json()["reason"] == "low-match"
    assert ask(gateway, task="no such task").status_code == 422
    gateway.client.get("/v1/models", headers={"authorization": "Bearer mf_wrong"})
    said = {"messages": [{"role": "user", "content": "Hello"}]}
    assert gateway.client.post("/v1/chat/completions", json=said).status_code == 200

    route = 'route="/v1/diagnose"'
    wanted = {
        "up": 1.0,
        f'sum(medforge_gateway_requests_total{{{route},status="200"}})': 3.0,
        f'sum(medforge_gateway_requests_total{{{route},status="422"}})': 1.0,
        'sum(medforge_gateway_requests_total{route="/v1/chat/completions",status="200"})': 1.0,
        'sum(medforge_gateway_requests_total{status="401",client="unknown"})': 1.0,
        f"medforge_gateway_request_seconds_count{{{route}}}": 4.0,
        'medforge_gateway_abstentions_total{reason="low-match",track="stable"}': 2.0,
        'sum(medforge_gateway_decisions_total{task="ask",decision="answered"})': 1.0,
        'sum(medforge_gateway_decisions_total{task="ask",decision="abstained"})': 2.0,
        'medforge_gateway_match_score_count{track="stable"}': 3.0,
        'medforge_gateway_match_score_bucket{track="stable",le="0.5"}': 2.0,
        'medforge_gateway_images_total{format="png",outcome="read"}': 3.0,
        'medforge_gateway_upstream_ready{track="stable"}': 1.0,
        f'medforge_gateway_release_info{{digest="{RELEASE}"}}': 1.0,
        "medforge_gateway_in_flight": 0.0,
        'medforge_gateway_routed_total{track="stable"}': 4.0,
    }
    until(lambda: query(prometheus, f"medforge_gateway_request_seconds_count{{{route}}}") == 4.0, 30)
    assert {name: query(prometheus, name) for name in wanted} == wanted
    seconds = query(prometheus, f"medforge_gateway_request_seconds_sum{{{route}}}")
    assert seconds is not None
    assert 0 < seconds < 30
    # no series without an end: labels hold no ids, questions or paths
    assert (query(prometheus, 'count({__name__=~"medforge_gateway_.*"})') or 0) < 1000


def test_a_gateway_that_is_gone_is_down(gateway: Gateway, prometheus: httpx.Client) -> None:
    until(lambda: query(prometheus, "up") == 1.0, 30)
    gateway.server.should_exit = True
    until(lambda: query(prometheus, "up") == 0.0, 30)


def test_promtool_has_nothing_to_say(gateway: Gateway, fake: Fake) -> None:
    program = need("promtool")
    ask(gateway)
    fake.match = 0.1
    ask(gateway)
    ask(gateway, task="wrong")
    text = gateway.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    ended = subprocess.run([program, "check", "metrics"], input=text.content, capture_output=True, timeout=60)
    assert (ended.returncode, (ended.stdout + ended.stderr).decode()) == (0, "")
