"""The worker, with a scripted `diagnose`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serving.gateway import api, worker
from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture
from serving.gateway.jobs import store_of
from serving.gateway.jobstore import JobStore
from serving.gateway.parts import Context, Parts
from serving.gateway.worker import Worker
from tests.unit.gateway.keeping import add, answered, keeping


class Script:
    """A `diagnose` that answers with its question, after faults to order; it knows how many ran at once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.faults: dict[str, list[BaseException]] = {}
        self.calls: list[str] = []
        self.running = self.most = 0
        self.cancelled = 0
        self.callers: set[tuple[str, str]] = set()

    async def __call__(
        self, parts: Parts, question: api.Question, pictures: Sequence[Picture], context: Context
    ) -> api.DiagnoseResponse:
        assert question.question
        self.calls.append(question.question)
        self.callers.add((context.caller.id, context.caller.kind))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if faults := self.faults.get(question.question):
            raise faults.pop(0)
        return answered(context.request_id, f"to {question.question}")


async def no_pictures(_: api.DiagnoseRequest) -> Sequence[Picture]:
    return []


@asynccontextmanager
async def working(parts: Parts, script: Script, **more: Any) -> AsyncIterator[Worker]:
    made = Worker(parts, store_of(parts), no_pictures, script, **{"lease": 5.0, "poll": 0.05} | more)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def ended(store: JobStore, job: str = "job-1", seconds: float = 10.0) -> api.JobStatus:
    deadline = time.monotonic() + seconds
    while (status := store.get(job, None)).status not in ("finished", "cancelled"):
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)
    return status


def test_the_worker_answers_all_a_few_at_a_time(tmp_path: Path) -> None:
    script = Script()
    script.seconds = 0.05

    async def work(parts: Parts) -> None:
        async with working(parts, script):
            await ended(store)
            gauge = parts.metrics.registry.get_sample_value
            until_seen = time.monotonic() + 5
            while gauge("medforge_gateway_job_items", {"status": "waiting"}) != 0:
                assert time.monotonic() < until_seen
                await asyncio.sleep(0.02)

    with keeping(tmp_path, job_concurrency=3) as parts:
        store = store_of(parts)
        add(store, count=20, now=time.time())
        asyncio.run(work(parts))
        answers = [item.result and item.result.answer for item in store.results("job-1", "c", -1, 99).items]
        ids = [item.result and item.result.id for item in store.results("job-1", "c", -1, 99).items]
    assert answers == [f"to question {number}" for number in range(20)]
    assert ids == [f"job-1-{number}" for number in range(20)]
    assert sorted(script.calls) == sorted({f"question {number}" for number in range(20)})
    assert script.most == 3
    assert script.callers == {("c", "batch")}


def test_busy_is_waited_for_and_other_errors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_WAIT", 0.05)
    script = Script()
    script.faults = {
        "question 0": [GatewayError(503, "overloaded", "busy", None, 60), GatewayError(429, "rate", "slow down")],
        "question 1": [GatewayError(400, "image-format", "images.0: is no image", "images.0")],
        "question 2": [RuntimeError("Jane Doe has a nodule")],
    }

    async def work(parts: Parts) -> None:
        async with working(parts, script):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=3, now=time.time())
        asyncio.run(work(parts))
        items = store.results("job-1", "c", -1, 9).items
        assert (store.get("job-1", "c").done, store.get("job-1", "c").failed) == (1, 2)
        log = next((tmp_path / "audit").glob("*.jsonl")).read_text()
    assert items[0].result and items[0].result.answer == "to question 0"
    assert items[1].error and (items[1].error.code, items[1].error.request_id) == ("image-format", "job-1-1")
    assert items[2].error and items[2].error.code == "internal" and "Jane" not in items[2].error.message
    assert script.calls.count("question 0") == 3
    assert '"reason":"internal"' in log and "Jane" not in log


def test_an_item_is_given_up_after_so_many_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(worker, "TRIES", 4)
    script = Script()
    script.faults = {"question 0": [GatewayError(503, "overloaded", "busy") for _ in range(9)]}

    async def work(parts: Parts) -> None:
        async with working(parts, script):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1, now=time.time())
        asyncio.run(work(parts))
        (item,) = store.results("job-1", "c", -1, 9).items
    assert item.error and item.error.code == "overloaded"
    assert len(script.calls) == 4


def test_an_item_whose_worker_dies_each_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TRIES", 2)
    script = Script()

    async def work(parts: Parts) -> None:
        async with working(parts, script):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1, now=time.time() - 100)
        for number in range(2):
            assert store.claim(f"dead-{number}", 1, time.time() - 50 + number, 0.5)
        asyncio.run(work(parts))
        (item,) = store.results("job-1", "c", -1, 9).items
    assert item.error and item.error.code == "gave-up"
    assert script.calls == []


def test_a_long_item_keeps_its_lease(tmp_path: Path) -> None:
    script = Script()
    script.seconds = 5.0

    async def work(parts: Parts) -> None:
        async with working(parts, script, lease=3.0), working(parts, script, lease=3.0):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1, now=time.time())
        asyncio.run(work(parts))
    assert len(script.calls) == 1


def test_a_worker_that_was_held_up_takes_its_own_item_again_and_goes_on_with_it(tmp_path: Path) -> None:
    script = Script()
    script.seconds = 1.0

    async def work(parts: Parts) -> None:
        async with working(parts, script) as held_up:
            while not script.running:
                await asyncio.sleep(0.01)
            store.renew(held_up.name, time.time() - 100, 5.0)  # the lease has run out
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1, now=time.time())
        asyncio.run(work(parts))
        assert store.get("job-1", "c").done == 1
    assert len(script.calls) == 1


def test_several_workers_share_the_items(tmp_path: Path) -> None:
    script = Script()
    script.seconds = 0.02

    async def work(parts: Parts) -> None:
        async with working(parts, script), working(parts, script), working(parts, script):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=40, now=time.time())
        asyncio.run(work(parts))
        assert store.get("job-1", "c").done == 40
    assert len(script.calls) == len(set(script.calls)) == 40
    assert script.most > 4  # more than one worker's share


def test_stopping_gives_the_items_back_at_once(tmp_path: Path) -> None:
    script = Script()
    script.seconds = 30.0

    async def stop(parts: Parts) -> None:
        async with working(parts, script, lease=600):
            while script.running < 3:
                await asyncio.sleep(0.01)
        assert script.cancelled == 3
        script.seconds = 0.0
        async with working(parts, script):
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=3, now=time.time())
        asyncio.run(stop(parts))
        assert store.get("job-1", "c").done == 3


@pytest.mark.parametrize("here", [True, False], ids=["through this gateway", "through another"])
def test_what_runs_is_stopped_when_its_job_is_cancelled(here: bool, tmp_path: Path) -> None:
    script = Script()
    script.seconds = 30.0

    async def cancel(parts: Parts) -> None:
        async with working(parts, script):
            while script.running < 3:
                await asyncio.sleep(0.01)
            store.cancel("job-1", "c", time.time())
            if here:
                parts.database.jobs_changed("job-1")
            deadline = time.monotonic() + (1.0 if here else 10)
            while script.running:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=3, now=time.time())
        asyncio.run(cancel(parts))
        items = store.results("job-1", "c", -1, 9).items
        assert [item.error and item.error.code for item in items] == ["cancelled"] * 3


def test_nothing_is_begun_while_the_gateway_drains(tmp_path: Path) -> None:
    script = Script()

    async def drain(parts: Parts) -> None:
        parts.draining = True
        async with working(parts, script):
            await asyncio.sleep(0.4)

    with keeping(tmp_path) as parts:
        add(store_of(parts), count=1, now=time.time())
        asyncio.run(drain(parts))
    assert script.calls == []


def test_a_database_that_is_away_for_a_while_delays_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()

    async def work(parts: Parts) -> None:
        run, failures = parts.database.run, iter(range(12))

        async def away(function: Callable[..., Any], *arguments: Any) -> Any:
            if next(failures, None) is not None:
                raise GatewayError(503, "database-unavailable", "away")
            return await run(function, *arguments)

        async with working(parts, script):
            while not script.calls:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(parts.database, "run", away)
            await ended(store)

    with keeping(tmp_path) as parts:
        store = store_of(parts)
        script.seconds = 0.1
        add(store, count=6, now=time.time())
        asyncio.run(work(parts))
        assert store.get("job-1", "c").done == 6


def test_another_secret_fails_items_that_wait(tmp_path: Path) -> None:
    from pydantic import SecretStr

    script = Script()

    async def work(parts: Parts) -> None:
        async with working(parts, script):
            await ended(store_of(parts))

    with keeping(tmp_path) as parts:
        add(store_of(parts), count=1, now=time.time())
    with keeping(tmp_path, secret_key=SecretStr("t" * 32)) as parts:
        asyncio.run(work(parts))
        (item,) = store_of(parts).results("job-1", "c", -1, 9).items
    assert item.error and item.error.code == "unreadable"
