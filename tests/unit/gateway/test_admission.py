"""Places at an upstream: never more than there are, a bounded queue, callers in turn, batch last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.gateway.admission import Admission
from serving.gateway.errors import GatewayError
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, ClientClass, Context
from serving.gateway.settings import Settings


def context(caller: str = "a", kind: ClientClass = "system", seconds: float = 10.0) -> Context:
    return Context("r", Caller(caller, caller, kind, frozenset()), time.monotonic() + seconds)


def admission(places: int = 1, queue: int = 10, seconds: float = 5.0) -> Admission:
    settings = Settings(_env_file=None, concurrency=places, queue=queue, queue_seconds=seconds)
    return Admission(settings, Metrics())


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def order(gate: Admission, contexts: list[Context]) -> list[str]:
    """Who gets the one place, in turn, when all come while it is taken."""
    served: list[str] = []

    async def ask(one: Context) -> None:
        async with gate.place(one):
            served.append(one.caller.id)
            await asyncio.sleep(0)

    async with gate.place(context("first")):
        tasks = []
        for one in contexts:
            tasks.append(asyncio.create_task(ask(one)))
            await settle()
    await asyncio.gather(*tasks)
    return served


def test_never_more_than_there_are_places() -> None:
    async def test() -> None:
        gate = admission(places=3, queue=100)
        now = most = 0

        async def ask() -> None:
            nonlocal now, most
            async with gate.place(context()):
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.001)
                now -= 1

        await asyncio.gather(*(ask() for _ in range(50)))
        assert (most, now) == (3, 0)
        assert gate._taken == gate._waiting == 0

    run(test)


def test_a_full_queue_refuses_with_503_and_when_to_come_again() -> None:
    async def test() -> None:
        gate = admission(places=1, queue=2)
        async with gate.place(context()):
            waiting = [asyncio.create_task(order_one(gate)) for _ in range(2)]
            await settle()
            with pytest.raises(GatewayError) as caught:
                async with gate.place(context()):
                    pass
            assert (caught.value.status, caught.value.code) == (503, "overloaded")
            assert float(caught.value.headers()["retry-after"]) >= 1
        await asyncio.gather(*waiting)

    async def order_one(gate: Admission) -> None:
        async with gate.place(context()):
            pass

    run(test)


def test_callers_take_turns() -> None:
    async def test() -> None:
        contexts = [context("greedy") for _ in range(4)] + [context("b"), context("c")]
        assert await order(admission(), contexts) == ["greedy", "b", "c", "greedy", "greedy", "greedy"]

    run(test)


def test_batch_callers_come_after_the_others() -> None:
    async def test() -> None:
        contexts = [context("job", "batch"), context("job", "batch"), context("a"), context("b", "page")]
        assert await order(admission(), contexts) == ["a", "b", "job", "job"]

    run(test)


def test_in_a_full_queue_the_greediest_gives_way_and_batch_before_all() -> None:
    async def ask(gate: Admission, one: Context, outcome: list[str]) -> None:
        try:
            async with gate.place(one):
                outcome.append(f"{one.caller.id} served")
        except GatewayError as error:
            outcome.append(f"{one.caller.id} {error.status}")

    async def test() -> None:
        for first, second, expected in (
            (context("greedy"), context("b"), ["greedy 503", "b served", "greedy served"]),
            (context("job", "batch"), context("b"), ["job 503", "b served", "job served"]),
            (context("b"), context("job", "batch"), ["job 503", "b served", "b served"]),
        ):
            gate = admission(queue=2)
            outcome: list[str] = []
            async with gate.place(context("first")):
                tasks = []
                for one in (first, first, second):
                    tasks.append(asyncio.create_task(ask(gate, one, outcome)))
                    await settle()
            await asyncio.gather(*tasks)
            assert sorted(outcome) == sorted(expected)

    run(test)


def test_who_waits_too_long_is_refused_and_leaves_the_queue() -> None:
    async def test() -> None:
        gate = admission(seconds=0.05)
        async with gate.place(context()):
            with pytest.raises(GatewayError) as caught:
                async with gate.place(context()):
                    pass
            assert caught.value.status == 503
            assert gate._waiting == 0
            with pytest.raises(GatewayError) as caught:  # the deadline is nearer than the queue's limit
                async with gate.place(context(seconds=0.02)):
                    pass
            assert (caught.value.status, caught.value.code) == (504, "deadline")
        async with gate.place(context()):
            pass

    run(test)


def test_a_deadline_that_is_over_takes_no_place() -> None:
    async def test() -> None:
        gate = admission()
        with pytest.raises(GatewayError) as caught:
            async with gate.place(context(seconds=-1)):
                pass
        assert caught.value.status == 504
        assert gate._taken == 0

    run(test)


def test_a_place_given_to_one_that_is_cancelled_in_the_same_moment_is_not_lost() -> None:
    async def test() -> None:
        gate = admission()
        entered = []

        async def ask(name: str) -> None:
            async with gate.place(context(name)):
                entered.append(name)

        holder = gate.place(context())
        await holder.__aenter__()
        first, second = asyncio.create_task(ask("first")), asyncio.create_task(ask("second"))
        await settle()
        await holder.__aexit__(None, None, None)  # the first is given the place …
        first.cancel()  # … and goes before it could take it
        await asyncio.gather(first, second, return_exceptions=True)
        assert entered == ["second"]
        assert gate._taken == gate._waiting == 0

    run(test)


def test_any_cancellations_leave_all_places_free() -> None:
    async def test() -> None:
        gate = admission(places=2, queue=40)

        async def ask(number: int) -> None:
            async with gate.place(context(str(number % 5))):
                await asyncio.sleep(0.002)

        tasks = [asyncio.create_task(ask(number)) for number in range(40)]
        for number, task in enumerate(tasks):
            await asyncio.sleep(0.0005)
            if number % 3:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate._taken == gate._waiting == 0

    run(test)
