"""The predictors behind the gateway: what they are, whether they are ready, and requests to them.

An upstream speaks OpenAI's API. MedForge's own predictor says more in `GET {base}/models` (release, heads, family),
which `Capabilities` holds; vLLM says less.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import aiohttp
import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload

from serving.gateway import api
from serving.gateway.answers import Capabilities, Completion, Token, capabilities_of, completion_of, events, garbage
from serving.gateway.balance import Track, track
from serving.gateway.context import TIMEOUT_HEADER, time_left
from serving.gateway.errors import GatewayError
from serving.gateway.logs import logger
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, Context
from serving.gateway.predictors import Upstream
from serving.gateway.retries import RetryBudget, backoff
from serving.gateway.routing import Follower, Place, Routing, of_settings
from serving.gateway.settings import Settings

__all__ = ["Capabilities", "Completion", "Token", "Track", "Upstream", "Upstreams", "garbage"]

POLL_READY, POLL_AWAY = 5.0, 1.0  # seconds between looks at an upstream
RETRIED = frozenset({502, 503, 504})
_LOOK_SECONDS = 3.0
_MOST_BYTES = 16 << 20  # of an answer that is read whole


Table = dict[Track, Upstream]


class Upstreams:
    """The stable predictor and, where there is one, the candidate; which ones may change while requests run."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._follower = Follower(settings.routing, metrics, self.take) if settings.routing else None
        self._table: Table = {}
        # a request keeps the table that it was routed by: it ends at the upstream where it began, and its answer bears
        # that one's release, also if the routing changes meanwhile
        self._kept: ContextVar[Table] = ContextVar("medforge.upstreams")
        self._incoming: Upstream | None = None  # the next stable predictor, until it is ready
        self.weight = 0.0
        self._budget = RetryBudget(settings.retry_budget)
        self._session: aiohttp.ClientSession | None = None
        self._polls: dict[Upstream, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to watch the upstreams; returns after the first look at each."""
        key = self._settings.upstream_key.get_secret_value()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, ttl_dns_cache=30),
            headers={"authorization": f"Bearer {key}"} if key else {},
            auto_decompress=True,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self.take(of_settings(self._settings) if self._follower is None else self._follower.routing)
        await asyncio.gather(*(upstream.looked.wait() for upstream in self._table.values()))
        if self._follower is not None:
            self._following = asyncio.create_task(self._follower.follow())

    async def close(self) -> None:
        """Stop watching, and close the connections."""
        tasks = [*self._polls.values(), *([self._following] if self._following else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def take(self, routing: Routing) -> None:
        """Route by this from now on.

        Another stable predictor is asked first, and callers are moved to it when it is ready; until then they stay
        where they are. A candidate's share counts at once, as nobody is given a candidate that is not ready.
        """
        table = dict(self._table)
        if self._incoming is not None:
            self._leave(self._incoming)
            self._incoming = None
        if "stable" not in table:
            table["stable"] = self._enter("stable", routing.stable)
        elif table["stable"].place != routing.stable:
            self._incoming = self._enter("stable", routing.stable)
        old = table.pop("candidate", None)
        if routing.candidate is not None:
            same = old is not None and old.place == routing.candidate
            table["candidate"] = old if old and same else self._enter("candidate", routing.candidate)
        self.weight = routing.weight
        self._metrics.routing_weight.set(routing.weight)
        self._switch(table)

    def _switch(self, table: Table) -> None:
        before, self._table = self._table, table
        for upstream in set(before.values()) - set(table.values()):
            self._leave(upstream)
        for upstream in set(table.values()) - set(before.values()):
            upstream.begin()

    def _enter(self, track: Track, place: Place) -> Upstream:
        upstream = Upstream(track, place, self._settings, self._metrics)
        self._polls[upstream] = asyncio.create_task(self._watch(upstream))
        return upstream

    def _leave(self, upstream: Upstream) -> None:
        upstream.retire()
        self._polls.pop(upstream).cancel()

    @property
    def tracks(self) -> tuple[Track, ...]:
        """The tracks that there are, stable first."""
        return tuple(self._table)

    def choose(self, caller: Caller) -> Track:
        """The caller's track, always the same one; stable where the candidate is not well. Asked once a request.

        What is asked of the track afterwards, in the same task, is of the upstream that it has now.
        """
        self._kept.set(self._table)
        chosen = track(caller.id, self.weight)
        if chosen == "candidate" and not self.healthy(chosen):
            chosen = "stable"
        self._metrics.routed.labels(chosen).inc()
        return chosen

    def healthy(self, track: Track) -> bool:
        """Whether it is there, ready, and its circuit lets requests pass."""
        upstream = self._table.get(track)
        return upstream is not None and upstream.ready and upstream.breaker.wait == 0

    def get(self, track: Track) -> Upstream:
        """The upstream of a track."""
        return self._kept.get(self._table)[track]

    def release(self, track: Track) -> api.Release:
        """What the track serves."""
        return self.get(track).release

    def capabilities(self, track: Track) -> Capabilities:
        """What the track can do."""
        return self.get(track).capabilities

    async def complete(self, body: dict[str, Any], context: Context, track: Track) -> Completion:
        """The answer to a request of /chat/completions, whole. `model` is filled in.

        GatewayError 502 (it makes no sense), 503 (not there), 504 (too late), 400 (it refuses the request).
        """
        async with self.open(self._encode(body, track, stream=False), context, track) as response:
            data = await read_whole(response)
            if response.status != 200:
                raise refusal(response.status, data)
            return completion_of(data, track, self.release(track))

    async def stream(self, body: dict[str, Any], context: Context, track: Track) -> AsyncIterator[str | Completion]:
        """The same, as pieces of the answer's text while it is written, and last the whole Completion."""
        async with self.open(self._encode(body, track, stream=True), context, track) as response:
            if response.status != 200:
                raise refusal(response.status, await read_whole(response))
            async for piece in events(response.content.iter_any(), track, self.release(track)):
                yield piece

    def _encode(self, body: dict[str, Any], track: Track, stream: bool) -> bytes:
        extra: dict[str, Any] = {"model": self.capabilities(track).model, "stream": stream}
        if stream:
            extra["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(body | extra)

    @asynccontextmanager
    async def open(self, body: bytes, context: Context, track: Track) -> AsyncIterator[aiohttp.ClientResponse]:
        """The head of the answer to a request, tried again until it comes; its status is below 500 and not 429.

        What goes wrong while the answer is read is an upstream's failure too, and is not tried again.
        """
        upstream = self.get(track)
        self._budget.deposit()
        attempt = 0
        left = time_left(context)
        while True:
            began = time.monotonic()  # an answer's time includes that to its head
            try:
                response = await self._send(upstream, body, context)
                break
            except _TryAgain as failure:
                attempt += 1
                wait = backoff(attempt)
                if (
                    attempt > self._settings.retries
                    or wait >= context.deadline - time.monotonic()
                    or upstream.breaker.wait
                    or not self._budget.withdraw()
                ):
                    raise failure.error from None
                await asyncio.sleep(wait)
                self._metrics.upstream_retries.labels(track).inc()
        outcome = "cancelled"
        try:
            yield response
            outcome = "answered" if response.status < 400 else "refused"
            upstream.succeeded()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            outcome = "broken"
            self._blame(upstream, error, left)
            raise explained(error, upstream.name).error from None
        except GatewayError as error:
            if error.code in ("upstream-garbage", "upstream-error"):
                outcome = "broken"
                upstream.failed()
            else:
                outcome = "refused"
                upstream.succeeded()
            raise
        finally:
            if outcome == "cancelled":
                upstream.breaker.abandon()
            self._metrics.upstream_seconds.labels(track, outcome).observe(time.monotonic() - began)
            response.close()  # an answer that is read whole has given its connection back already

    async def _send(self, upstream: Upstream, body: bytes, context: Context) -> aiohttp.ClientResponse:
        """One attempt, up to the answer's head. _TryAgain if another may help, GatewayError if not."""
        assert self._session is not None, "start() comes first"
        left = time_left(context)
        if not upstream.breaker.allow():
            raise GatewayError(
                503, "upstream-unavailable", "The model's server has failed too often; send it again later",
                retry_after=max(1.0, upstream.breaker.wait),
            )  # fmt: skip
        began = time.monotonic()
        headers = {
            "content-type": "application/json",
            "x-request-id": context.request_id,
            TIMEOUT_HEADER: f"{left:.3f}",
        }
        timeout = aiohttp.ClientTimeout(total=left, sock_connect=self._settings.connect_timeout)
        try:
            response = await self._session.post(
                upstream.chat, data=_Body(body), headers=headers, timeout=timeout, allow_redirects=False
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            self._blame(upstream, error, left)
            failure = explained(error, upstream.name)
            self._metrics.upstream_seconds.labels(upstream.name, "failed").observe(time.monotonic() - began)
            if failure.error.status == 504:  # the deadline is over
                raise failure.error from None
            raise failure from None
        except BaseException:  # cancelled: the client has gone
            upstream.breaker.abandon()
            raise
        if response.status < 500 and response.status != 429:
            if upstream.breaker.state != "closed":
                upstream.succeeded()
            return response
        wait = _retry_after(response.headers)
        response.close()
        self._metrics.upstream_seconds.labels(upstream.name, "failed").observe(time.monotonic() - began)
        if response.status == 429:  # full, not broken
            upstream.breaker.abandon()
            raise _TryAgain(overloaded(wait))
        upstream.failed()
        if response.status in RETRIED:
            raise _TryAgain(overloaded(wait) if response.status == 503 else _bad(f"answered {response.status}"))
        raise _bad(f"answered {response.status}")

    def _blame(self, upstream: Upstream, error: BaseException, allowed: float) -> None:
        """Count a failure. That a caller's own short time limit passed tells nothing of the upstream."""
        late = isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError)
        if late and allowed < self._settings.deadline / 2:
            upstream.breaker.abandon()
        else:
            upstream.failed()

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            try:
                upstream.heard(await self._look(upstream), None)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                upstream.heard(None, f"cannot be reached ({type(error).__name__})")
            except ValueError as error:
                upstream.heard(None, str(error))
            if upstream is self._incoming and upstream.ready:
                self._incoming = None
                self._switch(self._table | {"stable": upstream})
            await asyncio.sleep(POLL_READY if upstream.ready else POLL_AWAY)

    async def _look(self, upstream: Upstream) -> Capabilities:
        """What its /models says. ValueError if that makes no sense."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=_LOOK_SECONDS, sock_connect=self._settings.connect_timeout)
        async with self._session.get(f"{upstream.base}/models", timeout=timeout, allow_redirects=False) as response:
            data = await response.content.read(_MOST_BYTES)
            if response.status != 200:
                raise ValueError(f"answers {response.status} to /models")
            return capabilities_of(data)


class _Body(BytesPayload):
    """A request's body, sent behind its head: aiohttp would copy both into one piece (on Python before 3.12.9)."""

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write the head that waits, then the body."""
        writer.send_headers()
        await super().write_with_length(writer, content_length)


class _TryAgain(Exception):  # noqa: N818  it says what to do, not only what went wrong
    """An attempt failed before its first byte; `error` is what the caller is told if there is no other."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__(error.code)
        self.error = error


def explained(error: BaseException, track: Track) -> _TryAgain:
    """What a caller is told of a failed connection."""
    if isinstance(error, asyncio.TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
        return _TryAgain(GatewayError(504, "upstream-timeout", "The model's server did not answer in time"))
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        logger().warning("upstream unreachable", track=track, exception=type(error).__name__)
        return _TryAgain(
            GatewayError(
                503, "upstream-unavailable", "The model's server cannot be reached; send it again later", retry_after=2
            )
        )
    return _TryAgain(_bad("broke off its answer"))


def _bad(what: str) -> GatewayError:
    return GatewayError(502, "upstream-error", f"The model's server {what}; send it again")


def overloaded(wait: float) -> GatewayError:
    """503: the upstream itself has too much to do; `wait` in seconds."""
    return GatewayError(503, "overloaded", "The model's server is busy; send it again later", retry_after=wait)


def _retry_after(headers: Mapping[str, str]) -> float:
    value = headers.get("retry-after", "")
    return min(60.0, float(value)) if value.isdecimal() else 1.0


async def read_whole(response: aiohttp.ClientResponse) -> bytes:
    """An answer's body, of a bounded size."""
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > _MOST_BYTES:
            raise garbage("that is too long")
        pieces.append(piece)
    return b"".join(pieces)


def refusal(status: int, data: bytes) -> GatewayError:
    """A request that the upstream refused with a status of 4xx (or a redirect, which is never followed)."""
    if status not in (400, 413, 422):
        return GatewayError(
            502, "upstream-misconfigured", f"The model's server refuses the gateway's requests ({status})"
        )
    try:
        message = str(msgspec.json.decode(data)["error"]["message"])[:300]
    except (msgspec.DecodeError, LookupError, TypeError):
        message = "it does not say why"
    return GatewayError(400, "upstream-refused", f"The model's server refuses the request: {message}")
