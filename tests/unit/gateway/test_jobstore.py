"""The store of jobs by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.gateway import api
from serving.gateway.errors import GatewayError
from serving.gateway.jobs import store_of
from serving.gateway.jobstore import JobStore
from tests.unit.gateway.keeping import NOW, add, answered, ask, keeping, png


def end(store: JobStore, name: str, position: int, job: str = "job-1", now: float = NOW) -> bool:
    return store.finish(name, (job, position), now, answered(f"{job}-{position}", f"answer {position}"), None)


def numbers(results: api.JobResults) -> list[int]:
    return [item.index for item in results.items]


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
