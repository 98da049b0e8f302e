"""Rates and quotas by caller."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from serving.gateway.errors import GatewayError
from serving.gateway.limits import Limits
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
