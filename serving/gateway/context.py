"""What every route begins with: who calls, may they, how often, and until when.

    context = await admit(request, "diagnose")

The middleware makes an `Exchange` for each request; routes add to it what the access log, the metrics and the answer's
headers tell.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope

from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.parts import Caller, Context, Parts

EXCHANGE = "medforge.exchange"
TIMEOUT_HEADER = "x-request-timeout"
_WATCHED_AFTER = 0.05  # seconds
T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818  it is no error of the gateway's
    """The client hung up before its answer was whole: nobody is left to be answered."""


class Traffic:
    """Requests that are being answered, health checks apart; and those of them that were let in, at most `most`.

    Those who are let in may send bodies, which are kept in memory while they wait: their number bounds it.
    """

    def __init__(self, most: float = math.inf) -> None:
        self.open = self.let_in = 0
        self._most = most

    def enter(self) -> None:
        """Let one in; GatewayError 503 if there are too many."""
        if self.let_in >= self._most:
            raise GatewayError(503, "overloaded", "Too many requests are open; send it again later", retry_after=1)
        self.let_in += 1


@dataclass
class Exchange:
    """One request and what became of it. `headers` are added to the answer; times are time.monotonic()."""

    request_id: str
    started: float
    deadline: float
    caller: Caller | None = None
    track: str | None = None
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    let_in: bool = False


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the middleware made for this request."""
    exchange = scope[EXCHANGE]
    assert isinstance(exchange, Exchange)
    return exchange


async def admit(request: Request, scope: str) -> Context:
    """Who calls, if they may: a valid key or token with `scope` ("" for any), within their limits.

    GatewayError 401, 403 or 429 otherwise, 400 for a bad x-request-timeout, 503 where it cannot be found out.
    """
    return await admit_scope(request.scope, scope)


async def admit_scope(scope: Scope, wanted: str) -> Context:
    """`admit` for a bare ASGI route."""
    parts: Parts = scope["app"].state.parts
    exchange = exchange_of(scope)
    headers = Headers(scope=scope)
    exchange.deadline = exchange.started + _seconds(headers.get(TIMEOUT_HEADER), parts.settings.deadline)
    caller = await parts.authentication.identify(headers, wanted)
    exchange.caller = caller
    exchange.headers.update(await parts.limits.check(caller))
    if not exchange.let_in:
        exchange.traffic.enter()
        exchange.let_in = True
    return Context(exchange.request_id, caller, exchange.deadline)


def _seconds(value: str | None, longest: float) -> float:
    """The caller's own time limit; never longer than the gateway's."""
    if value is None:
        return longest
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise bad_request(
            "timeout-invalid", f"{TIMEOUT_HEADER} has to be a number of seconds above 0, such as 30", TIMEOUT_HEADER
        )
    return min(seconds, longest)


def time_left(context: Context) -> float:
    """Seconds until the request has to be answered; GatewayError 504 if there are none."""
    left = context.deadline - time.monotonic()
    if left <= 0:
        raise GatewayError(
            504, "deadline", f"There was no answer in time; allow more with {TIMEOUT_HEADER}, or ask less at once"
        )
    return left


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up (ClientGone).

    The request's body has to be read before: what `receive` says from then on is only that the client has gone. Work
    that is done at once is not watched: the watch is a task of its own.
    """
    here, hung_up = asyncio.current_task(), False
    assert here is not None, "requests are tasks"
    watch: asyncio.Task[None] | None = None

    def begin() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(_gone(receive))
        watch.add_done_callback(leave)

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal hung_up
        if not watch.cancelled():
            watch.exception()  # a server that fails to say more has lost the client too
            hung_up = True
            here.cancel()

    timer = asyncio.get_running_loop().call_later(_WATCHED_AFTER, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not hung_up or _cancelled_again(here):
            raise
        raise ClientGone from None
    finally:
        timer.cancel()
        if watch is not None:
            watch.remove_done_callback(leave)
            watch.cancel()


def _cancelled_again(task: asyncio.Task[Any]) -> bool:
    """Take one cancellation back; whether somebody else has asked for another. Before Python 3.11 that is unknown."""
    return hasattr(task, "uncancel") and task.uncancel() > 0


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
