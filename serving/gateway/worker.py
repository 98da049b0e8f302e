"""The job worker: takes items that are due and asks for them as a caller of the kind `batch`, a few at a time.

Several gateways on one database share the work. A worker renews the leases of what it holds; when it is killed they
run out, and its items are taken by the next one. An item is kept once: whoever lost its lease keeps nothing. Leases go
by the gateways' own clocks: one that is ahead by more than a lease does others' work again, and no harm else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import structlog

from serving.gateway import api, auditing
from serving.gateway.errors import GatewayError
from serving.gateway.idempotency import remove_expired
from serving.gateway.images import Picture
from serving.gateway.jobstore import Item, JobStore, Key
from serving.gateway.logs import place
from serving.gateway.parts import Caller, Context, Parts

TRIES = 10  # with the waits between them about a quarter of an hour
_TRANSIENT = frozenset({429, 502, 503, 504})
_LONGEST_WAIT = 300.0
_ROUTE = "/v1/jobs/{id}/items"
Diagnose = Callable[[Parts, api.Question, Sequence[Picture], Context], Awaitable[api.DiagnoseResponse]]
Read = Callable[[api.DiagnoseRequest], Awaitable[Sequence[Picture]]]


class Worker:
    """One gateway's worker. `read` decodes the images of an item, `diagnose` asks about them.

    `lease` is how long, in seconds, an item stays with a worker of which nothing is heard; `poll` how often the
    database is asked for items that others sent.
    """

    def __init__(
        self,
        parts: Parts,
        store: JobStore,
        read: Read,
        diagnose: Diagnose,
        *,
        lease: float = 30.0,
        poll: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = secrets.token_hex(8)
        self._parts, self._store, self._read, self._diagnose = parts, store, read, diagnose
        self._lease, self._poll, self._clock = lease, poll, clock
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to work, in the background."""
        self._parts.database.jobs_changed = self._changed
        self._loops = [asyncio.create_task(self._for_ever(self._take)), asyncio.create_task(self._for_ever(self._keep))]

    async def stop(self) -> None:
        """Stop at once, and give back what is not done."""
        tasks = [*self._loops, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._run(self._store.give_back, self.name, self._clock())

    def _changed(self, cancelled: str | None) -> None:
        """Look for new work at once, and stop what runs of a job that was cancelled."""
        self._woken.set()
        for (job, _), task in self._tasks.items():
            if job == cancelled:
                task.cancel()

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._parts.database.run(function, *arguments)

    async def _for_ever(self, turn: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await turn()
            except Exception as error:  # the database is away, for one; what was missed is done in the next turn
                structlog.get_logger().warning("jobs delayed", **place(error))
                await asyncio.sleep(self._poll)

    async def _take(self) -> None:
        """Begin with what is due, then wait until there may be more."""
        self._woken.clear()
        free = self._parts.settings.job_concurrency - len(self._tasks)
        if free > 0 and not self._parts.draining:
            for item in await self._run(self._store.claim, self.name, free, self._clock(), self._lease):
                if item.key in self._tasks:  # its lease ran out while this process was held up; it is still at work
                    continue
                task = asyncio.create_task(self._work(item))
                self._tasks[item.key] = task
                task.add_done_callback(partial(self._ended, item.key))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            # not wait_for, which before Python 3.12 may lose the cancellation of `stop` when it is woken just then
            await asyncio.wait((woken,), timeout=self._poll)
        finally:
            woken.cancel()

    def _ended(self, key: Key, _: asyncio.Task[None]) -> None:
        del self._tasks[key]
        self._woken.set()

    async def _keep(self) -> None:
        """Renew the leases, stop what others cancelled, remove what has expired, and count."""
        mine = set(self._tasks)
        held = await self._run(self._store.renew, self.name, self._clock(), self._lease)
        for key in mine - held:
            if key in self._tasks:
                self._tasks[key].cancel()
        await self._run(self._store.expire, self._clock())
        await self._run(remove_expired, self._parts.database, self._clock())
        for status, count in (await self._run(self._store.counts)).items():
            self._parts.metrics.jobs.labels(status).set(count)
        await asyncio.sleep(self._lease / 3)

    async def _work(self, item: Item) -> None:
        """See one item through: a result, an error, or a later attempt."""
        identity = f"{item.job}-{item.position}"
        caller = Caller(item.caller, "", "batch", frozenset({"diagnose"}))
        context = Context(identity, caller, time.monotonic() + self._parts.settings.deadline)
        result: api.DiagnoseResponse | None = None
        error: GatewayError | None = None
        try:
            if item.attempts > TRIES:  # it was begun that often, and its worker died each time
                raise GatewayError(500, "gave-up", "The gateway was stopped each time that it worked on this item")
            request = api.DiagnoseRequest.model_validate_json(self._store.payload(item))
            pictures = await self._read(request)
            result = await self._diagnose(self._parts, request, pictures, context)
        except GatewayError as raised:
            error = raised
        except Exception as raised:
            structlog.get_logger().error("item failed", request_id=identity, **place(raised))
            error = GatewayError(500, "internal", "The gateway failed at this item; its log says where")
        if error is not None and error.status not in _TRANSIENT:
            try:
                await auditing.note(self._parts, context, _ROUTE, status=error.status, reason=error.code)
            except GatewayError as raised:
                error = raised
        if error is not None and error.status in _TRANSIENT and item.attempts < TRIES:
            wait = min(max(2.0**item.attempts, error.retry_after or 0), _LONGEST_WAIT)
            await self._until_written(self._store.postpone, self.name, item.key, self._clock() + wait)
            return
        body = None if error is None else api.ErrorBody(**error.body(identity)["error"])
        await self._until_written(self._store.finish, self.name, item.key, self._clock(), result, body)

    async def _until_written(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Write to the database, however long it is away."""
        while True:
            try:
                await self._run(function, *arguments)
                return
            except GatewayError as error:
                structlog.get_logger().warning("jobs delayed", **place(error))
                await asyncio.sleep(self._poll)
