"""A rollout that is done twice, taken over, cut off from the API server, or told by machines with different clocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from medforge.release.publish import point, read_release
from medforge.rollout.kubeconfig import Cluster as Connection
from medforge.rollout.kubernetes import ApiError, Kubernetes
from medforge.rollout.log import Log
from medforge.rollout.rollout import Plan
from medforge.rollout.routing import LockedError
from medforge.rollout.watch import Patience, Prometheus
from medforge.storage import Store
from tests.integration.rollout.cluster import NAMESPACE, TOKEN
from tests.integration.rollout.conftest import NOW, Killed, Site, killed_at, place, state


@contextmanager
def unreachable(when: Callable[[], bool], status: int = 0) -> Iterator[None]:
    """The API server is away whenever `when` says so."""
    send = Kubernetes._send

    def answer(self: Kubernetes, *given: Any, **more: Any) -> Any:
        if when():
            raise ApiError(status, "the Kubernetes API cannot be reached")
        return send(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kubernetes, "_send", answer)
        yield


def minutes(site: Site, track: str, release: str, first: float, last: float) -> Callable[[], bool]:
    """True from so many minutes after the service of the track names the release, until so many."""
    since: list[Any] = []

    def away() -> bool:
        if not since and site.cluster.release(f"medforge-{track}") == release:
            since.append(site.clock.time)
        return bool(since) and first * 60 <= (site.clock.time - since[0]).total_seconds() < last * 60

    return away


def test_what_did_not_pass_its_policy_is_not_deployed(site: Site, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`medforge gate` and publish refuse it before; a release that was made by hand comes here."""
    new = site.publish(0.8)

    def read(*given: Any) -> Any:
        manifest, verdict = read_release(*given)
        return manifest, verdict | {"passed": False}

    monkeypatch.setattr("medforge.rollout.checks.read_release", read)
    with pytest.raises(ValueError, match=f"release {new[:12]} did not pass its policy"):
        site.rollout().deploy(new, 0.1)
    assert site.cluster.changes == []


def test_a_second_rollback_takes_back_nothing_more_unless_it_names_what(site: Site, old: str) -> None:
    """Two operators see one alert, or one says it again as the first time took long."""
    first, second = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(first, 0.1)
    site.rollout().promote()
    site.rollout().deploy(second, 0.1)
    assert site.rollout().rollback("alarm") == second
    assert site.rollout().rollback("alarm") == ""
    assert f"`medforge rollout rollback {first[:12]}` takes back that one too" in site.clock.said[-1]
    assert state(site)["stable"] == first
    for wrong in (old, second[:12]):
        with pytest.raises(ValueError, match=f"{first[:12]} would be rolled back, not {wrong}"):
            site.rollout().rollback("alarm", release=wrong)
    for wrong in ("champion", first[:5], first.upper()):
        with pytest.raises(ValueError, match="is no digest, nor 6 or more of its first characters"):
            site.rollout().rollback("alarm", release=wrong)
    assert site.rollout().rollback("alarm", release=first[:6]) == first
    assert (state(site)["stable"], state(site)["champion"]) == (old, old)


def test_what_is_rolled_back_can_be_named(site: Site, old: str) -> None:
    new = site.publish(0.8)
    with pytest.raises(ValueError, match=f"nothing would be rolled back, not {new}"):
        site.rollout().rollback("-", release=new)
    site.rollout().deploy(new, 0.1)
    with pytest.raises(ValueError, match=f"{new[:12]} would be rolled back, not {old}"):
        site.rollout().rollback("-", release=old)
    assert state(site)["canary"] == new
    assert site.rollout().rollback("-", release=new) == new


def test_one_that_was_taken_over_leaves_the_next_ones_canary_alone(site: Site, old: str) -> None:
    first, second = site.publish(0.8), site.publish(0.9)
    site.cluster.never_ready.add("medforge-canary")
    begun: list[str] = []

    def meanwhile() -> None:
        if not begun:
            begun.append("now")
            site.rollout(run="run-2").rollback("enough")
            with killed_at(20, False), pytest.raises(Killed):
                site.rollout(run="run-3").deploy(second, 0.1)

    site.clock.then = meanwhile
    with pytest.raises(LockedError, match="this rollout was taken over by run-3"):
        site.rollout(run="run-1").deploy(first, 0.1)
    assert state(site)["canary"] == second
    assert site.events()[-1] == f"canary {second[:6]}"


@pytest.mark.parametrize("act", ["deploy", "promote"])
def test_an_api_server_that_is_away_for_minutes_ends_nothing(site: Site, old: str, act: str) -> None:
    """Longer than the lock is held: it is still ours, as nobody else took it."""
    new = site.publish(0.8)
    site.cluster.looks_until_ready = 5
    if act == "promote":
        site.rollout().deploy(new, 0.1)
    track = "canary" if act == "deploy" else "stable"
    with unreachable(minutes(site, track, new, 0.1, 9), 503 if act == "deploy" else 0):
        if act == "deploy":
            site.rollout().deploy(new, 0.1)
        else:
            site.rollout().promote()
    assert site.cluster.release(f"medforge-{track}") == new
    assert "rolled-back" not in str(site.events())
    assert any("cannot be reached" in line for line in site.clock.said)


def test_a_promotion_that_lost_the_api_server_is_not_taken_back_and_goes_on_when_told(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    with unreachable(minutes(site, "stable", new, 0, 1e9)), pytest.raises(ApiError, match="cannot be reached"):
        site.rollout().promote()
    assert (state(site)["stable"], state(site)["canary"]) == (new, new)
    site.clock.sleep(121)
    with pytest.raises(ValueError, match=f"the promotion of {new[:12]} was interrupted; .*promote` finishes it"):
        site.rollout(run="run-2").deploy(new, 0.2)
    assert site.rollout(run="run-2").promote() == new
    assert state(site) == {
        "stable": new, "canary": None, "champion": new, "holder": {},
        "routing": {"stable": place("stable", new), "candidate": None, "weight": 0.0},
    }  # fmt: skip


def test_what_nobody_could_look_at_in_the_end_is_not_called_bad(site: Site, old: str) -> None:
    """The API server is away until the last look, and there again at once: whether stable is ready is not known."""
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    within, after = minutes(site, "stable", new, 0, 30), minutes(site, "stable", new, 30, 1e9)
    last: list[bool] = []

    def away() -> bool:
        if after():
            last.append(True)
        return within() or 1 <= len(last) <= 2  # the lock and the look

    with unreachable(away), pytest.raises(ApiError, match="cannot be reached"):
        site.rollout().promote()
    assert (state(site)["stable"], state(site)["canary"]) == (new, new)


def test_nobody_is_given_a_canary_with_a_share_of_nothing(site: Site, old: str) -> None:
    site.rollout().deploy(site.publish(0.8), 0.1)
    rollout = site.rollout()
    with rollout._map.held():
        rollout._map.write(lambda routing: replace(routing, weight=0.0))
    with pytest.raises(ValueError, match="no caller is given a canary"):
        site.rollout().promote()


def test_a_promotion_that_was_taken_over_says_so_and_takes_nothing_back(site: Site, old: str) -> None:
    new, next_one = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(new, 0.1)
    site.cluster.never_ready.add("medforge-stable")
    done: list[str] = []

    def meanwhile() -> None:
        if not done and site.cluster.release("medforge-stable") == new:
            done.append("rolled back")
            site.cluster.never_ready.clear()
            site.rollout(run="run-2").rollback("enough")
            site.rollout(run="run-3").deploy(next_one, 0.2)

    site.clock.then = meanwhile
    with pytest.raises(LockedError, match="this rollout was taken over"):
        site.rollout(run="run-1").promote()
    assert (state(site)["stable"], state(site)["canary"], site.cluster.routing["weight"]) == (old, next_one, 0.2)


def test_a_refusal_of_the_api_is_told_at_once(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.cluster.faults.append(("GET", "deployments", 403))
    with pytest.raises(ApiError, match="403"):
        site.rollout().deploy(new, 0.1)
    assert site.clock.said[-1].startswith("medforge-canary is made")


def test_a_watch_goes_on_while_the_api_server_is_away(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)

    class Quiet(Prometheus):
        def __init__(self) -> None:
            pass

        def rules(self) -> list[dict[str, Any]]:
            return [{"name": "A", "labels": {"rollback": "true"}, "health": "ok"}]

        def alerts(self) -> list[dict[str, Any]]:
            return []

        def number(self, query: str) -> float:
            site.clock.time += timedelta(seconds=60)
            return float(site.clock.time - begun > timedelta(seconds=700))

    begun = site.clock.time
    away = lambda: 120 < (site.clock.time - begun).total_seconds() < 600  # noqa: E731
    with unreachable(away):
        seen = site.rollout().watch(Quiet(), Patience(0, 60, 1, 3, 0.02))
    assert seen["looks"] == 12
    assert site.events()[-1] == f"watched {new[:6]}"


def test_a_rollback_that_was_interrupted_comes_before_the_next_canary(site: Site, old: str) -> None:
    new, next_one = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(new, 0.1)
    site.rollout().promote()
    with unreachable(minutes(site, "stable", old, 0, 1e9)), pytest.raises(ApiError):
        site.rollout().rollback("worse")
    site.clock.sleep(121)
    with pytest.raises(ValueError, match=f"the rollback of {new[:12]} was interrupted"):
        site.rollout().deploy(next_one, 0.1)
    assert site.rollout(run="run-2").rollback("worse") == new
    assert site.events()[-1] == f"rolled-back {new[:6]}"
    assert site.rollout().deploy(next_one, 0.1) == next_one


def test_what_is_served_is_not_deployed_while_another_canary_runs(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    assert site.rollout().deploy(old, 0.5) == old
    assert (state(site)["canary"], site.cluster.routing["weight"]) == (new, 0.1)


def test_a_canary_that_is_still_being_removed_is_not_taken_for_one(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.cluster.objects["inferenceservices", "medforge-canary"]["metadata"]["deletionTimestamp"] = (
        "2026-01-02T03:04:05Z"
    )
    with pytest.raises(ValueError, match="medforge-canary of a rollout before is still being removed; try again"):
        site.rollout().deploy(new, 0.2)
    assert site.cluster.routing["weight"] == 0.1


def test_a_canary_that_the_api_refuses_is_told_in_the_log(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.cluster.faults.append(("PATCH", "inferenceservices", 403))
    with pytest.raises(ApiError, match="403"):
        site.rollout().deploy(new, 0.1)
    assert site.events() == [f"canary {new[:6]}", f"failed {new[:6]}"]


def test_entries_of_a_clock_that_is_behind_stay_in_their_order(site: Site, old: str) -> None:
    now = NOW
    log = Log(site.store, site.bucket, "med/medforge", "us", lambda: now)
    for number, seconds in enumerate((0, -3600, 5, 5)):
        now = NOW + timedelta(seconds=seconds)
        log.note("event", "0" * 64, number=number)
    found, problem = log.entries()
    assert ([entry["detail"]["number"] for entry in found], problem) == ([0, 1, 2, 3], "")
    assert [entry["at"] for entry in found] == sorted({entry["at"] for entry in found})


def test_an_entry_that_is_none_any_more_is_told_and_the_others_are_shown(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    key = next(iter(site.store.list(site.bucket, "rollouts/med/medforge"))).key
    site.store.put(site.bucket, key, b"{")
    told = site.rollout().status()
    assert told["problem"] == f"{key}: was changed"
    assert [entry["event"] for entry in told["log"]] == ["weight"]


@pytest.mark.parametrize("times", [{"ready_seconds": float("nan")}, {"settle_seconds": -1.0}, {"poll_seconds": 0.0}])
def test_times_that_make_no_sense_are_refused(times: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the rollout's times make no sense"):
        Plan("medforge", "champion", **times)


def test_a_channel_that_somebody_pointed_elsewhere_is_left_alone(site: Site, old: str) -> None:
    new, other = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(new, 0.1)
    site.rollout().promote()
    point(site.store, site.bucket, "champion", other, NOW)
    assert site.rollout().rollback("-") == new
    assert (state(site)["stable"], state(site)["champion"]) == (old, other)


def test_gateways_insist_on_stables_release_again_when_its_pods_serve_it(site: Site, old: str) -> None:
    """A promotion that was cut off had told them to take any; the pods of stable are in trouble meanwhile."""
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    with unreachable(lambda: not site.cluster.routing["stable"]["release"]), pytest.raises(ApiError):
        site.rollout().promote()
    site.cluster.never_ready.add("medforge-stable")
    assert site.rollout().rollback("-") == new
    assert site.cluster.routing == {"stable": place("stable", ""), "candidate": None, "weight": 0.0}
    site.cluster.never_ready.clear()
    assert site.rollout().rollback("-") == ""
    assert site.cluster.routing == {"stable": place("stable", old), "candidate": None, "weight": 0.0}


def test_a_canary_that_callers_have_is_not_removed_as_it_is_given_to_more(site: Site, old: str) -> None:
    """That is for a rollback, which takes the callers away first."""
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.cluster.never_ready.add("medforge-canary")
    with pytest.raises(ValueError, match="medforge-canary is not ready"):
        site.rollout(ready_seconds=60).deploy(new, 0.5)
    assert (state(site)["canary"], site.cluster.routing["weight"]) == (new, 0.1)


def test_a_canary_that_has_broken_down_is_not_promoted(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.cluster.never_ready.add("medforge-canary")
    with pytest.raises(ValueError, match="the canary is not ready, so it is not promoted: 0 of 1 pods are new"):
        site.rollout().promote()
    assert (state(site)["stable"], state(site)["canary"], site.cluster.routing["weight"]) == (old, new, 0.1)
    assert site.events()[-1] == f"weight {new[:6]}"


def test_the_api_refuses_stumbles_and_is_away(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.cluster.faults.append(("PATCH", "inferenceservices", 403))
    with pytest.raises(ApiError, match=r"medforge-canary: the Kubernetes API answers 403: as the script says; .*Role"):
        site.rollout().deploy(new, 0.1)
    assert state(site)["holder"] == {}
    site.cluster.faults.extend([("PATCH", "configmaps", 409), ("PATCH", "inferenceservices", 500), ("GET", "-", 503)])
    assert site.rollout().deploy(new, 0.1) == new
    site.cluster.faults.extend([("PATCH", "stable", 409), ("PATCH", "configmaps", 409)])
    assert site.rollout().promote() == new
    site.cluster.faults.extend([("GET", "inferenceservices", 500)] * 9)
    with pytest.raises(ApiError, match="answers 500"):
        site.rollout().rollback("-")
    site.cluster.faults.clear()
    site.cluster.before = lambda method, path: None
    wrong = Kubernetes(Connection(site.cluster.url, NAMESPACE, None, lambda: "x"))
    with pytest.raises(ApiError, match=r"401.*not valid"):
        wrong.get("apis/serving.kserve.io/v1beta1/namespaces/{namespace}/inferenceservices", "x")
    with pytest.raises(ApiError, match="is KServe installed"):
        Kubernetes(Connection(site.cluster.url, NAMESPACE, None, lambda: TOKEN)).get("apis/none", "x")
    site.cluster.close()
    with pytest.raises(ApiError, match="the Kubernetes API cannot be reached"):
        site.rollout().rollback("-")


def test_what_others_changed_is_a_conflict(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    canary = {
        "metadata": {"name": "medforge-canary", "namespace": NAMESPACE},
        "spec": {"predictor": {"minReplicas": 3}},
    }
    site.cluster.apply("inferenceservices", canary, "kubectl", True)
    with pytest.raises(ApiError, match=r'conflict with "kubectl": spec.predictor.minReplicas'):
        site.rollout().deploy(new, 0.2)
    assert site.rollout().rollback("-") == new


def test_a_store_that_is_away_does_not_keep_a_bad_release_in_front_of_callers(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.5)
    away = Store("127.0.0.1:9", "abc", "abcdefgh", "us-east-1", False)
    with pytest.raises(ValueError, match=r"rolled back, but the decision log could not be written: weight: .*reached"):
        site.rollout(store=away).rollback("alarm")
    assert state(site)["canary"] is None
    assert state(site)["routing"]["candidate"] is None


def test_a_right_that_is_lost_in_the_middle_takes_no_promotion_back(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.cluster.faults.append(("GET", "deployments/medforge-stable", 403))
    with pytest.raises(ApiError, match="403"):
        site.rollout().promote()
    assert (state(site)["stable"], state(site)["canary"]) == (new, new)
    assert site.rollout().promote() == new
