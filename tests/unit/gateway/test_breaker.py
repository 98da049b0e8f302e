"""The circuit breaker and the budget of retries, by a clock that the test turns."""

from __future__ import annotations

from serving.gateway.breaker import Breaker
from serving.gateway.retries import RetryBudget, backoff


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def state(breaker: Breaker) -> str:
    return breaker.state


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(3, 10.0, clock)
    for _ in range(3):
        assert breaker.allow()
        breaker.failure()
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(3, 10.0, Clock())
    for fails in (True, True, False, True, True):  # two, a success, two: never three in a row
        assert breaker.allow()
        (breaker.failure if fails else breaker.success)()
    assert state(breaker) == "closed"
    breaker.failure()
    assert state(breaker) == "open"
    assert not breaker.allow()
    assert breaker.wait == 10.0


def test_one_trial_closes_or_opens_it_again() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.99
    assert not breaker.allow()
    clock.now += 0.01
    assert state(breaker) == "half-open"
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    breaker.failure()
    assert state(breaker) == "open"
    assert breaker.wait == 10.0
    clock.now += 10
    assert breaker.allow()
    breaker.success()
    assert state(breaker) == "closed"
    assert breaker.allow()


def test_a_trial_that_tells_nothing_lets_another_be_the_trial() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.allow()
    assert not breaker.allow()
    breaker.abandon()
    assert state(breaker) == "half-open"
    assert breaker.allow()


def test_one_failure_after_recovery_does_not_open_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    assert breaker.allow()
    breaker.success()
    breaker.failure()
    assert state(breaker) == "closed"


def test_retries_are_a_share_of_requests() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, clock)
    while budget.withdraw():  # the reserve
        pass
    made = 0
    for _ in range(1000):  # every request fails, and none of them takes time
        budget.deposit()
        made += budget.withdraw()
    assert 99 <= made <= 100


def test_an_idle_gateway_saves_a_few_retries() -> None:
    clock = Clock()
    budget = RetryBudget(0.1, clock)
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    clock.now += 1000
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]


def test_a_share_of_nothing_allows_nothing() -> None:
    clock = Clock()
    budget = RetryBudget(0.0, clock)
    clock.now += 1000
    budget.deposit()
    assert not budget.withdraw()


def test_the_wait_doubles_up_to_two_seconds_and_is_drawn_at_random() -> None:
    assert [backoff(number, lambda low, high: high) for number in range(1, 7)] == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert len({backoff(3) for _ in range(50)}) > 40
    assert all(0 <= backoff(3) <= 0.8 for _ in range(200))
