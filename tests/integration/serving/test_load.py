"""The gateway under too much load and before an upstream that fails: it says no in time, stays small, and recovers.

The gateway is a process of its own; clients and upstream share the test's.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import httpx
import pytest

from benchmarks.gateway.load import payload, picture
from serving.gateway.settings import Settings
from tests.integration.serving.processes import Running, gateway_process
from tests.unit.gateway.conftest import make_key, until
from tests.unit.gateway.fake import Fake

CHAT = "/v1/chat/completions"
SMALL = payload(picture(16))
LARGE = payload(picture())
_MEBI = 1 << 20


@dataclass
class Answers:
    """What a crowd of clients was told."""

    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    broken: int = 0
    slowest: float = 0.0


async def crowd(
    url: str,
    keys: list[str],
    clients: int,
    seconds: float,
    body: bytes,
    also: Callable[[], Awaitable[None]] | None = None,
) -> Answers:
    """So many clients at once, each with a request at a time; `also` runs beside them."""
    answers = Answers()
    end = time.monotonic() + seconds
    limit = aiohttp.ClientTimeout(total=30)

    async def ask(session: aiohttp.ClientSession, key: str) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            try:
                async with session.post(url + CHAT, data=body, headers=headers) as answer:
                    document = await answer.json()
            except aiohttp.ClientError:
                answers.broken += 1
                continue
            finally:
                answers.slowest = max(answers.slowest, time.monotonic() - began)
            answers.statuses[answer.status] += 1
            if answer.status != 200:
                answers.codes[document["error"]["code"]] += 1
                if answer.status in (429, 503) and int(answer.headers.get("retry-after", "0")) < 1:
                    answers.without_retry_after += 1
                await asyncio.sleep(0.1)  # a client that comes again at once, and not after Retry-After, is a bad one

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limit) as session:
        work = [ask(session, keys[number % len(keys)]) for number in range(clients)]
        await asyncio.gather(*work, *([also()] if also else []))
    return answers


def serves(running: Running, key: str) -> bool:
    """Whether a request is answered."""
    return running.client.post(CHAT, content=SMALL, headers=_headers(key)).status_code == 200


def _headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "content-type": "application/json"}


def _with(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


@pytest.mark.slow
def test_ten_times_its_capacity_is_refused_politely_in_little_memory(settings: Settings, fake: Fake, key: str) -> None:
    """Places for 2 and a queue of 4 before an upstream that takes 0.2 s; 120 clients with 200 KB each, some of whom
    have a rate."""
    fake.first_byte_seconds = 0.2
    greedy = make_key(settings, "greedy", rate="5/second")
    with gateway_process(_with(settings, concurrency=2, queue=4, queue_seconds=2.0)) as running:
        assert serves(running, key)
        quiet, peaks = running.resident, []

        async def watch() -> None:
            for _ in range(20):
                await asyncio.sleep(0.25)
                peaks.append(await asyncio.to_thread(lambda: running.resident))

        answers = asyncio.run(crowd(running.url, [key, key, greedy], 120, 5.0, LARGE, watch))

        assert set(answers.statuses) == {200, 429, 503}
        assert (answers.broken, answers.without_retry_after) == (0, 0)
        assert fake.most_open == 2
        # 50 on an idle machine: refusing the others does not keep the gateway from answering
        assert answers.statuses[200] > 2
        assert answers.slowest < 20
        # 120 bodies of 270 KB are 32 MiB; nothing may be held of those that were answered
        assert max(peaks) - quiet < 192 * _MEBI
        until(lambda: running.metrics()["medforge_gateway_in_flight"] == 0)
        first = running.resident
        asyncio.run(crowd(running.url, [key], 120, 2.0, LARGE))
        assert running.resident - first < 64 * _MEBI  # it does not grow from crowd to crowd
        samples = running.metrics()
        assert (samples["medforge_gateway_in_flight"], samples["medforge_gateway_queued"]) == (0, 0)
        assert all(serves(running, key) for _ in range(5))


@pytest.mark.slow
def test_an_upstream_that_is_killed_and_comes_back(settings: Settings, fake: Fake, key: str) -> None:
    """No 500, no hang; the circuit opens while it is away and closes when it is back."""
    away: dict[str, float] = {}
    with gateway_process(_with(settings, breaker_seconds=1.0, concurrency=8)) as running:

        async def kill() -> None:
            await asyncio.sleep(1)
            await asyncio.to_thread(fake.stop)
            # a ready upstream is looked at every five seconds
            await asyncio.to_thread(until, lambda: running.client.get("/readyz").status_code == 503)
            away.update(await asyncio.to_thread(running.metrics))
            await asyncio.to_thread(fake.start)

        answers = asyncio.run(crowd(running.url, [key], 20, 8.0, SMALL, kill))
        assert answers.broken == 0
        assert set(answers.statuses) <= {200, 502, 503}
        assert answers.statuses[503] > 0
        assert answers.without_retry_after == 0
        assert answers.slowest < 5
        assert away['medforge_gateway_breaker_open{track="stable"}'] == 1
        until(lambda: serves(running, key))
        until(lambda: running.metrics()['medforge_gateway_breaker_open{track="stable"}'] == 0)
        until(lambda: running.client.get("/readyz").status_code == 200)
        assert all(serves(running, key) for _ in range(5))


@pytest.mark.slow
def test_an_upstream_that_hangs_is_given_up_at_the_deadline(settings: Settings, fake: Fake, key: str) -> None:
    with gateway_process(_with(settings, deadline=1.0, breaker_seconds=1.0)) as running:
        assert serves(running, key)
        fake.first_byte_seconds = 60
        answers = asyncio.run(crowd(running.url, [key], 20, 3.0, SMALL))
        assert answers.broken == 0
        assert set(answers.statuses) <= {503, 504}
        assert answers.statuses[504] > 0
        assert answers.slowest < 3
        assert running.metrics()['medforge_gateway_breaker_open{track="stable"}'] == 1
        fake.first_byte_seconds = 0
        until(lambda: serves(running, key))
        until(lambda: fake.open == 0)  # what it was asked in vain was called off


GARBAGE = (b"", b"not json", b"\xff\xfe\x00", b"[1, 2", b"null", b'"text"', b'{"choices": 7}', b'{"usage": []}')


@pytest.mark.slow
def test_garbage_is_the_upstreams_fault(settings: Settings, fake: Fake, key: str) -> None:
    """502 while the circuit is closed, then 503; whole and as a stream; and then again 200."""
    stream = SMALL[:-1] + b', "stream": true}'
    with gateway_process(_with(settings, breaker_seconds=0.2, breaker_failures=3)) as running:
        for garbage in GARBAGE:
            fake.garbage = garbage
            # what is JSON and has no usage that is none goes on byte for byte: it is the caller's to read
            expected = {200} if b"choices" in garbage else {502, 503}
            for _ in range(6):
                answer = running.client.post(CHAT, content=SMALL, headers=_headers(key))
                assert answer.status_code in expected, garbage
                if answer.status_code != 200:
                    assert answer.json()["error"]["code"] in ("upstream-garbage", "upstream-unavailable")
            try:
                answer = running.client.post(CHAT, content=stream, headers=_headers(key))
                assert answer.status_code == 503
            except httpx.RemoteProtocolError:
                pass  # a stream's head is out before its garbage comes: it is cut off, and does not look whole
            fake.garbage = None
            until(lambda: serves(running, key))


@pytest.mark.slow
def test_clients_that_hang_up_free_their_places(settings: Settings, fake: Fake, key: str) -> None:
    """100 clients that give up (10 at the upstream, 50 in the queue) leave nothing behind, and the upstream is told."""
    fake.first_byte_seconds = 30

    async def ask(session: aiohttp.ClientSession, url: str) -> int:
        async with session.post(url + CHAT, data=SMALL, headers=_headers(key)) as answer:
            return answer.status

    async def all_give_up(url: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            clients = [asyncio.create_task(ask(session, url)) for _ in range(100)]
            await asyncio.to_thread(until, lambda: fake.open == 10 and sum(one.done() for one in clients) == 40, 20)
            for one in clients:
                one.cancel()
            told = await asyncio.gather(*clients, return_exceptions=True)
        assert sorted(status for status in told if isinstance(status, int)) == [503] * 40

    with gateway_process(_with(settings, concurrency=10, queue=50)) as running:
        asyncio.run(all_give_up(running.url))
        until(lambda: running.metrics()["medforge_gateway_in_flight"] == 0)
        assert running.metrics()["medforge_gateway_queued"] == 0
        until(lambda: fake.open == 0)
        # a place that is freed may go to somebody whose own hanging up is heard a moment later
        assert fake.cancelled == len(fake.requests) >= 10
        fake.first_byte_seconds = 0
        assert all(serves(running, key) for _ in range(5))
