"""The steps that bring a release to a cluster by way of a canary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medforge.steps.common import Metrics, log

MOST_WATCHES = 4  # times the minutes that are wanted, while too few requests come


def deploy(release: str, percent: int, namespace: str, name: str, run: str) -> str:
    """Give `percent` of the callers the release as a canary. Returns its digest. `run` names whose canary it is."""
    with _rollout(namespace, name, "champion", run) as rollout:
        return rollout.deploy(release, percent / 100)


def watch(namespace: str, name: str, run: str, minutes: float, requests: int, metrics: Metrics) -> None:
    """Watch the canary for so long, until so many requests came; roll it back and fail when it is not good."""
    import os

    from medforge.rollout.watch import Patience, Prometheus

    prometheus = Prometheus.from_environment(os.environ)
    with _rollout(namespace, name, "champion", run) as rollout:
        seen = rollout.watch(prometheus, Patience(minutes * 60, MOST_WATCHES * minutes * 60, requests))
    log(metrics, seen)


def complete(release: str, namespace: str, name: str, run: str, channel: str) -> None:
    """Give the canary's release to all callers, and let the channel name it."""
    with _rollout(namespace, name, channel, run) as rollout:
        rollout.promote(release)


def rollback(canary: int, state: str, namespace: str, name: str, run: str, channel: str) -> None:
    """After a release that failed, remove its canary if it left one; nothing without a canary."""
    if canary and state != "SUCCEEDED":
        with _rollout(namespace, name, channel, run) as rollout:
            taken = rollout.rollback(f"the release pipeline ended as {state}", only_run=run)
        print(f"rolled back {taken}" if taken else "no canary of this run is there", flush=True)


@contextmanager
def _rollout(namespace: str, name: str, channel: str, run: str) -> Iterator[Any]:
    from medforge.release.promote import trusted_keys
    from medforge.rollout.kubernetes import Kubernetes
    from medforge.rollout.rollout import Plan, Rollout
    from medforge.storage import connect

    api = Kubernetes.from_environment(namespace)
    with connect(create=False) as store:
        yield Rollout(api, store, Plan(name=name, channel=channel), trusted_keys(), f"pipeline {run}", run)
