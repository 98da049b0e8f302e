"""The queue: batches, bounds, times, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from medforge.models.generate import generate
from serving.predictor.errors import Refusal
from serving.predictor.generation import Done, Generation, Job, Piece, Request, Tell
from tests.unit.predictor.examples import collect, metric, prompts, serving, text_of


class Scripted:
    """Stands for the model: keeps the batches' sizes; a batch waits until it is let go, or fails as told."""

    def __init__(self, *faults: Exception | None, held: bool = False) -> None:
        self.batches: list[int] = []
        self.faults = list(faults)
        self.go, self.begun = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def run(self, requests: Sequence[Request], tell: Tell) -> None:
        self.batches.append(len(requests))
        self.begun.set()
        while not self.go.wait(0.01):
            if all(request.cancelled for request in requests):
                return
        if fault := (self.faults.pop(0) if self.faults else None):
            raise fault
        for request in requests:
            tell([(request, Piece("a"))])
            tell([(request, Done("stop", 1))])


@pytest.fixture
def job(generation: Generation) -> Job:
    return Job(prompts(generation)[2], 4)


def test_requests_that_come_together_are_one_batch(generation: Generation) -> None:
    made = prompts(generation)
    alone = [generate(generation.model, generation.encoder, [prompt], 8)[0] for prompt in made]

    async def run() -> None:
        async with serving(generation, max_batch=4, max_wait=5.0, queue=4) as engine:
            first = [asyncio.ensure_future(collect(engine, Job(prompt, 8))) for prompt in (*made, made[0])]
            told = await asyncio.gather(*first)  # at once when it is full, not after 5 s
            assert [text_of(events) for events in told] == [answer.text for answer in (*alone, alone[0])]
            assert metric(engine, "batch_size_sum") == 4 and metric(engine, "batch_size_count") == 1
            assert metric(engine, "requests_total") == 4
            assert metric(engine, "tokens_total", kind="out") == sum(a.tokens for a in (*alone, alone[0]))
            assert metric(engine, "tokens_total", kind="in") == sum(p.length for p in (*made, made[0]))
            assert metric(engine, "first_token_seconds_count") == metric(engine, "request_seconds_count") == 4
            assert metric(engine, "queue_length") == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_lone_request_does_not_wait_for_others(job: Job) -> None:
    async def run() -> None:
        async with serving(Scripted(), max_wait=0.01) as engine:
            assert text_of(await asyncio.wait_for(collect(engine, job), 5)) == "a"

    asyncio.run(run())


def test_more_than_it_holds_is_refused_at_once(job: Job) -> None:
    scripted = Scripted(held=True)

    async def run() -> None:
        async with serving(scripted, max_batch=2, queue=3) as engine:
            inside = [asyncio.ensure_future(collect(engine, job)) for _ in range(5)]
            await asyncio.sleep(0.05)
            for _ in range(3):
                with pytest.raises(Refusal) as refused:
                    await collect(engine, job)
                assert refused.value.status == 429 and refused.value.code == "overloaded"
                assert int(refused.value.headers()["retry-after"]) >= 1
            assert metric(engine, "queue_length") == 3
            assert metric(engine, "failures_total", reason="overloaded") == 3
            scripted.go.set()
            assert [text_of(events) for events in await asyncio.gather(*inside)] == ["a"] * 5
            assert await collect(engine, job)
            assert scripted.batches == [2, 2, 1, 1]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_time_counts_from_the_beginning_in_the_queue_too(job: Job) -> None:
    scripted = Scripted(held=True)

    async def run() -> None:
        async with serving(scripted, max_batch=1, queue=3) as engine:
            running = asyncio.ensure_future(collect(engine, job))
            await asyncio.to_thread(scripted.begun.wait)
            with pytest.raises(Refusal, match=r"within 0\.1 s") as refused:
                await collect(engine, job, seconds=0.1)
            assert refused.value.status == 504
            assert metric(engine, "queue_length") == 0  # it left the queue, too
            assert metric(engine, "failures_total", reason="timeout") == 1
            scripted.go.set()
            await running
            assert scripted.batches == [1]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_time_that_is_up_in_a_batch_ends_the_work(job: Job) -> None:
    scripted = Scripted(held=True)

    async def run() -> None:
        async with serving(scripted) as engine:
            with pytest.raises(Refusal) as refused:
                await collect(engine, job, seconds=0.1)
            assert refused.value.status == 504
            scripted.begun.clear()
            again = asyncio.ensure_future(collect(engine, job))
            await asyncio.wait_for(asyncio.to_thread(scripted.begun.wait), 5)  # the first batch has ended
            scripted.go.set()
            await again

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_leaves_the_queue_is_never_answered(job: Job) -> None:
    scripted = Scripted(held=True)

    async def run() -> None:
        async with serving(scripted, max_batch=1) as engine:
            running = asyncio.ensure_future(collect(engine, job))
            await asyncio.to_thread(scripted.begun.wait)
            waiting = asyncio.ensure_future(collect(engine, job))
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert metric(engine, "cancelled_total") == 1 and metric(engine, "queue_length") == 0
            scripted.go.set()
            await running
            assert scripted.batches == [1]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_leaves_stops_the_model(generation: Generation, passes: Callable[[], int]) -> None:
    generation.encoder.end_id = -1
    endless = Job(prompts(generation)[0], 2000)

    async def run() -> None:
        async with serving(generation) as engine:
            with engine.place(60) as place:
                async with aclosing(engine.events(endless, place)) as events:
                    async for _ in events:
                        break
            before = passes()
            await collect(engine, Job(endless.prompt, 2))  # answered at once: nothing else runs
            assert passes() - before < 20

    asyncio.run(asyncio.wait_for(run(), 60))


def test_two_streams_at_once_do_not_mix(generation: Generation) -> None:
    made = prompts(generation)
    alone = [generate(generation.model, generation.encoder, [prompt], 10)[0].text for prompt in made]

    async def run() -> None:
        async with serving(generation, max_batch=2, max_wait=0.0, queue=20) as engine:
            jobs = [Job(made[number % 3], 10) for number in range(9)]
            told = await asyncio.gather(*(collect(engine, job) for job in jobs))
            assert [text_of(events) for events in told] == [alone[number % 3] for number in range(9)]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_where_memory_runs_out_batches_get_smaller(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    scripted = Scripted(torch.OutOfMemoryError("CUDA out of memory"), None, MemoryError(), RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory"))  # fmt: skip

    async def run() -> None:
        async with serving(scripted, max_batch=4, max_wait=0.05, queue=20) as engine:
            told = await asyncio.gather(*(collect(engine, job) for _ in range(4)), return_exceptions=True)
            assert {getattr(refusal, "status", 0) for refusal in told} == {503}
            assert metric(engine, "batch_limit") == 2
            await asyncio.gather(*(collect(engine, job) for _ in range(2)))
            for _ in range(2):
                with pytest.raises(Refusal, match="memory"):
                    await collect(engine, job)
            assert metric(engine, "batch_limit") == 1  # never 0
            assert engine.healthy
            assert await collect(engine, job)
            assert metric(engine, "failures_total", reason="out-of-memory") == 6

    asyncio.run(asyncio.wait_for(run(), 30))
    assert scripted.batches == [4, 2, 1, 1, 1]
    assert "batches now hold at most 2" in caplog.text


def test_a_batch_that_fails_is_told_and_the_next_is_answered(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    scripted = Scripted(ValueError("the patient's name"), None, *[ValueError("x")] * 3)

    async def run() -> None:
        async with serving(scripted) as engine:
            with pytest.raises(Refusal) as refused:
                await collect(engine, job)
            assert refused.value.status == 500 and "name" not in refused.value.message
            assert await collect(engine, job)
            health = []
            for _ in range(3):
                health.append(engine.healthy)
                with pytest.raises(Refusal):
                    await collect(engine, job)
            health.append(engine.healthy)
            assert await collect(engine, job)
            assert [*health, engine.healthy] == [True, True, True, False, True]  # not after three in a row

    asyncio.run(asyncio.wait_for(run(), 30))
    assert "ValueError at" in caplog.text and "patient" not in caplog.text


@pytest.mark.parametrize("broken", [False, True])
def test_requests_that_cannot_be_answered_do_not_take_the_server_down(job: Job, broken: bool) -> None:
    scripted = Scripted(*[ValueError()] * 4)
    probes: list[int] = []

    def probe() -> None:
        probes.append(len(scripted.batches))
        if broken:
            raise RuntimeError

    async def run() -> None:
        async with serving(scripted) as engine:
            engine.probe = probe
            for _ in range(4):
                with pytest.raises(Refusal):
                    await collect(engine, job)
                await asyncio.sleep(0.05)
            assert engine.healthy is not broken
            assert probes == ([3, 4] if broken else [3])

    asyncio.run(asyncio.wait_for(run(), 30))


def test_what_was_answered_before_a_failure_stays_answered(job: Job) -> None:
    class Half:
        def run(self, requests: Sequence[Request], tell: Tell) -> None:
            tell([(requests[0], Piece("a")), (requests[0], Done("stop", 1)), (requests[1], Piece("b"))])
            raise ValueError

    async def run() -> None:
        async with serving(Half(), max_batch=2, max_wait=1.0) as engine:
            first, second = await asyncio.gather(collect(engine, job), collect(engine, job), return_exceptions=True)
            assert isinstance(first, list) and text_of(first) == "a"
            assert isinstance(second, Refusal) and second.status == 500

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_request_that_was_in_preparation_when_the_engine_stopped_is_told(job: Job) -> None:
    async def run() -> None:
        async with serving(Scripted(), max_wait=5.0) as engine:
            with engine.place(30) as place:
                gathered = asyncio.ensure_future(collect(engine, job))
                await asyncio.sleep(0.02)
                engine.stop()
                for events in (engine.events(job, place).__anext__(), gathered):
                    with pytest.raises(Refusal, match="stopping"):
                        await asyncio.wait_for(events, 5)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_stopped_engine_ends_what_runs_and_refuses_the_rest(job: Job) -> None:
    scripted = Scripted(held=True)

    async def run() -> None:
        async with serving(scripted, max_batch=1) as engine:
            tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(collect(engine, job, 3.0)) for _ in range(2)]
            await asyncio.to_thread(scripted.begun.wait)
            engine.stop()
            assert not engine.healthy
            with pytest.raises(Refusal, match="stopping"):
                await collect(engine, job)
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(refusal, "code", "") for refusal in told] == ["stopping", "stopping"]

    asyncio.run(asyncio.wait_for(run(), 30))
