"""The queue in front of the model: what waits is answered together, batch after batch, in one thread."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from serving.predictor.errors import Refusal, internal, outline
from serving.predictor.generation import Done, Event, Generation, Job, Request
from serving.predictor.metrics import Metrics

log = logging.getLogger(__name__)

_BROKEN = 3  # batches in a row that fail: the device is taken to be broken


class Place:
    """A request's right to be served until its time is up."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = seconds
        self.arrived = clock()

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return self._clock() - self.arrived

    @property
    def left(self) -> float:
        """Seconds until its time is up; 0 or less when it is."""
        return self._seconds - self.age

    def expired(self) -> Refusal:
        """What it is told when its time is up."""
        message = f"no whole answer within {self._seconds:g} s; ask for fewer tokens, or try again later"
        return Refusal(504, "timeout", message, retry_after=1)


class _Ticket(Request):
    """A request in the queue or in a batch, and the way back to whoever asked."""

    def __init__(self, job: Job, place: Place) -> None:
        super().__init__(job)
        self.place = place
        self.events: asyncio.Queue[Event | Refusal] = asyncio.Queue()
        self.begun = self.ended = False


class Engine:
    """Batches of at most `max_batch` requests; the first waits `max_wait` seconds for others.

    At most `max_batch` + `queue` requests are inside at once, in preparation, waiting or running. `serve` has to run.
    """

    def __init__(
        self,
        generation: Generation,
        metrics: Metrics,
        *,
        max_batch: int = 8,
        max_wait: float = 0.005,
        queue: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = max_batch + queue
        self._generation, self._metrics, self._clock = generation, metrics, clock
        self._limit, self._max_wait = max_batch, max_wait
        self._waiting: deque[_Ticket] = deque()
        self._running: Sequence[_Ticket] = ()
        self._inside = 0
        self._failed = 0
        self._batch_seconds = 1.0
        self._stopped = False
        self.probe: Callable[[], None] | None = None  # a request that has to succeed; it tells a broken device
        self._wake, self._full = asyncio.Event(), asyncio.Event()
        metrics.batch_limit.set(max_batch)

    @property
    def healthy(self) -> bool:
        """Whether it answers: not when it was stopped, nor when batches in a row, and the `probe`, have failed."""
        return not self._stopped and self._failed < _BROKEN

    @contextmanager
    def place(self, seconds: float) -> Iterator[Place]:
        """A place for a request that has so many seconds, for as long as the block runs, which is counted and timed.

        Refusal 429 when all places are taken, 503 when the engine has stopped.
        """
        place = Place(seconds, self._clock)
        try:
            self._enter()
            try:
                yield place
            finally:
                self._inside -= 1
                self._metrics.request_seconds.observe(place.age)
        except Refusal as refusal:
            self._metrics.failures.labels(refusal.code).inc()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self._metrics.cancelled.inc()
            raise
        self._metrics.requests.inc()

    def _enter(self) -> None:
        if self._stopped:
            raise _stopping()
        if self._inside >= self.capacity:
            # 429, not 503: it is full, not broken, and who asks is not to give it up
            raise Refusal(429, "overloaded", "too many requests are waiting; try again later", retry_after=self._wait())
        self._inside += 1

    def _wait(self) -> float:
        """Seconds until the queue will have moved, by what batches took lately."""
        return self._batch_seconds * max(1, math.ceil(len(self._waiting) / self._limit))

    async def events(self, job: Job, place: Place) -> AsyncGenerator[Event, None]:
        """The pieces of the answer to `job`, then its `Done`.

        Refusal when its time is up or its batch fails. Closing the iterator stops the work for it: close it always
        (`contextlib.aclosing`).
        """
        if self._stopped:
            raise _stopping()
        ticket = _Ticket(job, place)
        self._waiting.append(ticket)
        self._metrics.queue_length.set(len(self._waiting))
        self._wake.set()
        if len(self._waiting) >= self._limit:
            self._full.set()
        try:
            while not ticket.ended or not ticket.events.empty():
                try:
                    event = await asyncio.wait_for(ticket.events.get(), place.left)
                except asyncio.TimeoutError:
                    raise place.expired() from None
                if isinstance(event, Refusal):
                    raise event
                yield event
        finally:
            ticket.cancelled = True
            with suppress(ValueError):  # it is in a batch already
                self._waiting.remove(ticket)
                self._metrics.queue_length.set(len(self._waiting))

    async def serve(self) -> None:
        """Answer what comes until `stop` is called."""
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as worker:
            while not self._stopped:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting and not self._stopped:
                    if not await self._gather():
                        break
                    batch = [self._waiting.popleft() for _ in range(min(self._limit, len(self._waiting)))]
                    self._metrics.queue_length.set(len(self._waiting))
                    if batch:
                        await self._answer(batch, worker)
        for ticket in self._waiting:
            ticket.events.put_nowait(_stopping())

    def stop(self) -> None:
        """Take nothing more, and end what is running at its next token. Call it when all requests are answered."""
        self._stopped = True
        for ticket in self._running:
            ticket.cancelled = True
        self._wake.set()
        self._full.set()

    async def _gather(self) -> bool:
        """Wait until a batch is full, or the first of it has waited long enough for others. False: it was stopped."""
        self._full.clear()
        if len(self._waiting) < self._limit and not self._stopped:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._max_wait)
        return not self._stopped

    async def _answer(self, batch: Sequence[_Ticket], worker: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        self._running = batch
        begun = self._clock()
        self._metrics.batch_size.observe(len(batch))
        for ticket in batch:
            self._metrics.queue_seconds.observe(ticket.place.age)
            self._metrics.tokens.labels("in").inc(ticket.job.prompt.length)

        def tell(events: list[tuple[Request, Event]]) -> None:
            loop.call_soon_threadsafe(self._deliver, events)

        try:
            await loop.run_in_executor(worker, self._generation.run, batch, tell)
        except Exception as error:  # whatever it is, the batches after this one are to be answered
            self._fail(batch, error)
            await self._test(worker)
        else:
            self._refuse(batch, _stopping())  # whom `stop` has ended; all others are answered
        finally:
            self._running = ()
        self._batch_seconds += 0.2 * (self._clock() - begun - self._batch_seconds)

    async def _test(self, worker: ThreadPoolExecutor) -> None:
        """Tell a broken device from requests that nobody could answer, which must not take the server down."""
        if self._failed < _BROKEN or self.probe is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(worker, self.probe)
        except Exception as error:
            log.error("the model is broken: the probe failed too: %s", outline(error))
        else:
            self._failed = 0

    def _deliver(self, events: Sequence[tuple[Request, Event]]) -> None:
        """In the event loop: give what the batch told to those who asked."""
        for ticket, event in events:
            assert isinstance(ticket, _Ticket)
            if not ticket.begun:
                ticket.begun = True
                self._metrics.first_token_seconds.observe(ticket.place.age)
            if isinstance(event, Done):
                ticket.ended = True
                self._failed = 0
                self._metrics.tokens.labels("out").inc(event.completion_tokens)
            ticket.events.put_nowait(event)

    def _fail(self, batch: Sequence[_Ticket], error: Exception) -> None:
        """Refuse what the batch has not answered. Where memory ran out, the batches after it are smaller."""
        if _is_out_of_memory(error):
            self._limit = max(1, self._limit // 2)
            self._metrics.batch_limit.set(self._limit)
            log.error("memory ran out with %d requests; batches now hold at most %d", len(batch), self._limit)
            refusal = Refusal(503, "out-of-memory", "the server's memory ran out; try again", retry_after=self._wait())
            _free_memory()
        else:
            self._failed += 1
            log.error("a batch failed: %s", outline(error))
            refusal = internal()
        self._refuse(batch, refusal)

    def _refuse(self, batch: Sequence[_Ticket], refusal: Refusal) -> None:
        for ticket in batch:
            if not ticket.ended:
                ticket.events.put_nowait(refusal)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # the CPU's allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stopping() -> Refusal:
    return Refusal(503, "stopping", "the server is stopping; ask another", retry_after=1)
