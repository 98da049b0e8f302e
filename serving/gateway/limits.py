"""How often a client may ask: a short rate and a long quota, in memory or, for several gateways, in Redis.

Both are counted by sliding windows of two counters each, whose memory does not grow with the rate: what the window
before holds counts by the share of it that is not a whole window past. In Redis the `limits` library counts; in memory
`Windows` does the same in a fifth of the time. Where Redis is away, memory stands in for a while: each gateway then
counts for itself, which allows more than meant rather than nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from limits import RateLimitItem, parse
from limits.aio.storage import Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serving.gateway.errors import GatewayError
from serving.gateway.logs import logger
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller
from serving.gateway.settings import Settings

_REDIS_SECONDS = 0.5  # the longest that a request waits for Redis
_AWAY_SECONDS = 15.0  # how long Redis is left alone after it failed
_SWEEP = 10_000  # windows among which those that are over are looked for
_parse = lru_cache(maxsize=1024)(parse)


class Count(NamedTuple):
    """A request that was counted: whether it is allowed, how many more are, and the seconds until one more is."""

    allowed: bool
    remaining: int
    reset: float


class Windows:
    """Sliding windows in this process's memory, for one event loop. Those that are over are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._sweep = clock, _SWEEP
        # by name, caller and length: the window's number, the requests in it, and those in the one before
        self._counts: dict[tuple[str, str, int], list[int]] = {}

    def hit(self, item: RateLimitItem, name: str, caller: str) -> Count:
        """Count a request, if it is allowed."""
        length = item.get_expiry()
        number, passed = divmod(self._clock(), length)
        counts = self._counts.get((name, caller, length))
        if counts is None:
            self._forget()
            counts = self._counts[name, caller, length] = [int(number), 0, 0]
        elif counts[0] != number:
            counts[:] = [int(number), 0, counts[1] if counts[0] == number - 1 else 0]
        _, current, before = counts
        weighted = math.floor(before * (length - passed) / length + current)
        allowed = weighted < item.amount
        if allowed:
            counts[1] += 1
        reset = (length - passed) % (length / before) if before else length - passed
        return Count(allowed, max(0, item.amount - weighted - allowed), reset)

    def _forget(self) -> None:
        if len(self._counts) < self._sweep:
            return
        now = self._clock()
        over = [key for key, counts in self._counts.items() if now >= (counts[0] + 2) * key[2]]
        for key in over:
            del self._counts[key]
        self._sweep = max(_SWEEP, 2 * len(self._counts))


class Limits:
    """Counts requests by caller."""

    def __init__(self, settings: Settings, metrics: Metrics, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._quota, self._metrics, self._monotonic = settings.rate, settings.quota, metrics, monotonic
        self._memory = Windows()
        self._pool = _pool(settings.redis) if settings.redis else None
        self._shared = SlidingWindowCounterRateLimiter(_storage(settings.redis, self._pool)) if self._pool else None
        self._away_until = -1e9

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool is not None:
            await self._pool.aclose()

    async def check(self, caller: Caller) -> dict[str, str]:
        """Count a request. Returns the headers that tell of the rate; GatewayError 429 where there were too many."""
        windows = _parse(caller.rate or self._rate), _parse(caller.quota or self._quota)
        if self._shared is not None and self._monotonic() >= self._away_until:
            try:
                return await self._count_in_redis(self._shared, caller, *windows)
            except StorageError as error:
                logger().warning(
                    "limits are counted in memory: redis is away", exception=type(error.storage_error).__name__
                )
                self._away_until = self._monotonic() + _AWAY_SECONDS
        return self._count(caller, *windows)

    def _count(self, caller: Caller, rate: RateLimitItem, quota: RateLimitItem) -> dict[str, str]:
        counted = self._memory.hit(rate, "rate", caller.id)
        if not counted.allowed:
            raise self._too_many("rate", rate, counted.reset)
        used = self._memory.hit(quota, "quota", caller.id)
        if not used.allowed:
            raise self._too_many("quota", quota, used.reset)
        return _told(rate, counted.remaining, counted.reset)

    async def _count_in_redis(
        self, limiter: SlidingWindowCounterRateLimiter, caller: Caller, rate: RateLimitItem, quota: RateLimitItem
    ) -> dict[str, str]:
        for name, item in (("rate", rate), ("quota", quota)):
            if not await limiter.hit(item, name, caller.id):
                stats = await limiter.get_window_stats(item, name, caller.id)
                raise self._too_many(name, item, stats.reset_time - time.time())
        stats = await limiter.get_window_stats(rate, "rate", caller.id)
        return _told(rate, stats.remaining, stats.reset_time - time.time())

    def _too_many(self, name: str, item: RateLimitItem, wait: float) -> GatewayError:
        self._metrics.refused.labels(name).inc()
        message = f"More than {item.amount} requests in {item.get_expiry()} seconds"
        return GatewayError(429, f"{name}-exceeded", message, None, max(1.0, wait))


def _told(rate: RateLimitItem, remaining: int, reset: float) -> dict[str, str]:
    """The headers that tell of the rate."""
    return {
        "x-ratelimit-limit": str(rate.amount),
        "x-ratelimit-remaining": str(max(0, remaining)),
        "x-ratelimit-reset": str(max(0, round(reset))),
    }


def _pool(url: str) -> ConnectionPool:
    """Connections to the Redis at a redis:// or rediss:// URL; none is opened before the first request."""
    return ConnectionPool.from_url(
        url, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS, retry=Retry(NoBackoff(), 0)
    )


def _storage(url: str, pool: ConnectionPool) -> Storage:
    options: dict[str, Any] = {"wrap_exceptions": True, "connection_pool": pool}
    storage = storage_from_string(f"async+{url}", implementation="redispy", **options)
    assert isinstance(storage, Storage)
    return storage
