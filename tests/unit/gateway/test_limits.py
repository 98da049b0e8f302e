"""Rates and quotas by caller."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from serving.gateway.errors import GatewayError
from serving.gateway.limits import Limits, Windows
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller
from serving.gateway.settings import Settings


def limits(metrics: Metrics | None = None, **values: Any) -> Limits:
    return Limits(Settings(_env_file=None, **values), metrics or Metrics())


def caller(name: str = "a", rate: str | None = None, quota: str | None = None) -> Caller:
    return Caller(name, name, "system", frozenset(), rate, quota)


def test_a_rate_is_counted_down_and_then_refused() -> None:
    async def test() -> None:
        metrics = Metrics()
        limit = limits(metrics, rate="3/hour")
        told = [await limit.check(caller()) for _ in range(3)]
        assert [one["x-ratelimit-remaining"] for one in told] == ["2", "1", "0"]
        assert {one["x-ratelimit-limit"] for one in told} == {"3"}
        assert all(0 <= int(one["x-ratelimit-reset"]) <= 3600 for one in told)
        with pytest.raises(GatewayError) as caught:
            await limit.check(caller())
        assert (caught.value.status, caught.value.code) == (429, "rate-exceeded")
        assert 1 <= int(caught.value.headers()["retry-after"]) <= 3600
        assert metrics.registry.get_sample_value("medforge_gateway_refused_total", {"reason": "rate"}) == 1
        await limit.check(caller("b"))  # another's rate is its own

    asyncio.run(test())


def test_a_rate_comes_back() -> None:
    async def test() -> None:
        limit = limits(rate="5/second")
        for _ in range(5):
            await limit.check(caller())
        with pytest.raises(GatewayError):
            await limit.check(caller())
        await asyncio.sleep(2.1)  # two windows: nothing of the first counts any more
        await limit.check(caller())

    asyncio.run(test())


def test_a_quota_is_counted_beside_the_rate() -> None:
    async def test() -> None:
        limit = limits(rate="100/second", quota="4/day")
        for _ in range(4):
            await limit.check(caller())
        with pytest.raises(GatewayError) as caught:
            await limit.check(caller())
        assert (caught.value.status, caught.value.code) == (429, "quota-exceeded")

    asyncio.run(test())


def test_a_keys_own_limits_come_before_the_settings() -> None:
    async def test() -> None:
        limit = limits(rate="1/hour", quota="1/day")
        for _ in range(10):
            await limit.check(caller(rate="10/hour", quota="10/day"))
        with pytest.raises(GatewayError):
            await limit.check(caller(rate="10/hour", quota="10/day"))

    asyncio.run(test())


def test_memory_stands_in_while_redis_is_away() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def test() -> None:
        limit = limits(rate="2/hour", redis=f"redis://127.0.0.1:{port}")
        await limit.check(caller())
        before = time.monotonic()
        await limit.check(caller())
        assert time.monotonic() - before < 0.1  # it is not asked again at once
        with pytest.raises(GatewayError):
            await limit.check(caller())

    asyncio.run(test())


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    rate=st.sampled_from(("1/second", "3/second", "5/10 seconds", "7/minute", "2/hour")),
    # 0.37 ms off the grid: where a window's share is a whole number, one rounding error decides
    steps=st.lists(st.integers(0, 15_000).map(lambda step: (step + 0.37) / 1000), min_size=1, max_size=60),
    start=st.integers(1_700_000_000, 1_800_000_000),
)
def test_windows_count_as_the_limits_library(rate: str, steps: list[float], start: int) -> None:
    now = float(start)
    item = parse(rate)

    async def test() -> None:
        nonlocal now
        reference = SlidingWindowCounterRateLimiter(MemoryStorage())
        windows = Windows(lambda: now)
        for step in steps:
            now += step
            counted = windows.hit(item, "rate", "caller")
            assert counted.allowed == await reference.hit(item, "rate", "caller")
            stats = await reference.get_window_stats(item, "rate", "caller")
            assert counted.remaining == stats.remaining
            assert now + counted.reset == pytest.approx(stats.reset_time, abs=1e-3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now)
        asyncio.run(test())


def test_windows_that_are_over_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.limits._SWEEP", 100)
    now = 1_000_000.0
    windows = Windows(lambda: now)
    for number in range(1000):
        windows.hit(parse("1/minute"), "rate", f"caller {number}")
        now += 1.0
    assert len(windows._counts) <= 250, "those of two minutes, and as many again before they are looked for"
    assert not windows.hit(parse("1/minute"), "rate", "caller 999").allowed
