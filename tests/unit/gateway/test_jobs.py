"""Jobs: the store by itself, the worker with a scripted `diagnose`, and both over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
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
from tests.unit.gateway.conftest import Gateway, Serve, make_key, until
from tests.unit.gateway.fake import Fake
from tests.unit.gateway.keeping import answered, ask, keeping, png

NOW = 1_000_000.0


def add(store: JobStore, job: str = "job-1", count: int = 3, caller: str = "c", now: float = NOW) -> api.JobStatus:
    items = [(ask(f"question {number}").model_dump_json().encode(), None) for number in range(count)]
    return store.add(job, caller, None, items, now)


def end(store: JobStore, name: str, position: int, job: str = "job-1", now: float = NOW) -> bool:
    return store.finish(name, (job, position), now, answered(f"{job}-{position}", f"answer {position}"), None)


def numbers(results: api.JobResults) -> list[int]:
    return [item.index for item in results.items]


# the store


def test_a_jobs_way(tmp_path: Path) -> None:
    with keeping(tmp_path, job_days=1.0) as parts:
        store = store_of(parts)
        made = add(store)
        assert (made.status, made.items, made.done, made.failed, made.finished) == ("waiting", 3, 0, 0, None)
        taken = store.claim("w", 2, NOW, 30)
        assert [item.key for item in taken] == [("job-1", 0), ("job-1", 1)]
        assert api.DiagnoseRequest.model_validate_json(store.payload(taken[1])) == ask("question 1")
        assert store.get("job-1", "c").status == "running"
        assert store.counts() == {"waiting": 1, "running": 2}
        assert end(store, "w", 1)
        error = api.ErrorBody(code="image-format", type="invalid_request_error", message="no")
        assert store.finish("w", ("job-1", 0), NOW, None, error)
        (last,) = store.claim("w", 5, NOW, 30)
        assert end(store, "w", last.position, now=NOW + 7)
        told = store.get("job-1", "c")
        assert (told.status, told.done, told.failed) == ("finished", 2, 1)
        assert told.finished and told.expires
        assert told.finished.timestamp() == NOW + 7
        assert (told.expires - told.finished).total_seconds() == 86_400
        results = store.results("job-1", "c", -1, 10)
        assert results.items[0].error == error and results.items[0].result is None
        assert [item.result and item.result.answer for item in results.items] == [None, "answer 1", "answer 2"]
        assert results.next is None


def test_images_and_answers_never_stand_in_clear_and_images_go_when_they_are_done(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1)
        store.claim("w", 1, NOW, 30)
        end(store, "w", 0)
        with parts.database.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM job_items WHERE payload IS NULL").scalar() == 1
        data = b"".join(path.read_bytes() for path in tmp_path.glob("gateway.db*"))
    for secret in (b"question 0", png().encode()[:40], b"answer 0"):
        assert secret not in data


def test_results_come_in_order_without_a_gap(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=5)
        store.claim("w", 5, NOW, 30)
        assert (store.results("job-1", "c", -1, 10).items, store.results("job-1", "c", -1, 10).next) == ([], -1)
        for position in (0, 1, 3, 4):
            end(store, "w", position)
        first = store.results("job-1", "c", -1, 10)
        assert (numbers(first), first.next) == ([0, 1], 1)  # 3 and 4 wait for 2
        end(store, "w", 2)
        seen: list[int] = []
        after: int | None = -1
        while after is not None:
            page = store.results("job-1", "c", after, 2)
            seen += numbers(page)
            after = page.next
        assert seen == [0, 1, 2, 3, 4]
        assert numbers(store.results("job-1", "c", 99, 2)) == []


def test_short_jobs_overtake_long_ones(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, "job-1", 5)
        add(store, "job-2", 2)
        assert [item.key for item in store.claim("w", 5, NOW, 30)] == [
            ("job-1", 0), ("job-2", 0), ("job-1", 1), ("job-2", 1), ("job-1", 2)
        ]  # fmt: skip


def test_a_lease_that_ran_out_gives_the_item_to_another_and_the_first_keeps_nothing(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1)
        assert store.claim("dead", 1, NOW, 30)[0].attempts == 1
        assert store.claim("other", 1, NOW + 29, 30) == []
        assert store.renew("dead", NOW + 20, 30) == {("job-1", 0)}
        assert store.claim("other", 1, NOW + 49, 30) == []
        assert store.claim("other", 1, NOW + 51, 30)[0].attempts == 2
        assert store.renew("dead", NOW + 52, 30) == set()
        assert not store.finish("dead", ("job-1", 0), NOW + 53, answered("x", "the dead one's"), None)
        assert end(store, "other", 0)
        assert not end(store, "other", 0)
        (item,) = store.results("job-1", "c", -1, 9).items
        assert item.result and item.result.answer == "answer 0"


def test_giving_back_is_no_attempt_and_postponing_is(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1)
        store.claim("w", 1, NOW, 30)
        store.give_back("w", NOW)
        assert store.claim("w", 1, NOW, 30)[0].attempts == 1
        store.postpone("w", ("job-1", 0), NOW + 10)
        assert store.get("job-1", "c").status == "waiting"
        assert store.claim("w", 1, NOW + 9, 30) == []
        assert store.claim("w", 1, NOW + 10, 30)[0].attempts == 2


def test_cancelling_ends_what_is_open_and_keeps_results(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=3)
        store.claim("w", 2, NOW, 30)
        end(store, "w", 0)
        assert store.cancel("job-1", "c", NOW + 1).status == "cancelled"
        assert store.claim("w", 9, NOW + 100, 30) == []
        assert not end(store, "w", 1)
        results = store.results("job-1", "c", -1, 9)
        assert results.items[0].result
        assert [item.error and item.error.code for item in results.items] == [None, "cancelled", "cancelled"]
        assert results.next is None
        assert store.cancel("job-1", "c", NOW + 99).finished == store.get("job-1", "c").finished
        with parts.database.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(payload) FROM job_items").scalar() == 0


def test_a_finished_job_stays_finished_when_it_is_cancelled(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store, count=1)
        store.claim("w", 1, NOW, 30)
        end(store, "w", 0)
        assert store.cancel("job-1", "c", NOW + 1).status == "finished"


def test_only_the_owner_sees_a_job(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        add(store)
        looks: tuple[Callable[[str | None], Any], ...] = (
            lambda who: store.get("job-1", who),
            lambda who: store.results("job-1", who, -1, 9),
            lambda who: store.cancel("job-1", who, NOW),
        )
        for look in looks:
            with pytest.raises(GatewayError) as told:
                look("d")
            assert told.value.status == 404
        assert store.get("job-1", "c").status == "waiting"
        assert store.get("job-1", None).id == "job-1"  # an administrator
        assert store.page("d", None, 9) == []


def test_jobs_are_listed_newest_first_in_pages(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        store = store_of(parts)
        for number in range(5):
            add(store, f"job-{number}", 1)
        assert [job.id for job in store.page("c", None, 3)] == ["job-4", "job-3", "job-2"]
        assert [job.id for job in store.page("c", "job-2", 3)] == ["job-1", "job-0"]


def test_what_has_expired_is_removed(tmp_path: Path) -> None:
    with keeping(tmp_path, job_days=1.0) as parts:
        store = store_of(parts)
        add(store, count=1)
        add(store, "job-2", count=1)
        store.claim("w", 1, NOW, 30)
        end(store, "w", 0)
        store.expire(NOW + 86_399)
        assert store.get("job-1", "c").status == "finished"
        store.expire(NOW + 86_401)
        with pytest.raises(GatewayError):
            store.get("job-1", "c")
        assert store.get("job-2", "c").status == "waiting"  # what has not ended stays
        with parts.database.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM job_items").scalar() == 1


# the worker


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


# over HTTP


def body(*questions: str, **more: Any) -> dict[str, Any]:
    return {"items": [{"question": question, "images": [{"data": png()}]} for question in questions], **more}


def done(gateway: Gateway, job: str) -> dict[str, Any]:
    until(lambda: gateway.client.get(f"/v1/jobs/{job}").json()["status"] == "finished", 20)
    status: dict[str, Any] = gateway.client.get(f"/v1/jobs/{job}").json()
    return status


def test_a_job_over_http(gateway: Gateway, fake: Fake) -> None:
    fake.text = "no nodule"
    sent = gateway.client.post("/v1/jobs", json=body("Is there a nodule?", "Is it normal?", name="night"))
    assert sent.status_code == 202, sent.text
    assert sent.json()["name"] == "night" and sent.json()["items"] == 2
    assert sent.headers["location"] == f"/v1/jobs/{sent.json()['id']}"
    status = done(gateway, sent.json()["id"])
    assert (status["done"], status["failed"]) == (2, 0)
    results = gateway.client.get(f"{sent.headers['location']}/results").json()
    assert [item["result"]["answer"] for item in results["items"]] == ["no nodule"] * 2
    assert results["next"] is None
    assert [job["id"] for job in gateway.client.get("/v1/jobs").json()["jobs"]] == [sent.json()["id"]]
    # a reader may judge a job's answers
    identity = results["items"][1]["result"]["id"]
    verdict = gateway.client.post("/v1/feedback", json={"request_id": identity, "verdict": "correct"})
    assert verdict.status_code == 201, verdict.text


def test_a_bad_image_fails_its_item_alone_and_at_once(gateway: Gateway) -> None:
    job = body("one?", "two?", "three?")
    job["items"][1]["images"] = [{"data": base64.b64encode(b"no image").decode()}]
    job["items"][2]["images"] = [{"data": "%%%"}]
    sent = gateway.client.post("/v1/jobs", json=job)
    assert sent.status_code == 202
    assert (sent.json()["failed"], sent.json()["status"]) == (2, "waiting")
    done(gateway, sent.json()["id"])
    items = gateway.client.get(f"/v1/jobs/{sent.json()['id']}/results").json()["items"]
    assert items[0]["result"]["decision"] in ("answered", "abstained")
    assert items[1]["error"]["code"] == "image-format" and items[1]["error"]["param"].startswith("items.1.images.0")
    assert items[2]["error"]["code"] == "image-base64" and items[2]["error"]["param"].startswith("items.2.images.0")


def test_a_job_of_bad_images_alone_has_ended(gateway: Gateway) -> None:
    job = {"items": [{"question": "one?", "images": [{"data": "AAAA"}]}]}
    sent = gateway.client.post("/v1/jobs", json=job).json()
    assert (sent["status"], sent["failed"]) == ("finished", 1)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"items": []}, "items"),
        ({}, "items"),
        ({"items": [{"images": [{"data": "AAAA"}]}]}, "items.0"),
        ({"items": [{"question": "a?", "images": []}]}, "items.0.images"),
        ({"items": [{"question": "a?", "images": [{"data": "AAAA"}]}], "nmae": "x"}, "nmae"),
        ({"items": [{"question": "a?", "images": [{"data": "AAAA"}]}], "name": "a\0b"}, "name"),
    ],
)
def test_a_wrong_document_refuses_the_whole_job(wrong: dict[str, Any], param: str, gateway: Gateway) -> None:
    told = gateway.client.post("/v1/jobs", json=wrong)
    assert told.status_code == 422
    assert told.json()["error"]["param"] == param
    assert gateway.client.get("/v1/jobs").json() == {"jobs": [], "next": None}


def test_too_many_items(serve: Serve, settings: Any) -> None:
    with serve(settings.model_copy(update={"job_items": 2})) as gateway:
        told = gateway.client.post("/v1/jobs", json=body("a?", "b?", "c?"))
        assert (told.status_code, told.json()["error"]["param"]) == (422, "items")


def test_a_job_that_is_sent_twice_is_made_once(gateway: Gateway) -> None:
    headers = {"idempotency-key": "night-1"}
    first = gateway.client.post("/v1/jobs", json=body("a?"), headers=headers)
    again = gateway.client.post("/v1/jobs", json=body("a?"), headers=headers)
    assert again.json() == first.json() and again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    other = gateway.client.post("/v1/jobs", json=body("b?"), headers=headers)
    assert (other.status_code, other.json()["error"]["param"]) == (422, "idempotency-key")
    assert len(gateway.client.get("/v1/jobs").json()["jobs"]) == 1


def test_a_job_is_in_the_audit_log_and_is_not_made_without_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps(body("a?")).encode()
    job = gateway.client.post("/v1/jobs", content=content).json()["id"]
    done(gateway, job)
    gateway.client.get(f"/v1/jobs/{job}/results")
    gateway.client.delete(f"/v1/jobs/{job}")
    rows = [json.loads(line) for line in gateway.parts.audit.path.read_text().splitlines()]
    assert [(row["route"], row["status"], row["client"]) for row in rows] == [
        ("/v1/jobs", 202, "system"),
        ("/v1/diagnose", 200, "batch"),
        ("/v1/jobs/{id}/results", 200, "system"),
        ("/v1/jobs/{id}", 200, "system"),
    ]
    assert rows[0]["inputs"] == hashlib.sha256(content).hexdigest()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gateway.parts.audit, "_write", fail)
    told = gateway.client.post("/v1/jobs", json=body("b?"))
    assert (told.status_code, told.json()["error"]["code"]) == (503, "audit-unavailable")
    assert len(gateway.client.get("/v1/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize("path", ["job-%00", "%ff", "job-x%20y", "x" * 41, "..%2f..%2fetc"])
def test_what_is_no_id_is_refused(path: str, gateway: Gateway) -> None:
    for method, rest in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        assert gateway.client.request(method, f"/v1/jobs/{path}{rest}").status_code in (404, 422)
    assert gateway.client.get(f"/v1/jobs?before={path}").status_code == 422


def test_others_jobs_are_not_there(gateway: Gateway) -> None:
    job = gateway.client.post("/v1/jobs", json=body("a?")).json()["id"]
    plain = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'other', scopes=('jobs',))}"}
    admin = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'admin')}"}
    for method, path in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        told = gateway.client.request(method, f"/v1/jobs/{job}{path}", headers=plain)
        assert (told.status_code, told.json()["error"]["code"]) == (404, "job-unknown")
    assert gateway.client.get(f"/v1/jobs/{job}", headers=admin).status_code == 200
    assert gateway.client.get("/v1/jobs", headers=admin).json()["jobs"] == []
    without = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'asker', scopes=('diagnose',))}"}
    assert gateway.client.post("/v1/jobs", json=body("a?"), headers=without).status_code == 403


def test_a_job_is_cancelled_over_http(gateway: Gateway, fake: Fake) -> None:
    fake.first_byte_seconds = 30.0
    job = gateway.client.post("/v1/jobs", json=body(*[f"{number}?" for number in range(6)])).json()["id"]
    until(lambda: len(fake.requests) >= 2)
    told = gateway.client.delete(f"/v1/jobs/{job}")
    assert (told.status_code, told.json()["status"]) == (200, "cancelled")
    items = gateway.client.get(f"/v1/jobs/{job}/results").json()["items"]
    assert [item["error"]["code"] for item in items] == ["cancelled"] * 6


def test_an_overloaded_upstream_is_waited_for(gateway: Gateway, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_WAIT", 0.2)
    fake.statuses.extend([503] * 4)
    job = gateway.client.post("/v1/jobs", json=body("a?")).json()["id"]
    assert done(gateway, job)["done"] == 1


@pytest.mark.parametrize("query", ["after=-2", "after=x", f"after={10**30}", "limit=0", "limit=1001"])
def test_a_wrong_page_is_refused(query: str, gateway: Gateway) -> None:
    told = gateway.client.get(f"/v1/jobs/job-x/results?{query}")
    assert told.status_code == 422 and query.split("=")[0] in told.json()["error"]["param"]


def test_a_job_goes_on_after_a_restart_of_the_gateway(serve: Serve, settings: Any, fake: Fake) -> None:
    fake.first_byte_seconds = 30.0
    with serve(settings) as gateway:
        job = gateway.client.post("/v1/jobs", json=body("a?", "b?")).json()["id"]
        until(lambda: len(fake.requests) >= 2)
    fake.first_byte_seconds = 0.0
    with serve(settings) as gateway:
        assert done(gateway, job)["done"] == 2


def test_openapi_tells_of_the_routes(gateway: Gateway) -> None:
    paths = gateway.client.get("/openapi.json").json()["paths"]
    post = paths["/v1/jobs"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["items"]["items"]["properties"]["images"]["items"]["properties"]["data"]
    assert "$ref" not in str(schema)
    api.JobRequest.model_validate(post["requestBody"]["content"]["application/json"]["example"])
    assert {"202", "409", "422"} <= set(post["responses"])
    assert set(paths["/v1/jobs/{id}"]) == {"get", "delete"}
    feedback = paths["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]
    api.FeedbackRequest.model_validate(feedback["example"])
