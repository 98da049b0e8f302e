"""What surrounds every request: ids, limits of bodies, hosts, draining, errors, headers, log and metrics."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
from fastapi import Request

from serving.gateway.app import create_app
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway, Serve, until
from tests.unit.gateway.fake import Fake

PATH = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "SECRET-QUESTION"}]}


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines of the gateway's log."""
    from serving.gateway import middleware

    seen: list[dict[str, Any]] = []

    class Log:
        def __getattr__(self, level: str) -> Any:
            return lambda event, **more: seen.append({"event": event, "level": level, **more})

    monkeypatch.setattr(middleware, "logger", Log)
    return seen


def test_a_sane_request_id_is_taken_over(gateway: Gateway) -> None:
    for given, kept in (
        ("abc-123.X_9", True),
        ("short", False),
        ("x" * 65, False),
        ("bad id here", False),
        ("a<b>cdefg", False),
    ):
        got = gateway.client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]
        assert (got == given) is kept
    ids = {gateway.client.get("/livez").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


def test_every_answer_is_guarded(gateway: Gateway) -> None:
    for path in ("/livez", "/nothing", PATH):
        headers = gateway.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/nothing", 404, "not-found"),
    ("GET", "/v1/patients/Jane%20Doe", 404, "not-found"),
    ("DELETE", "/livez", 405, "method-not-allowed"),
    ("GET", "/livez/", 404, "not-found"),
])  # fmt: skip
def test_errors_have_one_shape(gateway: Gateway, method: str, path: str, status: int, code: str) -> None:
    answer = gateway.client.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "Jane" not in answer.text


def test_a_failure_tells_nothing_of_itself(serve: Serve, settings: Settings, logged: list[dict[str, Any]]) -> None:
    app = create_app(settings)

    @app.get("/fails")
    async def fails(number: int) -> None:
        raise RuntimeError(f"Jane Doe {number}")

    with serve(settings, app) as gateway:
        answer = gateway.client.get("/fails?number=77")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert "Jane" not in answer.text
        told = next(line for line in logged if line["event"] == "failed")
        assert told["exception"] == "RuntimeError"
        assert any("fails" in frame for frame in told["frames"])
        assert "Jane" not in json.dumps(logged)
        assert "77" not in json.dumps([line.get("route") for line in logged])
        answer = gateway.client.get("/fails?number=Jane")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, "number")
        assert "Jane" not in answer.text


def test_the_access_log_says_what_happened_and_nothing_of_the_patient(
    gateway: Gateway, fake: Fake, logged: list[dict[str, Any]]
) -> None:
    fake.text = "SECRET-ANSWER"
    answer = gateway.client.post(f"{PATH}?patient=SECRET-NAME", json=ASKED)
    until(lambda: logged)
    line = logged[-1]
    assert line["event"] == "request"
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"], line["client"]) == ("POST", PATH, 200, "system")
    assert line["caller"].startswith("key-")
    assert line["track"] == "stable"
    assert line["bytes_in"] > 50
    assert line["bytes_out"] == len(answer.content)
    gateway.client.get("/v1/jobs/SECRET-ID")
    assert "SECRET" not in json.dumps(logged)
    assert "SECRET" not in gateway.client.get("/metrics").text


def test_metrics_are_by_route_and_status(gateway: Gateway) -> None:
    gateway.client.post(PATH, json=ASKED)
    for number in range(3):
        gateway.client.get(f"/random/{number}")
    until(lambda: gateway.metric("medforge_gateway_requests_total", route="other", status="404", client="unknown") == 3)
    assert gateway.metric("medforge_gateway_requests_total", route=PATH, status="200", client="system") == 1
    assert gateway.metric("medforge_gateway_request_seconds_count", route=PATH) == 1
    assert gateway.metric("medforge_gateway_first_byte_seconds_count", route=PATH) == 1


def test_a_body_over_the_limit_is_413(serve: Serve, settings: Settings, fake: Fake) -> None:
    with serve(settings.model_copy(update={"max_body": 2048})) as gateway:
        padded = {"messages": [{"role": "user", "content": "x" * 1900}]}
        assert gateway.client.post(PATH, json=padded).status_code == 200

        def chunks(count: int) -> Any:
            for _ in range(count):
                yield b"x" * 1024

        for content in (b"x" * 2049, b"x" * 5_000_000, chunks(3), chunks(5000)):
            answer = gateway.client.post(PATH, content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body-too-large")
        assert len(fake.requests) == 1
        assert gateway.metric("medforge_gateway_refused_total", reason="body") == 4
        # for FastAPI's routes too
        answer = gateway.client.post("/v1/feedback", content=chunks(5000))
        assert answer.status_code == 413


def raw(gateway: Gateway) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_body_that_does_not_come_is_cut_off_at_the_deadline(serve: Serve, settings: Settings, key: str) -> None:
    with serve(settings.model_copy(update={"deadline": 0.5})) as gateway, raw(gateway) as connection:
        began = time.monotonic()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 100\r\n\r\nhalf"
        connection.sendall(head.encode())
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert 0.3 < time.monotonic() - began < 3
        assert b"connection: close" in answer.lower()


def test_a_body_that_ends_too_early_is_nobodys_failure(
    gateway: Gateway, key: str, logged: list[dict[str, Any]]
) -> None:
    with raw(gateway) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 100\r\n\r\nhalf"
        connection.sendall(head.encode())
    until(lambda: logged)
    assert logged[-1]["status"] == 499


def test_a_refused_request_with_a_body_closes_its_connection(gateway: Gateway) -> None:
    """Else the body that was not read would be taken for the next request."""
    with raw(gateway) as connection:
        smuggled = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(smuggled) + 10}\r\n\r\n"
        connection.sendall(head.encode() + smuggled)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    assert got.startswith(b"HTTP/1.1 401 ")
    assert got.count(b"HTTP/1.1") == 1


def test_only_known_hosts_are_served(serve: Serve, settings: Settings) -> None:
    with serve(settings.model_copy(update={"allowed_hosts": ["gateway.example", "[::1]"]})) as gateway:
        for host, status in (
            ("gateway.example", 200),
            ("GATEWAY.example:8080", 200),
            ("[::1]:8080", 200),
            ("[::1]", 200),
            ("evil.example", 421),
            ("gateway.example.evil", 421),
            ("", 421),
        ):
            assert gateway.client.get("/v1/models", headers={"host": host}).status_code == status, host
        assert gateway.client.get("/livez", headers={"host": "10.0.0.7"}).status_code == 200  # the platform's probes


def test_draining_refuses_new_requests_and_closes(gateway: Gateway) -> None:
    gateway.parts.draining = True
    answer = gateway.client.post(PATH, json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["connection"] == "close"
    assert gateway.client.get("/livez").status_code == 200
    assert gateway.client.get("/readyz").status_code == 503
    assert gateway.metric("medforge_gateway_refused_total", reason="draining") == 1


def test_production_asks_for_https(serve: Serve, settings: Settings) -> None:
    with serve(settings.model_copy(update={"environment": "production"})) as gateway:
        assert gateway.client.get("/livez").headers["strict-transport-security"] == "max-age=31536000"


def test_an_answer_that_fails_half_way_is_cut(serve: Serve, settings: Settings, logged: list[dict[str, Any]]) -> None:
    from starlette.responses import StreamingResponse

    app = create_app(settings)

    @app.get("/half")
    async def half(_: Request) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"one"
            raise RuntimeError("Jane Doe")

        return StreamingResponse(pieces())

    with serve(settings, app) as gateway:
        with pytest.raises(httpx.RemoteProtocolError):
            gateway.client.get("/half")
        until(lambda: [line["status"] for line in logged if line["event"] == "request"] == [500])
        assert "Jane" not in json.dumps(logged)


def test_bodies_in_memory_are_bounded_by_how_many_are_let_in(
    serve: Serve, settings: Settings, fake: Fake, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.gateway import app

    monkeypatch.setattr(app, "_OTHERS", 0)
    with serve(settings.model_copy(update={"concurrency": 2, "queue": 1})) as gateway:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 9000\r\n\r\nhalf"
        slow = [raw(gateway) for _ in range(3)]
        for connection in slow:
            connection.sendall(head.encode())
        until(lambda: gateway.app.state.traffic.let_in == 3)
        answer = gateway.client.post(PATH, json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        strangers = [raw(gateway) for _ in range(10)]  # who has no key takes nobody's place
        for connection in strangers:
            connection.sendall(head.replace(key, "mf_x").encode())
        for connection in slow:
            connection.close()
        until(lambda: gateway.app.state.traffic.let_in == 0)
        assert gateway.client.post(PATH, json=ASKED).status_code == 200
        for connection in strangers:
            connection.close()
        until(lambda: gateway.app.state.traffic.open == 0)
