"""Limits in a real Redis: shared by gateways, and counted in memory while it is away."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.gateway import limits as module
from serving.gateway.errors import GatewayError
from serving.gateway.limits import Limits
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import until

SERVER = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")
CALLER = Caller("key-1", "ris", "system", frozenset())


class Redis:
    """A server of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        assert SERVER
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def limits(self, **values: Any) -> Limits:
        """A gateway's limits: three requests an hour."""
        settings = Settings(_env_file=None, redis=f"redis://127.0.0.1:{self.port}/0", rate="3/hour", **values)
        return Limits(settings, Metrics())


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    made = Redis(tmp_path)
    yield made
    made.stop()


async def count(limits: Limits, times: int) -> list[int]:
    """The statuses of so many requests."""
    got = []
    for _ in range(times):
        try:
            await limits.check(CALLER)
            got.append(200)
        except GatewayError as error:
            got.append(error.status)
    return got


def test_gateways_share_their_counts(redis: Redis) -> None:
    async def test() -> None:
        one, other = redis.limits(), redis.limits()
        assert await count(one, 2) == [200, 200]
        assert (await other.check(CALLER))["x-ratelimit-remaining"] == "0"
        assert await count(one, 1) == [429]
        assert await count(other, 1) == [429]
        await one.close()
        await other.close()
        again = redis.limits()  # a gateway that was restarted
        assert await count(again, 1) == [429]
        await again.close()

    asyncio.run(test())


def test_the_quota_is_kept_there_too(redis: Redis) -> None:
    async def test() -> None:
        limits = redis.limits(quota="2/day")
        assert await count(limits, 3) == [200, 200, 429]
        await limits.close()

    asyncio.run(test())


def test_memory_stands_in_for_the_while(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AWAY_SECONDS", 0.5)

    async def test() -> None:
        limits = redis.limits()
        assert await count(limits, 3) == [200] * 3
        await asyncio.to_thread(redis.stop)
        assert await count(limits, 4) == [200, 200, 200, 429]  # counted anew, but counted
        await asyncio.to_thread(redis.start)
        await asyncio.sleep(0.6)
        assert await count(limits, 4) == [200, 200, 200, 429]  # Redis came back empty
        await limits.close()

    asyncio.run(test())


def test_a_redis_that_hangs_holds_nobody_up_for_long(redis: Redis) -> None:
    async def test() -> None:
        limits = redis.limits()
        assert await count(limits, 1) == [200]
        redis.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert await count(limits, 3) == [200] * 3
            assert time.monotonic() - began < 3
        finally:
            redis.process.send_signal(signal.SIGCONT)
        await limits.close()

    asyncio.run(test())
