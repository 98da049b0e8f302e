"""A predictor of scripted answers: OpenAI's API with MedForge's extension, on a real port, with faults to order."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

RELEASE = "a" * 64
T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Fake:
    """The attributes are the script, and may be changed at any time; `requests` and the counts tell what came."""

    def __init__(self, release: str | None = RELEASE, heads: tuple[str, ...] = ("region", "match")) -> None:
        self.text: str | Callable[[dict[str, Any]], str] = "no"
        self.model, self.release, self.version = "medforge", release, "chest 0.1.0"
        self.extended = True  # False: like vLLM, which knows no extension
        self.heads, self.family = heads, "qwen3-vl"
        self.min_pixels, self.max_pixels = 56 * 56, 1024 * 1024
        self.about: dict[str, Any] = {"name": "chest", "base": "tiny"}
        self.region: tuple[float, ...] | None = (0.1, 0.2, 0.5, 0.6)
        self.match: float | Callable[[dict[str, Any]], float] | None = 0.93
        self.logprob = -0.1
        self.top: dict[str, float] = {}  # of every token; empty: only the token itself
        # faults
        self.statuses: deque[int] = deque()  # of the next requests, such as 503; the others are answered
        self.retry_after: str | None = None
        self.first_byte_seconds = 0.0
        self.token_seconds = 0.0
        self.hang_up_after: int | None = None  # pieces of a stream, or 0 for an answer without a head
        self.garbage: bytes | None = None
        # what it saw
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.looks = 0
        self.cancelled = 0
        self.open = self.most_open = 0
        self._loop = Loop()
        self._runner: web.AppRunner | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """The base URL of its API."""
        return f"http://127.0.0.1:{self.port}/openai/v1"

    def start(self) -> None:
        """Listen: at the same port as before, if it did."""
        self._loop.run(self._start())

    def stop(self) -> None:
        """Refuse connections, and cut the open ones."""
        self._loop.run(self._stop())

    def close(self) -> None:
        """Stop for good."""
        if self._runner is not None:
            self.stop()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/openai/v1/models", self._models)
        app.router.add_post("/openai/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()
        self._runner = None

    async def _models(self, _: web.Request) -> web.Response:
        self.looks += 1
        entry: dict[str, Any] = {"id": self.model, "object": "model", "created": 0, "owned_by": "medforge"}
        if self.extended:
            entry["medforge"] = {
                "release": self.release,
                "version": self.version,
                "heads": list(self.heads),
                "family": self.family,
                "min_pixels": self.min_pixels,
                "max_pixels": self.max_pixels,
                "about": self.about,
            }
        return web.json_response({"object": "list", "data": [entry]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        body = json.loads(data)
        self.bodies.append(data)
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        status = self.statuses.popleft() if self.statuses else 200
        if status != 200:
            headers = {"retry-after": self.retry_after} if self.retry_after else {}
            error = {"error": {"message": "scripted failure", "type": "server_error", "code": "scripted"}}
            return web.json_response(error, status=status, headers=headers)
        await asyncio.sleep(self.first_byte_seconds)
        if self.garbage is not None:
            kind = "text/event-stream" if body.get("stream") else "application/json"
            return web.Response(body=self.garbage, content_type=kind)
        if self.hang_up_after == 0:
            return self._hang_up(request)
        headers = {"x-medforge-model": self.model}
        if self.extended and self.release:
            headers["x-medforge-release"] = self.release
        text = self.text(body) if callable(self.text) else self.text
        pieces = [piece + " " for piece in text.split(" ")[:-1]] + [text.split(" ")[-1]]
        if body.get("stream"):
            return await self._stream(request, body, pieces, headers)
        await asyncio.sleep(self.token_seconds * len(pieces))
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [self._logprob(piece) for piece in pieces]}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": self.model}
        answer |= {"choices": [choice], "usage": self._usage(pieces)}
        return web.json_response(answer | self._extension(body), headers=headers)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], pieces: list[str], headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **headers})
        await response.prepare(request)
        start = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": self.model}

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(start | event).encode() + b"\n\n")

        for number, piece in enumerate(pieces):
            if number == self.hang_up_after:
                return self._hang_up(request)
            await asyncio.sleep(self.token_seconds)
            choice: dict[str, Any] = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [self._logprob(piece)]}
            await send({"choices": [choice]})
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            await send({"choices": [], "usage": self._usage(pieces)} | self._extension(body))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _hang_up(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError("as the script says")

    def _usage(self, pieces: list[str]) -> dict[str, int]:
        return {"prompt_tokens": 10, "completion_tokens": len(pieces), "total_tokens": 10 + len(pieces)}

    def _logprob(self, piece: str) -> dict[str, Any]:
        top = self.top or {piece: self.logprob}
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        return {"token": piece, "logprob": self.logprob, "bytes": None, "top_logprobs": listed}

    def _extension(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body.get("medforge")
        if not (asked and self.extended):
            return {}
        match = self.match(body) if callable(self.match) else self.match
        return {
            "medforge": {
                "release": self.release,
                "region": self.region if asked.get("region") and "region" in self.heads else None,
                "match": match if asked.get("match") and "match" in self.heads else None,
                "image": 0,
            }
        }
