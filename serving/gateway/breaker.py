"""A circuit breaker: an upstream that keeps failing is left alone for a while, then tried with one request.

Nygard, Release It! (2018), chapter 5: closed → open after `failures` in a row → half-open after `seconds` → closed if
the one trial succeeds, open again if it fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """For one event loop: no locks. Every `allow()` that is true is followed by `success`, `failure` or `abandon`."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = failures, seconds, clock
        self._failures = 0
        self._opened: float | None = None
        self._trial = False

    @property
    def state(self) -> State:
        """Closed (all pass), open (none do), half-open (one does)."""
        if self._opened is None:
            return "closed"
        return "half-open" if self._clock() - self._opened >= self._seconds else "open"

    @property
    def wait(self) -> float:
        """Seconds until a request may pass; 0 if one may now."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._seconds - self._clock())

    def allow(self) -> bool:
        """Whether a request may go now. In a half-open circuit the first one may, as the trial."""
        state = self.state
        if state == "half-open" and not self._trial:
            self._trial = True
            return True
        return state == "closed"

    def success(self) -> None:
        """A request was answered: the circuit closes."""
        self._failures, self._opened, self._trial = 0, None, False

    def failure(self) -> None:
        """A request failed by the upstream's fault."""
        self._failures += 1
        if self._trial or (self._opened is None and self._failures >= self._limit):
            self._opened, self._trial = self._clock(), False

    def abandon(self) -> None:
        """A request ended without telling anything of the upstream (its client has gone): another may be the trial."""
        self._trial = False
