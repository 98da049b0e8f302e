"""How often a client may ask: a short rate and a long quota, in memory or, for several gateways, in Redis.

Both are counted by sliding windows of two counters each, whose memory does not grow with the rate. Where Redis is away,
memory stands in for a while: each gateway then counts for itself, which allows more than meant rather than nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, Storage
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
_parse = lru_cache(maxsize=1024)(parse)


class Limits:
    """Counts requests by caller."""

    def __init__(self, settings: Settings, metrics: Metrics, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._quota, self._metrics, self._monotonic = settings.rate, settings.quota, metrics, monotonic
        self._memory = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._pool = _pool(settings.redis) if settings.redis else None
        self._shared = SlidingWindowCounterRateLimiter(_storage(settings.redis, self._pool)) if self._pool else None
        self._away_until = -1e9

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._pool is not None:
            await self._pool.aclose()

    async def check(self, caller: Caller) -> dict[str, str]:
        """Count a request. Returns the headers that tell of the rate; GatewayError 429 where there were too many."""
        rate, quota = _parse(caller.rate or self._rate), _parse(caller.quota or self._quota)
        if self._shared is None or self._monotonic() < self._away_until:
            return await self._count(self._memory, caller, rate, quota)
        try:
            return await self._count(self._shared, caller, rate, quota)
        except StorageError as error:
            logger().warning(
                "limits are counted in memory: redis is away", exception=type(error.storage_error).__name__
            )
            self._away_until = self._monotonic() + _AWAY_SECONDS
            return await self._count(self._memory, caller, rate, quota)

    async def _count(
        self, limiter: SlidingWindowCounterRateLimiter, caller: Caller, rate: RateLimitItem, quota: RateLimitItem
    ) -> dict[str, str]:
        for name, item in (("rate", rate), ("quota", quota)):
            if not await limiter.hit(item, name, caller.id):
                self._metrics.refused.labels(name).inc()
                stats = await limiter.get_window_stats(item, name, caller.id)
                wait = max(1.0, stats.reset_time - time.time())
                raise GatewayError(
                    429,
                    f"{name}-exceeded",
                    f"More than {item.amount} requests in {item.get_expiry()} seconds",
                    None,
                    wait,
                )
        stats = await limiter.get_window_stats(rate, "rate", caller.id)
        return {
            "x-ratelimit-limit": str(rate.amount),
            "x-ratelimit-remaining": str(max(0, stats.remaining)),
            "x-ratelimit-reset": str(max(0, round(stats.reset_time - time.time()))),
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
