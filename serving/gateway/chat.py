"""The hot path: /v1/chat/completions as OpenAI's API has it, and /v1/models.

A bare ASGI route: the body is read once, looked into (images, model, stream), and its own bytes go on; the answer comes
back byte for byte while it is written. Its row of the audit log is written before its last bytes go out: an answer
without a row is never whole.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import aiohttp
import msgspec
from fastapi import APIRouter, Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from medforge.files import sha256_bytes
from serving.gateway.auditing import record
from serving.gateway.context import ClientGone, admit, admit_scope, exchange_of, while_connected
from serving.gateway.errors import GatewayError
from serving.gateway.looking import Looked, look
from serving.gateway.middleware import CLIENT_GONE
from serving.gateway.parts import Context, Parts
from serving.gateway.upstream import explained, garbage, read_whole

PATH = "/v1/chat/completions"
NOTICE = "not for diagnostic use without review"
_DONE = b"data: [DONE]"
_TAIL = 8192  # bytes of a stream's end, in which its usage stands
_PASSED_ON = frozenset({200, 400, 413, 422})
_FALLS_BACK = frozenset({"upstream-unavailable", "upstream-error", "upstream-garbage", "overloaded"})


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Counted(msgspec.Struct):
    usage: _Usage | None = None


_counted = msgspec.json.Decoder(_Counted)


class Chat:
    """The route POST /v1/chat/completions, as an ASGI app."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = ROUTE  # FastAPI tells it of its own routes only
        parts: Parts = scope["app"].state.parts
        context = await admit_scope(scope, "chat")
        body = await _read(receive)
        relay = _Relay(parts, scope, context, send, look(body, parts.settings))
        try:
            await while_connected(receive, relay.run())
        except ClientGone:
            await relay.note(CLIENT_GONE)
            raise
        except GatewayError as error:
            if not relay.noted:
                await relay.note(error.status)
            raise


class _Relay:
    """One request on its way to an upstream, and its answer on its way back."""

    def __init__(self, parts: Parts, scope: Scope, context: Context, send: Send, looked: Looked) -> None:
        self._parts, self._context, self._send, self._looked = parts, context, send, looked
        self._exchange = exchange_of(scope)
        self._track = parts.upstreams.choose(context.caller)
        self._release: str | None = None
        self._started = False
        self._output = hashlib.sha256()
        self.noted = False

    async def run(self) -> None:
        """Wait for a place, ask, answer. A candidate that fails before its first byte gives way to stable."""
        async with self._parts.admission.place(self._context):
            try:
                await self._ask()
            except GatewayError as error:
                if self._started or self._track == "stable" or error.code not in _FALLS_BACK:
                    raise
                self._track = "stable"
                await self._ask()

    async def note(self, status: int) -> None:
        """Write the request's row of the audit log."""
        self.noted = True
        await record(
            self._parts,
            self._context,
            PATH,
            status=status,
            release=self._release,
            track=self._track,
            # not in a thread: handing Python's lock to and fro takes longer than the digest
            inputs=sha256_bytes(self._looked.body),
            outputs=self._output.hexdigest() if self._started else None,
        )

    async def _ask(self) -> None:
        upstreams = self._parts.upstreams
        self._exchange.track = self._track
        body = self._looked.named(upstreams.capabilities(self._track).model)
        async with upstreams.open(body, self._context, self._track) as response:
            self._release = response.headers.get("x-medforge-release") or upstreams.release(self._track).digest
            self._exchange.headers |= {
                "x-medforge-release": self._release or "unknown",
                "x-medforge-track": self._track,
                "x-medforge-notice": NOTICE,
            }
            if response.status == 200 and response.content_type == "text/event-stream":
                await self._stream(response)
            else:
                await self._whole(response)

    async def _whole(self, response: aiohttp.ClientResponse) -> None:
        """Send an answer, or a refusal, that is no stream."""
        if response.status not in _PASSED_ON:  # 401 and 404 are of the gateway's own key and URL, not of the caller
            raise GatewayError(502, "upstream-misconfigured", f"The model's server answered {response.status}")
        data = await read_whole(response)
        try:
            self._count(_counted.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise garbage("that is not of OpenAI's API") from None
        self._output.update(data)
        self._started = True
        await self.note(response.status)
        await self._start(response.status, b"application/json", len(data))
        await self._send({"type": "http.response.body", "body": data})

    async def _stream(self, response: aiohttp.ClientResponse) -> None:
        """Send a stream on as it comes. The piece that ends it waits for the audit log."""
        self._started = True
        await self._start(200, b"text/event-stream; charset=utf-8", None)
        tail = last = b""
        try:
            async for chunk in response.content.iter_any():
                self._output.update(chunk)
                tail = (tail + chunk)[-_TAIL:]
                if last or _DONE in tail:
                    last += chunk
                else:
                    await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            if not last:
                raise garbage("that breaks off")
        except (GatewayError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            # the reason goes out as an event, which OpenAI's clients raise as an error; then the connection is cut
            told = error if isinstance(error, GatewayError) else explained(error, self._track).error
            event = b"data: " + told.encode(self._context.request_id) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
            await self.note(told.status)
            raise
        self._count(_usage_of(tail))
        await self.note(200)
        await self._send({"type": "http.response.body", "body": last})

    async def _start(self, status: int, kind: bytes, length: int | None) -> None:
        headers = [(b"content-type", kind)]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _count(self, counted: _Counted | None) -> None:
        if counted and counted.usage:
            tokens = self._parts.metrics.tokens
            tokens.labels("prompt").inc(counted.usage.prompt_tokens)
            tokens.labels("completion").inc(counted.usage.completion_tokens or 0)


async def _read(receive: Receive) -> bytes:
    """The request's body; the middleware bounds its size and time."""
    message = await receive()
    first = message.get("body", b"")
    if not message.get("more_body", False):
        return bytes(first)
    pieces = [first]
    while message.get("more_body", False):
        message = await receive()
        pieces.append(message.get("body", b""))
    return b"".join(pieces)


def _usage_of(tail: bytes) -> _Counted | None:
    """The usage that stands in a stream's last events; None where the caller did not ask for it."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and b'"usage"' in line:
            try:
                counted = _counted.decode(line[6:])
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
            if counted.usage:
                return counted
    return None


# bypasses FastAPI: no validation, no dependencies, no second copy of the body; see documentation.py for its schema
CHAT = Chat()
ROUTE = Route(PATH, CHAT, methods=["POST"], name="chat", include_in_schema=False)


def router() -> APIRouter:
    """The list of models; the chat itself is ROUTE."""
    made = APIRouter(tags=["OpenAI"])

    @made.get("/v1/models", summary="The models that are served, as OpenAI's API lists them")
    async def models(request: Request) -> dict[str, Any]:
        await admit(request, "")
        upstream = request.app.state.parts.upstreams.get("stable")
        name = upstream.capabilities.model
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "medforge"}] if name else []
        return {"object": "list", "data": listed}

    return made
