"""The outermost layer, pure ASGI: id, host, draining, limits of bodies, errors, metrics, access log, security headers.

Nothing that a patient could be known by is logged: no body, no query, no path but its route's template, no message of
an unexpected exception.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.context import EXCHANGE, ClientGone, Exchange, Traffic
from serving.gateway.errors import GatewayError
from serving.gateway.logs import logger, place
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings

if sys.version_info >= (3, 11):
    from asyncio import timeout  # asyncio.wait_for makes a task for each piece of a body
else:
    from async_timeout import timeout

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
HEALTH = frozenset({"/livez", "/readyz", "/metrics"})
CLIENT_GONE = 499  # what nginx calls it; it is seen in logs and metrics only
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 32 << 20

SECURITY = (
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("cache-control", "no-store"),
)


@dataclass
class _Wire:
    """What has gone over a request's connection."""

    receive: Receive
    send: Send
    exchange: Exchange
    limit: int
    expected: int | None
    whole: bool = False
    bytes_in: int = 0
    bytes_out: int = 0
    status: int = 0
    first_byte: float | None = None
    finished: bool = False
    extra: list[tuple[bytes, bytes]] = field(default_factory=list)


class Envelope:
    """Wraps every request. `traffic` is shared with the server, which waits for the open ones when it drains."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, traffic: Traffic) -> None:
        self.app, self.settings, self.metrics, self.traffic = app, settings, metrics, traffic
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._security = [(name.encode(), value.encode()) for name, value in SECURITY]
        if settings.environment == "production":
            self._security.append((b"strict-transport-security", b"max-age=31536000"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        now = time.monotonic()
        exchange = scope[EXCHANGE] = Exchange(request_id, now, now + self.settings.deadline, traffic=self.traffic)
        wire = _Wire(receive, send, exchange, self.settings.max_body, _content_length(headers))
        wire.whole = wire.expected == 0 or (wire.expected is None and "transfer-encoding" not in headers)
        health = scope["path"] in HEALTH
        self.traffic.open += not health
        try:
            await self._serve(scope, wire, headers, health)
        finally:
            self.traffic.open -= not health
            self.traffic.let_in -= exchange.let_in
            self._tell(scope, wire)

    async def _serve(self, scope: Scope, wire: _Wire, headers: Headers, health: bool) -> None:
        async def receive() -> Message:
            return await _receive(wire)

        async def send(message: Message) -> None:
            await self._send(wire, message)

        try:
            if not health:
                self._check(scope, headers, wire)
            await self.app(scope, receive, send)
        except GatewayError as error:
            await self._refuse(wire, send, error)
        except ClientGone:
            wire.status = CLIENT_GONE
        except Exception as error:
            logger().error("failed", request_id=wire.exchange.request_id, route=route_of(scope), **place(error))
            await self._refuse(
                wire, send, GatewayError(500, "internal", "The gateway failed; tell its operator the request's id")
            )

    def _check(self, scope: Scope, headers: Headers, wire: _Wire) -> None:
        """GatewayError for what is refused before anything of it is read."""
        host = headers.get("host", "")
        name = host.lower() if host.startswith("[") and host.endswith("]") else host.lower().rsplit(":", 1)[0]
        if "*" not in self._hosts and name not in self._hosts:
            raise GatewayError(421, "host-unknown", "This host name is not served here; see allowed_hosts", "host")
        if scope["app"].state.parts.draining:
            self.metrics.refused.labels("draining").inc()
            wire.extra.append((b"connection", b"close"))
            raise GatewayError(503, "draining", "The gateway is shutting down; send it again", retry_after=1)
        if wire.expected is not None and wire.expected > wire.limit:
            raise too_large(wire.limit)

    async def _send(self, wire: _Wire, message: Message) -> None:
        if message["type"] == "http.response.start":
            wire.status = message["status"]
            message["headers"] = self._headers(wire, message.get("headers", []))
        elif message["type"] == "http.response.body":
            if wire.first_byte is None:
                wire.first_byte = time.monotonic()
            wire.bytes_out += len(message.get("body", b""))
            wire.finished = not message.get("more_body", False)
            if wire.finished and not wire.whole and wire.status >= 400:
                await wire.send({**message, "more_body": True})
                await _linger(wire)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
        await wire.send(message)

    def _headers(self, wire: _Wire, headers: Any) -> list[tuple[bytes, bytes]]:
        """The answer's own headers and those that every answer has; the answer's win."""
        own = list(headers)
        names = {name.lower() for name, _ in own}
        own += [pair for pair in self._security if pair[0] not in names]
        own.append((b"x-request-id", wire.exchange.request_id.encode()))
        own += [(name.encode(), value.encode()) for name, value in wire.exchange.headers.items()]
        own += wire.extra
        if wire.status >= 400 and not wire.whole and (b"connection", b"close") not in own:
            own.append((b"connection", b"close"))  # the rest of its body would be read as the next request
        return own

    async def _refuse(self, wire: _Wire, send: Send, error: GatewayError) -> None:
        wire.exchange.error = error.code
        if wire.status:  # too late to say so: an answer that is cut off must not look whole
            wire.status = error.status
            raise ConnectionAbortedError("the answer was cut off") from None
        if error.code in ("body-too-large", "body-too-slow"):
            self.metrics.refused.labels("body").inc()
        body = error.encode(wire.exchange.request_id)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    def _tell(self, scope: Scope, wire: _Wire) -> None:
        """The request's line of the access log, and its metrics."""
        exchange, now = wire.exchange, time.monotonic()
        if not wire.finished and exchange.error is None:
            wire.status = CLIENT_GONE
        route = route_of(scope)
        client = exchange.caller.kind if exchange.caller else "unknown"
        self.metrics.requests.labels(route, str(wire.status), client).inc()
        self.metrics.seconds.labels(route).observe(now - exchange.started)
        if exchange.error is not None:
            self.metrics.errors.labels(exchange.error).inc()
        if wire.first_byte is not None:
            self.metrics.first_byte.labels(route).observe(wire.first_byte - exchange.started)
        logger().info(
            "request",
            request_id=exchange.request_id,
            method=scope["method"],
            route=route,
            status=wire.status,
            caller=exchange.caller.id if exchange.caller else None,
            client=client,
            track=exchange.track,
            error=exchange.error,
            seconds=round(now - exchange.started, 6),
            bytes_in=wire.bytes_in,
            bytes_out=wire.bytes_out,
        )


def too_large(limit: int) -> GatewayError:
    """413: the body has more bytes than `limit`."""
    return GatewayError(
        413, "body-too-large", f"The request's body may have {limit} bytes; send fewer or smaller images"
    )


def translate(error: Exception) -> GatewayError:
    """What FastAPI and Starlette raise (validation, 404, 405, …) as the gateway's own error.

    A value that the caller sent is never repeated: it may be a patient's.
    """
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        if first["type"] == "json_invalid":
            return GatewayError(422, "json-invalid", "The body is not JSON")
        return GatewayError(422, "invalid", str(first["msg"]).removeprefix("Value error, "), ".".join(path) or None)
    if isinstance(error.__cause__, GatewayError):  # FastAPI hides what is raised while it reads a body
        return error.__cause__
    assert isinstance(error, HTTPException)
    code, message = {
        404: ("not-found", "There is nothing here; /openapi.json lists what there is"),
        405: ("method-not-allowed", "This method is not served here; /openapi.json lists what is"),
    }.get(error.status_code, ("refused", str(error.detail)))
    return GatewayError(error.status_code, code, message)


async def _receive(wire: _Wire) -> Message:
    """The next piece of the body, within its limits of bytes and time; afterwards, that the client has gone."""
    if wire.whole:
        return await wire.receive()
    try:
        async with timeout(max(0.0, wire.exchange.deadline - time.monotonic())):
            message = await wire.receive()
    except asyncio.TimeoutError:
        raise GatewayError(408, "body-too-slow", "The request's body did not come in time") from None
    if message["type"] == "http.disconnect":
        raise ClientGone
    wire.bytes_in += len(message.get("body", b""))
    wire.whole = not message.get("more_body", False)
    if wire.bytes_in > wire.limit:
        raise too_large(wire.limit)
    return message


async def _linger(wire: _Wire) -> None:
    """Read on for a moment what the client still sends: closing at once would reset its connection, and it would never
    read why it was refused."""
    until, more = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES
    while more > 0 and (left := until - time.monotonic()) > 0:
        try:
            async with timeout(left):
                message = await wire.receive()
        except asyncio.TimeoutError:
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        more -= len(message.get("body", b""))


def _content_length(headers: Headers) -> int | None:
    value = headers.get("content-length", "")
    return int(value) if value.isdecimal() else None


def route_of(scope: Scope) -> str:
    """The route's template, such as /v1/jobs/{id}: a path itself could be any text."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else "other"
