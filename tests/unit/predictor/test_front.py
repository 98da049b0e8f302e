"""What stands before the routes: headers, body limit, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.predictor.front import Front

HEADERS = {"X-Medforge-Release": "abc"}


class Client:
    """Sends the messages that it is given, then waits until it is told to leave. Keeps what it is answered."""

    def __init__(self, *parts: bytes, path: str = "/x", length: int | None = None) -> None:
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        self.scope: Scope = {"type": "http", "path": path, "headers": headers, "method": "POST"}
        self._messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, start=1)
        ]
        self.left = asyncio.Event()
        self.told: list[Message] = []

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.told.append(message)

    @property
    def status(self) -> int:
        return int(self.told[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.told[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.told[1:])


async def read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body + b"?"
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await read(receive)
    headers = [(b"content-type", b"text/plain"), (b"x-medforge-release", b"forged")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_an_answer_gets_the_headers_once() -> None:
    async def test() -> None:
        client = Client(b"a", b"b")
        await Front(echo, HEADERS)(client.scope, client.receive, client.send)
        assert (client.status, client.body) == (200, b"ab")
        assert client.told[0]["headers"] == [(b"content-type", b"text/plain"), (b"x-medforge-release", b"abc")]

    run(test)


@pytest.mark.parametrize(
    ("parts", "length", "status"),
    [
        ([b"x" * 10], 10, 200),
        ([b"x" * 5, b"x" * 5], None, 200),
        ([b"x" * 11], 11, 413),
        ([b"x" * 11], None, 413),
        ([b"x" * 6, b"x" * 6, b"x"], None, 413),
        ([b"x" * 11], 3, 413),  # a length that lies
    ],
)
def test_the_limit_of_bodies(parts: list[bytes], length: int | None, status: int) -> None:
    async def test() -> None:
        client = Client(*parts, length=length)
        await Front(echo, HEADERS, max_body=10)(client.scope, client.receive, client.send)
        assert client.status == status and client.headers[b"x-medforge-release"] == b"abc"
        if status == 413:
            assert json.loads(client.body)["error"]["code"] == "body-too-large"
            assert len(client.told) == 2

    run(test)


def test_a_route_that_hides_the_cut_does_not_answer_instead() -> None:
    async def hiding(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await read(receive)
        except asyncio.CancelledError:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"?"})

    async def test() -> None:
        client = Client(b"x" * 6, b"x" * 6, b"")
        await Front(hiding, HEADERS, max_body=10)(client.scope, client.receive, client.send)
        assert client.status == 413 and len(client.told) == 2

    run(test)


@pytest.mark.parametrize("begun", [False, True])
def test_work_ends_when_the_client_leaves(begun: bool) -> None:
    ended: list[str] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def test() -> None:
        client = Client(b"x")
        task = asyncio.ensure_future(Front(slow, HEADERS)(client.scope, client.receive, client.send))
        await asyncio.sleep(0.05)
        assert not task.done()
        client.left.set()
        await task
        assert ended == ["cancelled"]

    run(test)


def test_a_client_that_leaves_while_sending_ends_the_work() -> None:
    async def test() -> None:
        client = Client()
        client.left.set()
        await Front(echo, HEADERS)(client.scope, client.receive, client.send)
        assert client.told == []

    run(test)


def test_a_route_can_ask_whether_the_client_is_there() -> None:
    """As Starlette's streaming does, beside its own sending."""

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        listener = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        assert not listener.done()
        listener.cancel()

    async def test() -> None:
        client = Client(b"")
        await Front(listening, HEADERS)(client.scope, client.receive, client.send)
        assert client.body == b"ab"

    run(test)


def test_the_servers_own_stop_is_passed_on() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def test() -> None:
        client = Client(b"")
        task = asyncio.ensure_future(Front(slow, HEADERS)(client.scope, client.receive, client.send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)


def test_errors_of_a_route_are_passed_on() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    async def test() -> None:
        client = Client(b"")
        with pytest.raises(KeyError):
            await Front(broken, HEADERS)(client.scope, client.receive, client.send)

    run(test)


def test_models_are_not_loaded_or_unloaded_from_outside() -> None:
    async def test() -> None:
        client = Client(b"", path="/v2/repository/models/medforge/unload")
        await Front(echo, HEADERS)(client.scope, client.receive, client.send)
        assert client.status == 404

    run(test)


def test_other_connections_pass() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def test() -> None:
        client = Client()
        await Front(app, HEADERS)({"type": "lifespan"}, client.receive, client.send)
        assert seen == ["lifespan"]

    run(test)
