"""/livez, /readyz and /metrics."""

from __future__ import annotations

import json

import pytest

from medforge import audit
from serving.gateway import upstream
from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway, Serve, until
from tests.unit.gateway.fake import RELEASE, Fake
from tests.unit.gateway.keeping import full_disk


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "POLL_READY", 0.05)
    monkeypatch.setattr(upstream, "POLL_AWAY", 0.05)


def test_ready(gateway: Gateway) -> None:
    gateway.client.headers.pop("authorization")
    assert gateway.client.get("/livez").json() == {"status": "ok"}
    assert gateway.client.get("/readyz").json() == {
        "ready": True,
        "reasons": [],
        "upstreams": {"stable": {"ready": True, "circuit": "closed", "release": RELEASE, "reason": None}},
    }


def test_readiness_follows_the_upstream(gateway: Gateway, fake: Fake) -> None:
    fake.stop()
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    reasons = gateway.client.get("/readyz").json()["reasons"]
    assert reasons[0].startswith("the stable upstream cannot be reached")
    assert gateway.client.get("/livez").status_code == 200
    assert gateway.metric("medforge_gateway_upstream_ready", track="stable") == 0
    fake.start()
    until(lambda: gateway.client.get("/readyz").status_code == 200)


def test_a_candidate_that_is_away_is_told_and_does_not_count(serve: Serve, settings: Settings) -> None:
    with serve(settings.model_copy(update={"candidate": "http://127.0.0.1:9/openai/v1"})) as gateway:
        answer = gateway.client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["upstreams"]["candidate"]["ready"] is False


def test_a_release_that_is_not_the_approved_one_is_not_ready(serve: Serve, settings: Settings) -> None:
    with serve(settings.model_copy(update={"stable_release": "f" * 64})) as gateway:
        assert gateway.client.get("/readyz").status_code == 503


def test_a_database_that_is_away(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise GatewayError(503, "database-unavailable", "away")

    monkeypatch.setattr(gateway.parts.database, "ping", fail)
    assert gateway.client.get("/readyz").json()["reasons"] == ["the database does not answer"]


def test_a_circuit_that_is_open(gateway: Gateway) -> None:
    breaker = gateway.parts.upstreams.get("stable").breaker
    now = [0.0]
    breaker._clock = lambda: now[0]
    for _ in range(gateway.parts.settings.breaker_failures):
        breaker.failure()
    answer = gateway.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["the stable upstream has failed too often; its circuit is open"]
    now[0] = gateway.parts.settings.breaker_seconds  # a request may come now, and tries it
    assert gateway.client.get("/readyz").status_code == 200


def test_a_full_disk_under_the_audit_log(gateway: Gateway) -> None:
    ask = {"model": "medforge", "messages": [{"role": "user", "content": "Is it?"}]}
    with full_disk(gateway.parts.audit):
        assert gateway.client.get("/readyz").status_code == 200  # nothing has been tried
        for _ in range(2):
            assert gateway.client.post("/v1/chat/completions", json=ask).status_code == 503
        answer = gateway.client.get("/readyz")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["the audit log cannot be written"])
        assert gateway.metric("medforge_gateway_errors_total", code="audit-unavailable") == 2
    # nobody sends a request to what is not ready: it finds out by itself that there is room again
    assert gateway.client.get("/readyz").status_code == 200
    rows = [json.loads(line) for line in gateway.parts.audit.path.read_text().splitlines()]
    assert [(row["event"], row["refused"]) for row in rows] == [("resumed", 2)]
    assert audit.verify(gateway.parts.audit.path)[0] == 1


def test_draining(gateway: Gateway) -> None:
    gateway.parts.draining = True
    assert gateway.client.get("/readyz").json()["reasons"] == ["draining"]


def test_metrics_are_prometheus(gateway: Gateway) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    answer = gateway.client.get("/metrics", headers={"authorization": ""})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert "medforge_gateway_upstream_ready" in names
    samples = answer.text.splitlines()
    assert f'medforge_gateway_release_info{{digest="{RELEASE}",model="medforge",track="stable"}} 1.0' in samples
