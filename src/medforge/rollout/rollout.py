"""A release on its way: canary, promotion, or back. Each act can be killed anywhere and started again.

What has been done is read from the cluster, and from there the act goes on: the canary's InferenceService is made first
and removed last, so that as long as it is there, something is left to be promoted or rolled back.

The gateways read routing.json within `settle_seconds` after it was changed (a kubelet brings a ConfigMap to its pods
within its sync period and its cache's time, a minute each by default). So nothing that a gateway may still use is
changed or removed before that time is over.

An entry of the decision log is written before its act, so that no act is without one: of an act that was killed and
started again it may stand twice. Only taking callers away from a bad canary waits for no log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from medforge.release.promote import promote as promote_channel
from medforge.release.publish import read_channel, resolve
from medforge.rollout.checks import check_release
from medforge.rollout.kubernetes import INFERENCE_SERVICES, ApiError, Kubernetes, Object
from medforge.rollout.log import Log
from medforge.rollout.routing import Place, Routing, RoutingMap, candidate_url
from medforge.rollout.services import (
    BACK_FROM,
    PREVIOUS,
    RUN,
    canary_of,
    check_managed,
    checks_itself,
    release_of,
    with_release,
)
from medforge.rollout.waiting import NotReadyError, Waiting
from medforge.rollout.watch import CanaryError, Patience, Prometheus, watch
from medforge.storage import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_TRIES = 5
_print = partial(print, flush=True)  # a line of a pod's log comes when it is so


@dataclass(frozen=True)
class Plan:
    """What an installation is called, and how long its parts may take, in seconds."""

    name: str = "medforge"
    channel: str = "champion"
    ready_seconds: float = 1800.0
    settle_seconds: float = 130.0
    poll_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not (0 <= self.ready_seconds < inf and 0 <= self.settle_seconds < inf and 0 < self.poll_seconds < inf):
            raise ValueError(
                f"the rollout's times make no sense: {self.ready_seconds:g} s to become ready, "
                f"{self.settle_seconds:g} s to settle, a look each {self.poll_seconds:g} s"
            )


class Rollout:
    """The rollout of one installation. `by` says who acts, `run` names the run that a canary belongs to."""

    def __init__(
        self,
        api: Kubernetes,
        store: Store,
        plan: Plan,
        trusted: list[Ed25519PublicKey],
        by: str,
        run: str = "",
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = _print,
    ) -> None:
        self._api, self._store, self._plan, self._trusted = api, store, plan, trusted
        self._by, self._run, self._now, self._say = by, run or by, now, say
        self._stable_name, self._canary_name = f"{plan.name}-stable", f"{plan.name}-canary"
        self._map = RoutingMap(api, plan.name, self._run, now)
        self._wait = Waiting(api, self._map, plan.poll_seconds, now, sleep, say)

    def deploy(self, release: str, share: float) -> str:
        """Give `share` (0–1) of the callers the release, a digest or channel, as a canary. Returns its digest.

        Done again, it goes on where it was, or changes the share. ValueError says why it cannot be; what was begun is
        then removed, unless callers have been given the canary already.
        """
        if not 0 < share <= 1:
            raise ValueError(f"the canary's share is {share:.0%}; more than 0 % and at most 100 % is expected")
        stable = self._stable()
        bucket, served = release_of(stable)
        digest = resolve(self._store, bucket, release)
        if begun := _annotation(stable, BACK_FROM):
            raise ValueError(f"the rollback of {begun[:12]} was interrupted; `medforge rollout rollback` finishes it")
        if digest == served:
            canary = self._canary()
            if canary is not None and release_of(canary)[1] == digest:
                raise ValueError(
                    f"the promotion of {digest[:12]} was interrupted; `medforge rollout promote` finishes it, "
                    "`medforge rollout rollback` goes back"
                )
            self._say(f"{digest[:12]} is what {self._stable_name} serves already; there is nothing to deploy")
            return digest
        check_release(self._store, bucket, digest, self._trusted, every_byte=not checks_itself(stable))
        self._say(f"{digest[:12]} is whole, passed its policy, and was approved")
        with self._map.held():
            url = candidate_url(
                self._map.read().stable.url, f"{self._stable_name}-predictor", f"{self._canary_name}-predictor"
            )
            self._make_canary(self._stable(), digest)
            self._await_canary(digest)
            before = self._map.read()
            wanted = replace(before, candidate=Place(url, digest), weight=round(share, 6))
            if before != wanted:
                self._note("weight", digest, weight=wanted.weight, before=before.weight)
                self._map.write(lambda routing: replace(routing, candidate=wanted.candidate, weight=wanted.weight))
        self._say(f"{digest[:12]} is given to {share:.1%} of the callers")
        return digest

    def watch(self, prometheus: Prometheus, patience: Patience) -> dict[str, float]:
        """Watch the canary, and roll it back when it is not good. Returns what was seen; CanaryError if rolled back."""
        with self._map.held():
            self._check_not_undone()
            digest = self._routed()
            self._note("watch", digest, seconds=patience.seconds, least_requests=patience.least_requests)
            try:
                seen = watch(prometheus, self._api.namespace, self._plan.name, patience, self._wait.pause, self._say)
            except CanaryError as error:
                self._say(f"{digest[:12]} is rolled back: {error}")
                self._undo(reason=str(error))
                raise
            self._note("watched", digest, **seen)
        return seen

    def promote(self, release: str = "") -> str:
        """Give the canary's release to all callers, and let the channel name it. Returns its digest.

        `release`, where it is given, has to be the canary's. If the stable service does not become ready with it, all
        is rolled back, and ValueError says why.
        """
        stable, canary = self._stable(), self._canary()
        bucket, served = release_of(stable)
        wanted = resolve(self._store, bucket, release) if release else ""
        if canary is None:
            if wanted and wanted == served:
                self._say(f"{served[:12]} is promoted already")
                return served
            raise ValueError("there is no canary to promote; `medforge deploy RELEASE --canary 10` makes one")
        _, digest = release_of(canary)
        if wanted not in ("", digest):
            raise ValueError(
                f"the canary is of release {digest[:12]}, not {wanted[:12]}; look at `medforge rollout status`"
            )
        check_release(self._store, bucket, digest, self._trusted)
        with self._map.held():
            if digest != served:
                self._routed()
                if missing := self._wait.missing(self._canary_name, digest):
                    raise ValueError(f"the canary is not ready, so it is not promoted: {missing}")
                # while its pods are replaced, the stable Service answers with either release
                self._note("promoting", digest, before=served)
                self._any_stable()
                self._note("stable", digest, before=served)
                self._set_stable(served, digest, {PREVIOUS: served})
            try:
                self._wait.until_ready(self._stable_name, digest, self._plan.ready_seconds)
            except NotReadyError as error:
                self._undo(reason=str(error))
                raise ValueError(f"rolled back, as {self._stable_name} did not become ready: {error}") from None
            self._map.write(lambda routing: Routing(Place(routing.stable.url, digest), None, 0.0))
            promote_channel(self._store, bucket, digest, self._plan.channel, self._trusted, self._now())
            self._note("promoted", digest, channel=self._plan.channel)
            self._wait.settle(self._plan.settle_seconds, "no gateway asks the canary")
            self._api.delete(INFERENCE_SERVICES, self._canary_name)
        self._say(f"{digest[:12]} is given to all callers; {self._plan.channel} names it")
        return digest

    def rollback(self, reason: str, only_run: str = "", release: str = "") -> str:
        """Take the canary away; without one, give the stable service the release that it had before its promotion.

        Another rollout that is under way is stopped. `release`, where it is given, has to be what is taken back: a
        digest or 6 and more of its first characters. Without it a rollback that follows another takes back nothing: who
        says it twice means the same release. With `only_run` nothing is done unless a canary of that run is there.
        Returns the digest that was taken back, "" if none was.
        """
        if release and not re.fullmatch(r"[0-9a-f]{6,64}", release):
            raise ValueError(f"{release!r} is no digest, nor 6 or more of its first characters")
        if only_run:
            canary = self._canary()
            if canary is None or (canary["metadata"].get("annotations") or {}).get(RUN) != only_run:
                return ""
        with self._map.held(force=True):
            return self._undo(reason, release, asked=True)

    def status(self) -> dict[str, Any]:
        """What is served and tried now: {stable, canary, routing, holder, log, problem}."""
        stable, canary = self._stable(), self._canary()
        bucket, _ = release_of(stable)
        told: dict[str, Any] = {"holder": self._map.holder(), "routing": self._map.read().document(), "canary": None}
        for track, service in (("stable", stable), ("canary", canary)):
            if service is not None:
                _, digest = release_of(service)
                missing = self._wait.missing(service["metadata"]["name"], digest)
                told[track] = {"release": digest, "ready": not missing, "missing": missing}
        told["stable"]["previous"] = _annotation(stable, PREVIOUS)
        told["log"], told["problem"] = self._log(bucket).entries()
        return told

    def _undo(self, reason: str, release: str = "", asked: bool = False) -> str:
        """Roll back; the lock is held. What cannot be written to the log is told when all is done."""
        stable, canary = self._stable(), self._canary()
        bucket, served = release_of(stable)
        routing = self._map.read()
        tried = release_of(canary)[1] if canary else routing.candidate.release if routing.candidate else ""
        previous = _annotation(stable, PREVIOUS)
        if previous == served:  # it was gone back to; a Helm upgrade in between holds the annotation fast
            previous = ""
        if begun := _annotation(stable, BACK_FROM):  # by a rollback that was killed
            served, previous, tried = begun, served, tried or begun
        unlogged: list[str] = []

        def note(event: str, digest: str, **detail: Any) -> None:
            try:
                self._note(event, digest, **detail)
            except ValueError as error:  # a store that is away must not keep a bad release in front of callers
                unlogged.append(f"{event}: {error}")

        back = served == tried or (not tried and not canary and bool(previous))
        taken = served if back else tried
        if release and not (taken and taken.startswith(release)):
            raise ValueError(
                f"{taken[:12] or 'nothing'} would be rolled back, not {release}; `medforge rollout status`"
            )
        if asked and not release and not tried and taken and self._last_event(bucket) == "rolled-back":
            self._say(f"the last rollback is done; `medforge rollout rollback {taken[:12]}` takes back that one too")
            return ""
        if back and not previous:
            raise ValueError(f"{self._stable_name} names no release before {served[:12]} to go back to; deploy another")
        if routing.candidate is not None or routing.weight:
            self._map.write(lambda routing: Routing(routing.stable, None, 0.0))
            note("weight", tried or served, weight=0.0, before=routing.weight, reason=reason)
        if back:
            self._back(bucket, served, previous, reason, note)
        elif not self._wait.missing(self._stable_name, served):
            self._map.write(lambda routing: replace(routing, stable=Place(routing.stable.url, served)))
        left = previous if back else served
        if taken:
            note("rolled-back", taken, reason=reason, stable=left)
        if canary is not None:
            self._wait.settle(self._plan.settle_seconds, "no gateway asks the canary")
            self._api.delete(INFERENCE_SERVICES, self._canary_name)
        if back:
            self._set_stable(previous, previous, {})
        if taken:
            self._say(f"{taken[:12]} is rolled back; {left[:12]} is given to all callers")
        if unlogged:
            raise ValueError(f"rolled back, but the decision log could not be written: {'; '.join(unlogged)}")
        return taken

    def _back(self, bucket: str, served: str, previous: str, reason: str, note: Callable[..., None]) -> None:
        """The stable service to the release before."""
        check_release(self._store, bucket, previous, self._trusted)
        self._any_stable()
        note("stable", previous, before=served, reason=reason)
        self._set_stable(served, previous, {BACK_FROM: served})
        self._wait.until_ready(self._stable_name, previous, self._plan.ready_seconds)
        self._map.write(lambda routing: replace(routing, stable=Place(routing.stable.url, previous)))
        named = read_channel(self._store, bucket, self._plan.channel)
        if named is not None and named["release"] == served:
            promote_channel(self._store, bucket, previous, self._plan.channel, self._trusted, self._now())

    def _stable(self) -> Object:
        found = self._api.get(INFERENCE_SERVICES, self._stable_name)
        if found is None:
            raise ValueError(
                f"there is no InferenceService {self._stable_name} in namespace {self._api.namespace}: install the "
                "chart with stable.release set to an approved release first, or say --namespace and --name"
            )
        check_managed(found)
        return found

    def _canary(self) -> Object | None:
        return self._api.get(INFERENCE_SERVICES, self._canary_name)

    def _routed(self) -> str:
        """The canary's digest; ValueError unless some callers are given it."""
        canary, routing = self._canary(), self._map.read()
        if canary is None or routing.candidate is None or not routing.weight:
            raise ValueError("no caller is given a canary; `medforge deploy RELEASE --canary 10` gives one to 10 %")
        return release_of(canary)[1]

    def _check_not_undone(self) -> None:
        """CanaryError if this run's canary was rolled back already: a watch that is tried again tells why once more."""
        bucket, _ = release_of(self._stable())
        entries, _ = self._log(bucket).entries()
        if entries and entries[-1]["event"] == "rolled-back" and entries[-1]["by"] == self._by and not self._canary():
            raise CanaryError(f"{entries[-1]['release'][:12]} was rolled back: {entries[-1]['detail']['reason']}")

    def _last_event(self, bucket: str) -> str:
        """The last entry's of the decision log; "" without one."""
        entries, _ = self._log(bucket).entries()
        return str(entries[-1]["event"]) if entries else ""

    def _make_canary(self, stable: Object, digest: str) -> None:
        there = self._canary()
        if there is not None and there["metadata"].get("deletionTimestamp"):
            raise ValueError(f"{self._canary_name} of a rollout before is still being removed; try again in a moment")
        if there is not None and (other := release_of(there)[1]) != digest:
            raise ValueError(
                f"a canary of release {other[:12]} is there; promote it or roll it back first "
                "(`medforge rollout promote`, `medforge rollout rollback`)"
            )
        if there is None:
            self._note("canary", digest, stable=release_of(stable)[1])
        try:
            self._api.apply(INFERENCE_SERVICES, canary_of(stable, self._canary_name, digest, self._run))
        except ApiError as error:
            if there is None:
                self._note("failed", digest, reason=str(error))
            raise
        if there is None:
            self._say(f"{self._canary_name} is made; it becomes ready when its model is loaded")

    def _await_canary(self, digest: str) -> None:
        try:
            self._wait.until_ready(self._canary_name, digest, self._plan.ready_seconds)
        except NotReadyError as error:
            if self._map.read().candidate is None:
                self._api.delete(INFERENCE_SERVICES, self._canary_name)
                self._note("failed", digest, reason=str(error))
            raise

    def _set_stable(self, expected: str, digest: str, annotations: dict[str, str]) -> None:
        """Let the stable service, which names the release `expected` or names `digest` already, name `digest`."""
        for attempt in range(_TRIES):
            stable = self._stable()
            _, served = release_of(stable)
            if served not in (expected, digest):
                raise ValueError(f"{self._stable_name} has been changed to release {served[:12]} by somebody else")
            wanted = with_release(stable, digest, annotations)
            wanted["metadata"]["resourceVersion"] = stable["metadata"]["resourceVersion"]
            try:
                # force: Helm wrote these fields first; that nobody wrote since is what the resourceVersion says
                self._api.apply(INFERENCE_SERVICES, wanted, force=True)
                return
            except ApiError as error:  # KServe writes the object's status often
                if error.status != 409 or attempt == _TRIES - 1:
                    raise

    def _any_stable(self) -> None:
        """Let the gateways take the stable predictor whatever release it tells; return when they do."""
        self._map.write(lambda routing: replace(routing, stable=Place(routing.stable.url, "")))
        self._wait.settle(self._plan.settle_seconds, "no gateway insists on the release before")

    def _note(self, event: str, digest: str, **detail: Any) -> None:
        bucket, _ = release_of(self._stable())
        self._log(bucket).note(event, digest, **detail)

    def _log(self, bucket: str) -> Log:
        return Log(self._store, bucket, f"{self._api.namespace}/{self._plan.name}", self._by, self._now)


def _annotation(service: Object, name: str) -> str:
    return str((service["metadata"].get("annotations") or {}).get(name, ""))
