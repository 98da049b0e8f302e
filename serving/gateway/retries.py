"""How often, and when, a request is tried again: within a budget, so that retries never double an overload.

The budget is Finagle's (Twitter, RetryBudget): each request pays in a share of a retry, each retry takes a
whole one; a small reserve grows with time, so that a gateway with little to do may retry too. The wait is the full
jitter of Brooker, "Exponential backoff and jitter" (AWS, 2015).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

_RESERVE = 3.0  # retries that are saved up while nothing happens …
_RESERVE_SECONDS = 5.0  # … one in so many seconds
_MOST = 20.0  # what a busy gateway may save up
_FIRST, _LONGEST = 0.1, 2.0  # seconds


class RetryBudget:
    """For one event loop. `share` of requests may be retries; 0 allows none."""

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._clock = share, clock
        self._saved = _RESERVE if share else 0.0
        self._then = clock()

    def deposit(self) -> None:
        """A request has come."""
        self._saved = min(_MOST, self._saved + self._share)

    def withdraw(self) -> bool:
        """Whether a retry may be made now; it is then paid."""
        now = self._clock()
        if self._share and self._saved < _RESERVE:
            self._saved = min(_RESERVE, self._saved + (now - self._then) / _RESERVE_SECONDS)
        self._then = now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


def backoff(attempt: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds to wait before attempt `attempt` (1 for the first retry)."""
    return uniform(0, min(_LONGEST, _FIRST * 2 ** (attempt - 1) * 2))
