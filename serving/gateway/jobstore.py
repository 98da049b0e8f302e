"""Jobs and their items in the database: what waits, who works on what until when, and what came out.

An item is `waiting` (not before `due`), `running` (its worker's lease ends at `due`; a worker that died leaves it to
the next one then), and at last done, failed or cancelled. Its payload, the images and the question, is removed when
it ends. Payloads and outcomes are sealed (`database.Seal`).

Items are taken by their number in their job, the first ones of all jobs before the second ones: a short job overtakes
a long one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection, Row

from serving.gateway import api
from serving.gateway.database import Database, Seal, answers, job_items, jobs
from serving.gateway.errors import GatewayError

OPEN = ("waiting", "running")
Key = tuple[str, int]  # job and position


@dataclass(frozen=True)
class Item:
    """An item that a worker took: `attempts` counts this one."""

    job: str
    position: int
    caller: str
    attempts: int
    payload: bytes

    @property
    def key(self) -> Key:
        """Job and position."""
        return self.job, self.position


class JobStore:
    """What is done to jobs, each in one transaction. All block: they belong in the database's threads."""

    def __init__(self, database: Database, seal: Seal, keep_seconds: float) -> None:
        self._database, self._seal, self._keep = database, seal, keep_seconds

    def add(
        self, job: str, caller: str, name: str | None, items: Sequence[tuple[bytes, api.ErrorBody | None]], now: float
    ) -> api.JobStatus:
        """Keep a new job. An item is its payload, and its error where it is known to fail: then it has failed."""
        rows: list[dict[str, Any]] = []
        for position, (payload, error) in enumerate(items):
            outcome = None if error is None else self._seal.close(_outcome(error=error), f"{job}/{position}/outcome")
            sealed = self._seal.close(payload, f"{job}/{position}/payload") if error is None else None
            rows.append(
                {"job": job, "position": position, "status": "waiting" if error is None else "failed", "attempts": 0,
                 "due": now, "worker": None, "payload": sealed, "outcome": outcome}
            )  # fmt: skip
        row = {"id": job, "caller": caller, "name": name, "status": "open", "created": now, "items": len(rows)}
        with self._database.begin() as connection:
            connection.execute(jobs.insert().values(row))
            connection.execute(job_items.insert(), rows)
            self._end_if_done(connection, job, now)
            return _status(connection, _job(connection, job, caller))

    def get(self, job: str, caller: str | None) -> api.JobStatus:
        """How far a job is. GatewayError 404 unless it is `caller`'s (None: anybody's)."""
        with self._database.engine.connect() as connection:
            return _status(connection, _job(connection, job, caller))

    def page(self, caller: str, before: str | None, limit: int) -> list[api.JobStatus]:
        """The caller's jobs, the newest first, from the one older than `before`."""
        wanted = sql.select(jobs).where(jobs.c.caller == caller)
        if before is not None:
            wanted = wanted.where(jobs.c.id < before)  # ids begin with the time
        with self._database.engine.connect() as connection:
            rows = connection.execute(wanted.order_by(jobs.c.id.desc()).limit(limit)).all()
            return [_status(connection, row) for row in rows]

    def results(self, job: str, caller: str | None, after: int, limit: int) -> api.JobResults:
        """The outcomes behind number `after`, as far as items have ended without a gap."""
        columns = (job_items.c.position, job_items.c.status, job_items.c.outcome)
        wanted = sql.select(*columns).where(job_items.c.job == job, job_items.c.position > after)
        with self._database.engine.connect() as connection:
            found = _job(connection, job, caller)
            rows = connection.execute(wanted.order_by(job_items.c.position).limit(limit)).all()
        items = []
        for row in rows:
            if row.status in OPEN:
                break
            items.append(self._item(job, row.position, row.outcome))
        last = items[-1].index if items else after
        return api.JobResults(id=job, items=items, next=last if last < found.items - 1 else None)

    def _item(self, job: str, position: int, sealed: bytes | None) -> api.JobItem:
        if sealed is None:
            error = api.ErrorBody(code="cancelled", type="invalid_request_error", message="The job was cancelled")
            return api.JobItem(index=position, error=error)
        outcome = self._seal.open(sealed, f"{job}/{position}/outcome")
        return api.JobItem.model_validate({"index": position, **json.loads(outcome)})

    def cancel(self, job: str, caller: str | None, now: float) -> api.JobStatus:
        """End a job: what waits or runs is cancelled. One that has ended stays as it is."""
        with self._database.begin() as connection:
            found = _job(connection, job, caller, lock=True)
            if found.status == "open":
                ended = {"status": "cancelled", "worker": None, "payload": None}
                connection.execute(
                    job_items.update().where(job_items.c.job == job, job_items.c.status.in_(OPEN)).values(ended)
                )
                self._end(connection, job, "cancelled", now)
            return _status(connection, _job(connection, job, caller))

    def claim(self, worker: str, count: int, now: float, lease: float) -> list[Item]:
        """Take up to `count` items that are due, and hold them for `lease` seconds."""
        due = (
            sql.select(job_items.c.job, job_items.c.position, jobs.c.caller)
            .join(jobs, jobs.c.id == job_items.c.job)
            .where(job_items.c.status.in_(OPEN), job_items.c.due <= now)
            .order_by(job_items.c.position, job_items.c.job)
            .limit(count)
            .with_for_update(skip_locked=True, of=job_items)
        )
        values = {"status": "running", "worker": worker, "due": now + lease, "attempts": job_items.c.attempts + 1}
        take = job_items.update().values(values).returning(job_items.c.attempts, job_items.c.payload)
        items = []
        with self._database.begin() as connection:
            for job, position, caller in connection.execute(due).all():
                attempts, payload = connection.execute(take.where(*_is((job, position)))).one()
                items.append(Item(job, position, caller, attempts, payload))
        return items

    def payload(self, item: Item) -> bytes:
        """The request of an item, unsealed."""
        return self._seal.open(item.payload, f"{item.job}/{item.position}/payload")

    def renew(self, worker: str, now: float, lease: float) -> set[Key]:
        """Hold the worker's items for `lease` seconds from now. Returns them: what is missing was cancelled or lost."""
        with self._database.begin() as connection:
            connection.execute(job_items.update().where(*_held(worker)).values(due=now + lease))
            rows = connection.execute(sql.select(job_items.c.job, job_items.c.position).where(*_held(worker)))
            return {(row.job, row.position) for row in rows}

    def finish(
        self, worker: str, key: Key, now: float, result: api.DiagnoseResponse | None, error: api.ErrorBody | None
    ) -> bool:
        """Keep what came out. False, and nothing is kept, where the worker does not hold the item any more."""
        job, position = key
        values = {
            "status": "done" if error is None else "failed",
            "outcome": self._seal.close(_outcome(result, error), f"{job}/{position}/outcome"),
            "payload": None,
            "worker": None,
        }
        with self._database.begin() as connection:
            # two workers that end a job's last two items must not both see the other's as open
            connection.execute(sql.select(jobs.c.id).where(jobs.c.id == job).with_for_update())
            kept = connection.execute(job_items.update().where(*_is(key), *_held(worker)).values(values)).rowcount == 1
            if kept:
                self._end_if_done(connection, job, now)
        return kept

    def postpone(self, worker: str, key: Key, due: float) -> None:
        """Let the item wait until `due`, for anybody."""
        with self._database.begin() as connection:
            waits = {"status": "waiting", "worker": None, "due": due}
            connection.execute(job_items.update().where(*_is(key), *_held(worker)).values(waits))

    def give_back(self, worker: str, now: float) -> None:
        """Let all that the worker holds wait for anybody, as if it had not been tried: the worker stops."""
        waits = {"status": "waiting", "worker": None, "due": now, "attempts": job_items.c.attempts - 1}
        with self._database.begin() as connection:
            connection.execute(job_items.update().where(*_held(worker)).values(waits))

    def counts(self) -> dict[str, int]:
        """How many items wait and run."""
        query = sql.select(job_items.c.status, sql.func.count()).where(job_items.c.status.in_(OPEN))
        with self._database.engine.connect() as connection:
            found = {status: int(count) for status, count in connection.execute(query.group_by(job_items.c.status))}
        return {status: found.get(status, 0) for status in OPEN}

    def expire(self, now: float) -> None:
        """Remove jobs whose time is over, and what is known of answers that are as old."""
        with self._database.begin() as connection:
            connection.execute(jobs.delete().where(jobs.c.expires <= now))
            connection.execute(answers.delete().where(answers.c.at <= now - self._keep))

    def _end_if_done(self, connection: Connection, job: str, now: float) -> None:
        still = sql.select(sql.func.count()).where(job_items.c.job == job, job_items.c.status.in_(OPEN))
        if not connection.execute(still).scalar():
            self._end(connection, job, "finished", now)

    def _end(self, connection: Connection, job: str, status: str, now: float) -> None:
        values = {"status": status, "finished": now, "expires": now + self._keep}
        connection.execute(jobs.update().where(jobs.c.id == job, jobs.c.status == "open").values(values))


def _is(key: Key) -> tuple[sql.ColumnElement[bool], ...]:
    return job_items.c.job == key[0], job_items.c.position == key[1]


def _held(worker: str) -> tuple[sql.ColumnElement[bool], ...]:
    return job_items.c.worker == worker, job_items.c.status == "running"


def _job(connection: Connection, job: str, caller: str | None, lock: bool = False) -> Row[Any]:
    wanted = sql.select(jobs).where(jobs.c.id == job)
    if caller is not None:
        wanted = wanted.where(jobs.c.caller == caller)
    found = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if found is None:
        raise GatewayError(404, "job-unknown", "No job of yours has this id, or its results have expired", "id")
    return found


def _status(connection: Connection, job: Row[Any]) -> api.JobStatus:
    query = sql.select(job_items.c.status, sql.func.count()).where(job_items.c.job == job.id)
    counts = {status: int(count) for status, count in connection.execute(query.group_by(job_items.c.status))}
    started = counts.get("running", 0) + counts.get("done", 0)
    return api.JobStatus(
        id=job.id,
        name=job.name,
        status=job.status if job.status != "open" else "running" if started else "waiting",
        created=_time(job.created),
        finished=None if job.finished is None else _time(job.finished),
        expires=None if job.expires is None else _time(job.expires),
        items=job.items,
        done=counts.get("done", 0),
        failed=counts.get("failed", 0),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _outcome(result: api.DiagnoseResponse | None = None, error: api.ErrorBody | None = None) -> bytes:
    told = {"result": result, "error": error}
    return json.dumps({name: value and value.model_dump(mode="json") for name, value in told.items()}).encode()
