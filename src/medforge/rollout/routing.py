"""The gateways' routing.json in the ConfigMap <name>-routing, and the lock of a rollout, which is kept on it too.

Every write is a server-side apply that bears the resourceVersion that was read: of two writers one is refused. The
lock is a pair of annotations (who, until when), so that a rollout needs no right beyond this one ConfigMap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from medforge.rollout.kubernetes import CONFIG_MAPS, ApiError, Kubernetes, Object

KEY = "routing.json"
HOLDER, UNTIL = "medforge.io/rollout-holder", "medforge.io/rollout-until"
LOCK_SECONDS = 120  # a rollout that was killed holds the lock no longer than this
_TRIES = 5


class LockedError(ValueError):
    """Another rollout is under way, or has taken over."""


@dataclass(frozen=True)
class Place:
    """A predictor as the gateway knows it: base URL, and digest of its release ("" if it may be any)."""

    url: str
    release: str


@dataclass(frozen=True)
class Routing:
    """What routing.json says; `weight` is the share (0–1) of callers who are given the candidate."""

    stable: Place
    candidate: Place | None
    weight: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "stable": vars(self.stable),
            "candidate": self.candidate and vars(self.candidate),
            "weight": self.weight,
        }


def parse(text: str, where: str) -> Routing:
    """The routing in a text; ValueError if it is none."""
    try:
        document = json.loads(text)
        candidate = document.get("candidate")
        return Routing(
            Place(str(document["stable"]["url"]), str(document["stable"].get("release", ""))),
            Place(str(candidate["url"]), str(candidate.get("release", ""))) if candidate else None,
            float(document.get("weight", 0)),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: is no routing ({type(error).__name__}: {error})") from None


def candidate_url(stable: str, stable_service: str, candidate_service: str) -> str:
    """The candidate's URL: the stable predictor's at the candidate's Service. ValueError if it cannot be told."""
    host = urlsplit(stable).netloc
    if host.split(".")[0].split(":")[0] != stable_service:
        raise ValueError(
            f"the routing's stable url is {stable!r}; a rollout needs it at the Service {stable_service}, such as "
            f"http://{stable_service}.<namespace>.svc.cluster.local/openai/v1"
        )
    return stable.replace(host, host.replace(stable_service, candidate_service, 1), 1)


class RoutingMap:
    """The ConfigMap. `holder` says whose rollout this is; `now` is the time, with its zone."""

    def __init__(self, api: Kubernetes, name: str, holder: str, now: Callable[[], datetime]) -> None:
        self._api, self.name, self._holder, self._now = api, f"{name}-routing", holder, now
        self._held_until: datetime | None = None

    def read(self) -> Routing:
        """What it says now."""
        return self._routing(self._get())

    def holder(self) -> str:
        """Who has the lock; "" if nobody."""
        holder, until = self._lock(self._get())
        return holder if until > self._now() else ""

    @contextmanager
    def held(self, force: bool = False) -> Iterator[None]:
        """Hold the lock in the block. LockedError if another rollout has it, unless it is taken by `force`."""
        self._apply(lambda routing: routing, take=True, force=force)
        try:
            yield
        except BaseException:
            with suppress(ValueError):  # what went wrong in the block is told; the lock ends by itself
                self._apply(lambda routing: routing, keep=False)
            raise
        self._apply(lambda routing: routing, keep=False)

    def renew(self) -> None:
        """Hold it for longer; to be called now and then by what takes its time. LockedError if it was taken."""
        assert self._held_until is not None, "held() comes first"
        if self._held_until - self._now() < timedelta(seconds=LOCK_SECONDS / 2):
            try:
                self._apply(lambda routing: routing)
            except ApiError as error:
                # it is ours for as long as nobody else took it, which the next write is told
                if not error.passes:
                    raise

    def write(self, change: Callable[[Routing], Routing]) -> Routing:
        """Change what it says; returns that. LockedError if another rollout has taken the lock."""
        return self._apply(change)

    def _apply(
        self, change: Callable[[Routing], Routing], take: bool = False, force: bool = False, keep: bool = True
    ) -> Routing:
        for attempt in range(_TRIES):
            found = self._get()
            holder, until = self._lock(found)
            mine = holder == self._holder
            if not mine and not force and (not take or until > self._now()):
                if take:
                    raise LockedError(
                        f"a rollout by {holder} is under way; if it was killed, try again after {until:%H:%M:%S} UTC"
                    )
                raise LockedError(
                    f"this rollout was taken over by {holder or 'another one'}; `medforge rollout status`"
                )
            routing = change(self._routing(found))
            until = self._now() + timedelta(seconds=LOCK_SECONDS)
            lock = {HOLDER: self._holder, UNTIL: until.isoformat(timespec="seconds")} if keep else {}
            wanted = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": self.name,
                    "namespace": self._api.namespace,
                    "resourceVersion": found["metadata"]["resourceVersion"],
                    "annotations": lock,
                },
                "data": {KEY: json.dumps(routing.document(), indent=2) + "\n"},
            }
            try:
                # force: Helm wrote it first; that nobody wrote since is what the resourceVersion says
                self._api.apply(CONFIG_MAPS, wanted, force=True)
            except ApiError as error:
                if error.status != 409 or attempt == _TRIES - 1:
                    raise
                continue
            self._held_until = until
            return routing
        raise AssertionError("the last attempt returns or raises")

    def _get(self) -> Object:
        found = self._api.get(CONFIG_MAPS, self.name)
        if found is None:
            raise ValueError(
                f"there is no ConfigMap {self.name} in namespace {self._api.namespace}: install the chart first, or "
                "say --namespace and --name"
            )
        return found

    def _routing(self, found: Object) -> Routing:
        where = f"ConfigMap {self.name}, {KEY}"
        data = found.get("data") or {}
        if KEY not in data:
            raise ValueError(f"{where}: is missing; `helm upgrade` writes it")
        return parse(data[KEY], where)

    def _lock(self, found: Object) -> tuple[str, datetime]:
        """Who has the lock and until when; ("", long ago) if nobody."""
        from datetime import timezone

        annotations = found["metadata"].get("annotations") or {}
        long_ago = datetime(1970, 1, 1, tzinfo=timezone.utc)
        try:
            until = datetime.fromisoformat(annotations.get(UNTIL, ""))
        except ValueError:
            until = long_ago
        return annotations.get(HOLDER, ""), until if until.tzinfo else long_ago
