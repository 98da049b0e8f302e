"""A gateway whose answers are scripted, for tests of the page: page.py's own routes, the real middleware and image
readers, and /v1/diagnose, /v1/feedback, /v1/releases/current that say what a test lays down."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.gateway import api, page
from serving.gateway.context import admit, exchange_of
from serving.gateway.errors import GatewayError
from serving.gateway.metrics import Metrics
from serving.gateway.middleware import Envelope, Traffic
from serving.gateway.parts import Caller
from serving.gateway.settings import Settings

KEY = "mf_test_0123456789abcdef"
DIGEST = "ab12" * 16
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

Step = tuple[str, Mapping[str, Any]] | threading.Event | GatewayError | None
"""An event, one of threading's to wait for, an error, or None: the connection is cut off."""


def answer(**changes: Any) -> dict[str, Any]:
    """The document of an answer with one region; keyword arguments replace fields. `id` and `images` come later."""
    document = {
        "created": CREATED,
        "task": "ask",
        "decision": "answered",
        "answer": "A nodule in the left upper lobe.",
        "regions": [region()],
        "match": {"value": 0.934, "threshold": 0.5, "source": "head"},
        "confidence": {"value": 0.81, "threshold": 0.3, "source": "tokens"},
        "release": {"digest": DIGEST, "model": "tiny", "version": "tiny 0.1", "track": "stable"},
    }
    return document | changes


def region(box: tuple[float, float, float, float] = (0.25, 0.5, 0.75, 0.875), **changes: Any) -> dict[str, Any]:
    """A region; its pixels are put in when the image is known."""
    return {"label": "nodule", "image": 0, "box": box, "source": "head"} | changes


def abstention(reason: api.Reason = "low-match", language: api.Language = "en", **changes: Any) -> dict[str, Any]:
    """The document of an abstention."""
    scores = {"match": {"value": 0.4999, "threshold": 0.5, "source": "head"}}
    withheld: dict[str, Any] = {"decision": "abstained", "answer": None, "regions": [], "confidence": None}
    return answer(**(withheld | scores | {"reason": reason, "reason_text": api.REASONS[reason][language]} | changes))


class _Door:
    """Authentication and limits in one: a single key, and no limit."""

    def __init__(self, keys: set[str]) -> None:
        self.keys = keys

    async def identify(self, headers: Mapping[str, str], scope: str) -> Caller:
        if headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            raise GatewayError(401, "key-invalid", "The key is not known here", "authorization")
        return Caller("caller", "reader", "page", frozenset({"diagnose", "feedback"}))

    async def check(self, caller: Caller) -> dict[str, str]:
        return {}


class _Parts:
    """As much of serving.gateway.parts.Parts as the page's routes use."""

    draining = False

    def __init__(self, settings: Settings, keys: set[str]) -> None:
        self.settings = settings
        self.authentication = self.limits = _Door(keys)


class PageServer:
    """The server in a thread of its own. `script` holds the next answers' steps, `requests` what was asked."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.script: deque[list[Step]] = deque()
        self.feedback_script: deque[GatewayError] = deque()
        self.requests: list[dict[str, Any]] = []
        self.verdicts: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self.keys = {KEY}
        self.settings = Settings(data_dir=data_dir, **settings)
        self.app = self._make_app()
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="page-server", daemon=True)

    def __enter__(self) -> PageServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the page's server did not start"
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def _make_app(self) -> FastAPI:
        app = FastAPI()
        app.state.parts = _Parts(self.settings, self.keys)
        app.add_middleware(Envelope, settings=self.settings, metrics=Metrics(), traffic=Traffic())
        app.include_router(page.router())
        app.post("/v1/diagnose", response_model=None)(self._diagnose)
        app.post("/v1/feedback", response_model=None)(self._feedback)
        app.get("/v1/releases/current", response_model=None)(self._release)
        return app

    async def _release(self, request: Request) -> Response:
        await admit(request, "")
        stable = api.Release(digest=DIGEST, model="tiny", version="tiny 0.1")
        return JSONResponse(api.CurrentRelease(stable=stable, heads=["region", "match"]).model_dump(mode="json"))

    async def _feedback(self, request: Request) -> Response:
        await admit(request, "feedback")
        if self.feedback_script:
            raise self.feedback_script.popleft()
        verdict = api.FeedbackRequest.model_validate_json(await request.body())
        self.verdicts.append(verdict.model_dump(mode="json", exclude_defaults=True))
        kept = api.FeedbackResponse(id="f1", request_id=verdict.request_id)
        return JSONResponse(kept.model_dump(mode="json"), 201)

    async def _diagnose(self, request: Request) -> Response:
        await admit(request, "diagnose")
        asked = api.DiagnoseRequest.model_validate_json(await request.body())
        self.requests.append(asked.model_dump(mode="json", exclude_none=True))
        steps: list[Step] = self.script.popleft() if self.script else [("result", answer())]
        if isinstance(steps[0], GatewayError):
            raise steps[0]
        request_id = exchange_of(request.scope).request_id
        return StreamingResponse(self._events(steps, asked, request_id), media_type="text/event-stream")

    async def _events(self, steps: list[Step], asked: api.DiagnoseRequest, request_id: str) -> AsyncIterator[bytes]:
        try:
            for step in steps:
                if step is None:
                    raise ConnectionAbortedError("scripted")
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.01)
                        yield b": waiting\n\n"
                elif isinstance(step, GatewayError):
                    yield _event("error", step.body(request_id))
                else:
                    name, data = step
                    yield _event(name, self._complete(data, asked, request_id) if name == "result" else data)
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    def _complete(self, data: Mapping[str, Any], asked: api.DiagnoseRequest, request_id: str) -> dict[str, Any]:
        """The result with its id, its images and its regions' pixels, as the contract has it."""
        images = []
        for number, image in enumerate(asked.images):
            raw = page.read_picture(_decode(image.data), self.settings, image.frame, f"images.{number}")
            images.append(raw.out)
        regions = [
            one | {"pixels": _pixels(one["box"], images[one["image"]].width, images[one["image"]].height)}
            for one in data["regions"]
        ]
        document = api.DiagnoseResponse.model_validate(
            dict(data) | {"id": request_id, "images": images, "regions": regions}
        )
        return document.model_dump(mode="json")


def _decode(data: str) -> bytes:
    return base64.b64decode(data.partition(",")[2])


def _pixels(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = box
    return round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
