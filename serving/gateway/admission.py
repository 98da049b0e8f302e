"""A place at an upstream: so many at once, a bounded queue before them, callers in turn, batch callers last.

Little's law decides what a queue is worth: what would wait longer than `queue_seconds` is refused at once or after
that time, with 503 and the time after which a place is likely.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.gateway.context import time_left
from serving.gateway.errors import GatewayError
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Context
from serving.gateway.settings import Settings

_FORGET = 0.1  # weight of the newest request in the mean of how long requests take
_LONGEST_ADVICE = 30.0  # seconds


class _Line:
    """Those who wait: each caller has a line of its own, and the lines take turns."""

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def join(self, caller: str, place: asyncio.Future[None]) -> None:
        self._callers.setdefault(caller, deque()).append(place)

    def leave(self, caller: str, place: asyncio.Future[None]) -> bool:
        """Whether it was still waiting."""
        line = self._callers.get(caller)
        if line is None or place not in line:
            return False
        line.remove(place)
        if not line:
            del self._callers[caller]
        return True

    def first(self) -> asyncio.Future[None] | None:
        """Take out who is next: the oldest of the caller whose turn it is, which then goes to the end."""
        if not self._callers:
            return None
        caller, line = self._callers.popitem(last=False)
        place = line.popleft()
        if line:
            self._callers[caller] = line
        return place

    def length(self, caller: str) -> int:
        return len(self._callers.get(caller, ()))

    def greediest(self) -> tuple[str, int]:
        """The caller with the longest line, and its length; ("", 0) if nobody waits."""
        return max(
            ((caller, len(line)) for caller, line in self._callers.items()), key=lambda pair: pair[1], default=("", 0)
        )

    def drop_newest(self, caller: str) -> asyncio.Future[None]:
        line = self._callers[caller]
        place = line.pop()
        if not line:
            del self._callers[caller]
        return place


class Admission:
    """The places of a gateway, for one event loop: `async with admission.place(context): …`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._places, self._most_waiting, self._longest = settings.concurrency, settings.queue, settings.queue_seconds
        self._metrics = metrics
        self._taken = self._waiting = 0
        self._lines = (_Line(), _Line())  # batch callers are the second
        self._mean = 1.0  # seconds that a place is held

    @asynccontextmanager
    async def place(self, context: Context) -> AsyncIterator[None]:
        """Hold a place. GatewayError 503 if the queue is full or too slow, 504 if the deadline passes before."""
        before = time.monotonic()
        await self._enter(context)
        began = time.monotonic()
        self._metrics.queue_seconds.observe(began - before)
        try:
            yield
        finally:
            self._mean += _FORGET * (time.monotonic() - began - self._mean)
            self._leave()

    async def _enter(self, context: Context) -> None:
        left = time_left(context)
        if self._taken < self._places:  # then nobody waits
            self._taken += 1
            self._metrics.in_flight.set(self._taken)
            return
        line = self._lines[context.caller.kind == "batch"]
        self._make_room(context)
        place = asyncio.get_running_loop().create_future()
        line.join(context.caller.id, place)
        self._count(1)
        try:
            await asyncio.wait((place,), timeout=min(self._longest, left))  # wait_for may lose a cancellation (3.11)
        except asyncio.CancelledError:
            self._withdraw(line, context.caller.id, place)
            raise
        if place.done():
            place.result()
            return
        self._withdraw(line, context.caller.id, place)
        if left <= self._longest:
            self._metrics.refused.labels("deadline").inc()
            time_left(context)
        raise self._full("No place became free in time")

    def _withdraw(self, line: _Line, caller: str, place: asyncio.Future[None]) -> None:
        """Stop waiting. A place that was given in the same moment goes to the next."""
        if line.leave(caller, place):
            self._count(-1)
        elif not place.cancelled() and place.exception() is None:
            self._leave()

    def _make_room(self, context: Context) -> None:
        """In a full queue, whoever has most waiting gives way: batch callers first, and only for those with less."""
        if self._waiting < self._most_waiting:
            return
        batch = context.caller.kind == "batch"
        for line, is_batch in ((self._lines[1], True), (self._lines[0], False)):
            greediest, length = line.greediest()
            outranked = is_batch and not batch
            if length and (outranked or (is_batch == batch and length > line.length(context.caller.id) + 1)):
                line.drop_newest(greediest).set_exception(self._full("The queue is full, and others have less in it"))
                self._count(-1)
                return
        raise self._full("The queue is full")

    def _full(self, message: str) -> GatewayError:
        self._metrics.refused.labels("queue").inc()
        wait = self._mean * (self._waiting + 1) / self._places
        return GatewayError(
            503, "overloaded", f"{message}; send it again later", retry_after=min(wait, _LONGEST_ADVICE)
        )

    def _count(self, change: int) -> None:
        self._waiting += change
        self._metrics.queued.set(self._waiting)

    def _leave(self) -> None:
        """Give the place to who is next, or back."""
        for line in self._lines:
            if (place := line.first()) is not None:
                self._count(-1)
                place.set_result(None)
                return
        self._taken -= 1
        self._metrics.in_flight.set(self._taken)
