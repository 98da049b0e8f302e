"""The application as a whole: its documentation, its beginning and its end."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.gateway import logs
from serving.gateway.app import create_app
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway, Serve

OPEN = {"/livez", "/readyz", "/metrics", "/"}


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, methods in document["paths"].items() for method, one in methods.items()]


def test_every_route_is_documented_with_its_errors(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/v1/diagnose", "/v1/jobs", "/v1/feedback", "/v1/releases/current",
            "/livez", "/readyz", "/metrics"} <= set(document["paths"])  # fmt: skip
    for path, method, operation in operations(document):
        assert operation.get("summary"), (path, method)
        if path in OPEN:
            assert "security" not in operation
            continue
        assert operation["security"] == [{"key": []}], (path, method)
        assert {"401", "403", "429", "503"} <= set(operation["responses"]), (path, method)
        assert "HTTPValidationError" not in json.dumps(operation), (path, method)


def test_every_reference_leads_somewhere(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(target := node.get("$ref"), str):
                found: Any = document
                for part in target.removeprefix("#/").split("/"):
                    found = found[part]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(document)


def test_errors_are_as_documented(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ErrorResponse", "components": document["components"]}
    for answer in (
        gateway.client.get("/nothing"),
        gateway.client.get("/v1/models", headers={"authorization": ""}),
        gateway.client.post("/v1/chat/completions", content=b"{"),
    ):
        assert answer.status_code >= 400
        jsonschema.validate(answer.json(), schema)


def test_the_example_of_a_chat_is_one(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    content = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    jsonschema.validate(content["example"], {**content["schema"], "components": document["components"]})
    assert gateway.client.post("/v1/chat/completions", json=content["example"]).status_code == 200


def test_allow_lists_every_method_of_a_path(gateway: Gateway) -> None:
    for path, allowed in (("/v1/jobs", "GET, POST"), ("/v1/jobs/x", "DELETE, GET"), ("/livez", "GET")):
        answer = gateway.client.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_no_page_loads_anything_from_elsewhere(gateway: Gateway) -> None:
    for path in ("/docs", "/redoc"):
        assert gateway.client.get(path).status_code == 404


def test_making_an_application_opens_nothing(settings: Settings) -> None:
    app = create_app(settings)
    assert not settings.data_dir.exists()
    assert app.openapi()["info"]["title"] == "MedForge gateway"
    assert not settings.data_dir.exists()


def test_it_begins_and_ends_twice(settings: Settings) -> None:
    async def test() -> None:
        for _ in range(2):
            app = create_app(settings)
            async with app.router.lifespan_context(app):
                assert app.state.parts.upstreams.healthy("stable")
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert left == []

    asyncio.run(test())


def test_what_is_kept_is_private(gateway: Gateway) -> None:
    folder = gateway.parts.settings.data_dir
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "gateway.db").stat().st_mode & 0o077 == 0


def test_logs_are_json_lines_without_messages_of_exceptions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure("INFO")
        logs.logger().info("request", route="/x", path=tmp_path)
        logs.logger().debug("unseen")
        try:
            raise ValueError("Jane Doe")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    finally:
        structlog.reset_defaults()  # else later tests would write to this one's stdout
        root.handlers[:] = before
        root.setLevel(level)
    assert [line["event"] for line in lines] == ["request", "log"]
    assert (lines[0]["route"], lines[0]["level"]) == ("/x", "info")
    assert lines[0]["at"].endswith("Z")
    assert (lines[1]["logger"], lines[1]["exception"]) == ("uvicorn.error", "ValueError")
    assert "Jane" not in json.dumps(lines)


def test_only_questions_to_the_hot_path_go_past_fastapi(settings: Settings, serve: Serve) -> None:
    app, passed = create_app(settings), []

    class Watch:
        def __init__(self, inner: ASGIApp) -> None:
            self.inner = inner

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                passed.append(f"{scope['method']} {scope['path']}")
            await self.inner(scope, receive, send)

    app.add_middleware(Watch)
    with serve(settings, app) as gateway:
        asked = {"model": "medforge", "messages": [{"role": "user", "content": "Is it?"}]}
        assert gateway.client.post("/v1/chat/completions", json=asked).status_code == 200
        assert gateway.client.post("/v1/chat/completions/", json=asked).status_code == 404
        assert gateway.client.get("/v1/chat/completions").status_code == 405
        assert gateway.client.get("/livez").status_code == 200
    assert passed == ["POST /v1/chat/completions/", "GET /v1/chat/completions", "GET /livez"]
