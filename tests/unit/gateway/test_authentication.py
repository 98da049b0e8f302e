"""Who calls: keys by the database, cached; scopes; what is refused."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from medforge import apikeys
from serving.gateway.authentication import Authentication
from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings

SECRET = "s" * 32
HOUR = 3600.0


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Bench:
    """An authentication over a database of its own, whose queries are counted."""

    def __init__(self, folder: Path, **values: Any) -> None:
        self.engine: Engine = create_engine(f"sqlite:///{folder}/keys.db")
        apikeys.create(self.engine)
        self.selects = 0
        event.listen(self.engine, "before_cursor_execute", self._count)
        settings = Settings(_env_file=None, secret_key=SECRET, **values)
        self.clock, self.monotonic = Clock(1_760_000_000.0), Clock(0.0)
        self.authentication = Authentication(settings, self.engine, None, self.clock, self.monotonic)

    def _count(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.selects += statement.startswith("SELECT")

    def key(self, name: str = "ris", **more: Any) -> str:
        text = apikeys.add(self.engine, SECRET, name, self.clock.now, **more)[1]
        self.selects = 0
        return text

    async def ask(self, text: str, scope: str = "diagnose") -> Any:
        return await self.authentication.identify({"authorization": f"Bearer {text}"}, scope)

    async def refused(self, text: str, scope: str = "diagnose") -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            await self.ask(text, scope)
        return caught.value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_key_says_who_calls(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key(kind="page", scopes=("diagnose", "chat"), rate="3/minute", quota="5/day")
        caller = await bench.ask(text)
        assert (caller.name, caller.kind, caller.rate, caller.quota) == ("ris", "page", "3/minute", "5/day")
        assert caller.scopes == {"diagnose", "chat"}
        assert caller.id.startswith("key-")
        assert text.split("_", 2)[2] not in repr(caller)
        assert (await bench.refused(text, "jobs")).status == 403
        assert (await bench.ask(text, "")).id == caller.id  # "" is any scope

    asyncio.run(test())


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Basic YTpi"},
     {"authorization": "Bearer mf_x"}, {"authorization": "Bearer something"}],
)  # fmt: skip
def test_without_a_key_nothing_is_told_and_nothing_looked_up(bench: Bench, headers: dict[str, str]) -> None:
    async def test() -> None:
        with pytest.raises(GatewayError) as caught:
            await bench.authentication.identify(headers, "")
        assert caught.value.status == 401
        assert caught.value.headers()["www-authenticate"] == "Bearer"
        assert bench.selects == 0

    asyncio.run(test())


def test_a_wrong_secret_is_refused_like_a_wrong_id(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key()
        wrong_secret = text[:-4] + "AAAA"
        wrong_id = text[:3] + "0" * 16 + text[19:]
        assert str(await bench.refused(wrong_secret)) == str(await bench.refused(wrong_id))

    asyncio.run(test())


def test_a_key_is_looked_up_once_in_a_while(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key()
        for _ in range(5):
            await bench.ask(text)
        assert bench.selects == 1
        bench.monotonic.now = 29.9
        await bench.ask(text)
        assert bench.selects == 1
        bench.monotonic.now = 30.1
        await bench.ask(text)
        assert bench.selects == 2

    asyncio.run(test())


def test_many_at_once_ask_the_database_once(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key()
        await asyncio.gather(*(bench.ask(text) for _ in range(50)))
        assert bench.selects == 1

    asyncio.run(test())


def test_a_request_that_gives_up_does_not_take_the_others_with_it(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key()
        first, second = asyncio.create_task(bench.ask(text)), asyncio.create_task(bench.ask(text))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).name == "ris"

    asyncio.run(test())


def test_a_revoked_key_is_taken_no_longer_than_the_cache(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key()
        await bench.ask(text)
        apikeys.revoke(bench.engine, "ris", bench.clock.now)
        await bench.ask(text)
        bench.monotonic.now = 30.1
        error = await bench.refused(text)
        assert (error.status, "revoked" in error.message) == (401, True)

    asyncio.run(test())


def test_a_cached_key_expires_at_its_very_second(bench: Bench) -> None:
    async def test() -> None:
        text = bench.key(expires=bench.clock.now + HOUR)
        await bench.ask(text)
        bench.clock.now += HOUR - 0.1
        await bench.ask(text)
        bench.clock.now += 0.2
        assert "expired" in (await bench.refused(text)).message

    asyncio.run(test())


def test_a_client_is_the_same_after_rotation(bench: Bench) -> None:
    async def test() -> None:
        old = bench.key()
        before = await bench.ask(old)
        _, new = apikeys.rotate(bench.engine, SECRET, "ris", bench.clock.now, HOUR)
        assert (await bench.ask(new)).id == before.id

    asyncio.run(test())


def test_a_database_that_is_away_is_503_and_no_entrance(bench: Bench) -> None:
    async def test() -> None:
        text, other = bench.key(), bench.key("other")
        await bench.ask(text)

        def fail(*_: Any) -> None:
            raise OperationalError("SELECT", {}, Exception("away"))

        event.listen(bench.engine, "before_cursor_execute", fail)
        assert (await bench.refused(other)).status == 503
        assert (await bench.ask(text)).name == "ris"  # cached

    asyncio.run(test())


def test_a_flood_of_invented_keys_leaves_memory_and_threads_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.gateway import authentication

    monkeypatch.setattr(authentication, "_MOST_CACHED", 50)
    at_once = most = 0
    lock = threading.Lock()
    original = apikeys.find

    def find(*arguments: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return original(*arguments)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(apikeys, "find", find)

    async def test() -> None:
        keys = [f"mf_{number:016x}_{'a' * 43}" for number in range(200)]
        outcomes = await asyncio.gather(*(bench.ask(key) for key in keys), return_exceptions=True)
        assert all(isinstance(one, GatewayError) and one.status == 401 for one in outcomes)
        assert len(bench.authentication._cache) == 50
        assert bench.authentication._looking == {}

    asyncio.run(test())
    assert most <= 4


def test_off_means_anybody(tmp_path: Path) -> None:
    async def test() -> None:
        caller = await Bench(tmp_path, authentication=False).authentication.identify({}, "jobs")
        assert caller.kind == "anonymous"

    asyncio.run(test())
