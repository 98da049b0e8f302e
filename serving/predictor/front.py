"""What stands before all routes, KServe's own too: the release's headers, a limit on bodies, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.predictor.errors import Refusal

MAX_BODY = 64 << 20
# KServe lets anybody load and unload models: here one release is served, and only a restart changes it
_CLOSED = "/v2/repository"


class Front:
    """Pure ASGI middleware. `headers` are added to every answer; a body of more than `max_body` bytes is refused.

    When a client goes away before its answer is whole, the work for it is cancelled.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], max_body: int = MAX_BODY) -> None:
        self._app, self._max_body = app, max_body
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of any kind; only HTTP requests are looked at."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._headers, self._max_body)
        if scope["path"].startswith(_CLOSED):
            await exchange.refuse(Refusal(404, "not-found", "models are not loaded or unloaded while serving"))
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            await exchange.refuse(self._too_large())
            return
        work = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        exchange.work = work
        try:
            await work
        except asyncio.CancelledError:
            if not exchange.gone and not exchange.too_large:
                raise  # the server itself is stopping
        finally:
            work.cancel()
            if exchange.watch is not None:
                exchange.watch.cancel()
        if exchange.too_large:
            await exchange.refuse(self._too_large())

    def _too_large(self) -> Refusal:
        return Refusal(413, "body-too-large", f"the body has more than {self._max_body} bytes; send smaller images")


class _Exchange:
    """A request and its answer on their way."""

    def __init__(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]], max_body: int) -> None:
        self._receive, self._send, self._headers, self._max_body = receive, send, headers, max_body
        self.work: asyncio.Future[None] | None = None
        self.watch: asyncio.Task[None] | None = None
        self.gone = self.too_large = self._begun = self._whole = False
        self._size = 0
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        """A part of the body; after the last one, the client's leaving."""
        if self.watch is not None or self.gone:
            await self._left.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._leave()
            await asyncio.sleep(0)  # where the work is cancelled, which runs this
            return message
        self._size += len(message.get("body", b""))
        if self._size > self._max_body:
            self.too_large = True
            assert self.work is not None
            self.work.cancel()
            await asyncio.sleep(0)  # as above
        elif not message.get("more_body", False):
            self.watch = asyncio.ensure_future(self._until_gone())
        return message

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._left.set()
        if not self._whole and self.work is not None:
            self.gone = True
            self.work.cancel()

    async def send(self, message: Message) -> None:
        """A part of the answer, with the headers that all have."""
        if self.too_large:
            return  # what the route makes of half a body
        if message["type"] == "http.response.start":
            self._begun = True
            own = {name for name, _ in self._headers}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in own]
            message = {**message, "headers": [*kept, *self._headers]}
        elif not message.get("more_body", False):
            self._whole = True
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, in OpenAI's shape; the connection is closed, as a body may still be coming."""
        if self._begun:
            return
        body = json.dumps(refusal.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *self._headers]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
