"""Waiting in a rollout: for a service to serve its release, and for gateways to read their routing; under its lock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from medforge.rollout.kubernetes import DEPLOYMENTS, INFERENCE_SERVICES, ApiError, Kubernetes
from medforge.rollout.routing import RoutingMap
from medforge.rollout.services import wanting


class NotReadyError(ValueError):
    """A service does not serve its release with all of its pods in time."""


class Waiting:
    """Waits `poll` seconds between two looks, and holds the lock meanwhile."""

    def __init__(
        self,
        api: Kubernetes,
        lock: RoutingMap,
        poll: float,
        now: Callable[[], datetime],
        sleep: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        self._api, self._lock, self._poll, self._now, self._sleep, self._say = api, lock, poll, now, sleep, say

    def missing(self, name: str, digest: str) -> str:
        """Why a service does not serve the release with all its pods; "" if it does."""
        service = self._api.get(INFERENCE_SERVICES, name)
        if service is None:
            return f"{name} is gone"
        return wanting(service, self._api.get(DEPLOYMENTS, f"{name}-predictor"), digest)

    def until_ready(self, name: str, digest: str, seconds: float) -> None:
        """Return when the service serves the release. NotReadyError when it takes too long, with what Kubernetes tells.

        An API server that is away for a while is asked again; ApiError if it still is at the end.
        """
        end = self._now().timestamp() + seconds
        before = ""
        while True:
            away: ApiError | None = None
            try:
                missing = self.missing(name, digest)
            except ApiError as error:
                if not error.passes:
                    raise
                away, missing = error, str(error)
            if not missing:
                return
            if missing != before:
                self._say(f"{name}: {missing}")
                before = missing
            if self._now().timestamp() >= end:
                if away is not None:
                    raise away
                raise NotReadyError(
                    f"{name} is not ready with {digest[:12]} after {seconds:.0f} s: {missing}{self._events(name)}"
                )
            self.pause(self._poll)

    def settle(self, seconds: float, until: str) -> None:
        """Wait so long, until what `until` says is so."""
        if seconds:
            self._say(f"waiting {seconds:.0f} s, until {until}")
        end = self._now().timestamp() + seconds
        while (left := end - self._now().timestamp()) > 0:
            self.pause(min(left, self._poll))

    def pause(self, seconds: float) -> None:
        """Wait, and hold the lock. LockedError if another rollout has taken it."""
        self._sleep(seconds)
        self._lock.renew()

    def _events(self, name: str) -> str:
        """What Kubernetes warns of, a line each."""
        try:
            events = self._api.events(name)
        except ApiError as error:
            events = [f"its events cannot be read ({error.status})"]
        return "".join(f"\n  {line}" for line in events)
