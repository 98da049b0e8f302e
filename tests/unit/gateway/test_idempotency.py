"""A request that is sent twice is done once; whatever else may happen to its key."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serving.gateway.errors import GatewayError
from serving.gateway.idempotency import Stored, once, remove_expired
from serving.gateway.parts import Parts
from tests.unit.gateway.keeping import context, keeping

KEPT = Stored(200, b'{"answer":"a nodule"}', {"x-medforge-track": "stable"})


class Work:
    """An answer that counts how often it was made."""

    def __init__(self, seconds: float = 0.0, error: BaseException | None = None) -> None:
        self.seconds, self.error, self.count = seconds, error, 0

    async def __call__(self) -> Stored:
        self.count += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return KEPT


def send(
    parts: Parts, work: Work, key: str | None = "key-1", body: bytes = b"body", caller: str = "c", route: str = "/a"
) -> Stored:
    return asyncio.run(once(parts, context(caller=caller), route, key, body, work))


def refused(parts: Parts, work: Work, **changes: object) -> GatewayError:
    with pytest.raises(GatewayError) as told:
        send(parts, work, **changes)  # type: ignore[arg-type]
    return told.value


def test_the_second_gets_the_firsts_answer(tmp_path: Path) -> None:
    work = Work()
    with keeping(tmp_path) as parts:
        assert send(parts, work) == KEPT
        again = send(parts, work)
    with keeping(tmp_path) as parts:  # and after a restart
        later = send(parts, work)
    assert work.count == 1
    for stored in (again, later):
        assert (stored.status, stored.body, stored.media_type) == (KEPT.status, KEPT.body, KEPT.media_type)
        assert stored.headers == {"x-medforge-track": "stable", "idempotent-replayed": "true"}
    response = again.response()
    assert response.headers["idempotent-replayed"] == "true" and response.body == KEPT.body


def test_without_a_key_and_under_other_keys_callers_and_routes_it_is_done(tmp_path: Path) -> None:
    work = Work()
    with keeping(tmp_path) as parts:
        for _ in range(2):
            send(parts, work, key=None)
        send(parts, work)
        send(parts, work, key="key-2")
        send(parts, work, caller="d")
        send(parts, work, route="/b")
    assert work.count == 6


def test_a_key_with_another_body_is_refused(tmp_path: Path) -> None:
    work = Work()
    with keeping(tmp_path) as parts:
        send(parts, work)
        assert refused(parts, work, body=b"other").status == 422
    assert work.count == 1


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "é", "a\n"])
def test_what_is_no_key_is_refused(key: str, tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        error = refused(parts, Work(), key=key)
        assert (error.status, error.param) == (400, "idempotency-key")


def test_of_many_at_once_one_is_done_and_the_others_are_told_to_wait(tmp_path: Path) -> None:
    work = Work(seconds=0.5)

    async def all_at_once(parts: Parts) -> list[object]:
        requests = [once(parts, context(), "/a", "key-1", b"body", work) for _ in range(12)]
        return list(await asyncio.gather(*requests, return_exceptions=True))

    with keeping(tmp_path) as parts:
        told = asyncio.run(all_at_once(parts))
    assert work.count == 1
    assert told.count(KEPT) == 1
    others = [error for error in told if error != KEPT]
    assert all(isinstance(e, GatewayError) and e.status == 409 and e.retry_after for e in others) and len(others) == 11


@pytest.mark.parametrize("error", [GatewayError(503, "busy", "busy"), RuntimeError("a bug")])
def test_after_an_error_the_key_is_free(error: BaseException, tmp_path: Path) -> None:
    work = Work(error=error)
    with keeping(tmp_path) as parts:
        with pytest.raises(type(error)):
            send(parts, work)
        work.error = None
        assert send(parts, work, body=b"another") == KEPT


def test_after_the_caller_has_gone_the_key_is_free(tmp_path: Path) -> None:
    async def hang_up(parts: Parts) -> None:
        task = asyncio.create_task(once(parts, context(), "/a", "key-1", b"body", Work(seconds=30)))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with keeping(tmp_path) as parts:
        asyncio.run(hang_up(parts))
        assert send(parts, Work()) == KEPT


def test_a_gateway_that_died_holds_a_key_no_longer_than_its_request_could_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.gateway import idempotency as module

    now = module.time.time()
    with keeping(tmp_path) as parts:
        monkeypatch.setattr(module._Claim, "release", lambda self: None)  # as if it had been killed
        with pytest.raises(GatewayError):
            send(parts, Work(error=GatewayError(500, "x", "x")))
        work = Work()
        assert refused(parts, work).status == 409
        monkeypatch.setattr(module.time, "time", lambda: now + 30 + module._SPARE_SECONDS + 5)
        assert send(parts, work) == KEPT


def test_an_answer_is_forgotten_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.gateway import idempotency as module

    work, now = Work(), module.time.time()
    with keeping(tmp_path, idempotency_hours=1.0) as parts:
        send(parts, work)
        remove_expired(parts.database, now + 3500)
        send(parts, work)
        assert work.count == 1
        monkeypatch.setattr(module.time, "time", lambda: now + 3700)
        send(parts, work)
        assert work.count == 2


def test_no_answer_stands_in_clear_in_the_database(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        send(parts, Work())
        files = [path.read_bytes() for path in tmp_path.glob("gateway.db*")]
    assert files and not any(b"a nodule" in data for data in files)
