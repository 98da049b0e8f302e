"""A canary, its promotion, its end: against a Kubernetes API and an object store; refused and interrupted."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from medforge.rollout.routing import LockedError
from medforge.s3 import Entry
from medforge.storage import Entries, Names, Store
from tests.integration.rollout.cluster import NAMESPACE, stable_service
from tests.integration.rollout.conftest import Killed, Site, killed_at, place, state


def test_a_canary_is_a_copy_of_the_stable_service_with_another_release(site: Site, old: str) -> None:
    new = site.publish(0.8)
    assert site.rollout().deploy(new[:8], 0.1) == new
    canary = site.cluster.objects["inferenceservices", "medforge-canary"]
    predictor = dict(canary["spec"]["predictor"])
    (spread,) = predictor.pop("topologySpreadConstraints")
    assert spread["labelSelector"] == {"matchLabels": {"serving.kserve.io/inferenceservice": "medforge-canary"}}
    assert predictor == {
        "minReplicas": 1,
        "model": {
            "modelFormat": {"name": "medforge"},
            "storageUri": f"s3://{site.bucket}/releases/{new}/",
            "args": ["--model-dir=/mnt/models", f"--release={new}"],
        },
    }
    assert canary["metadata"]["labels"] == {
        "medforge.io/track": "canary",
        "app.kubernetes.io/managed-by": "medforge-rollout",
    }
    assert canary["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "Standard",
        "medforge.io/release": new,
        "medforge.io/rollout-run": "run-1",
    }
    assert site.cluster.routing == {
        "stable": place("stable", old), "candidate": place("canary", new), "weight": 0.1,
    }  # fmt: skip
    assert site.cluster.release("medforge-stable") == old
    assert site.events() == [f"canary {new[:6]}", f"weight {new[:6]}"]


def test_a_promotion_gives_the_release_to_all(site: Site, old: str) -> None:
    new = site.publish(0.8)
    seen: list[tuple[str, dict[str, Any], datetime]] = []
    site.rollout().deploy(new, 0.1)
    site.rollout().deploy(new, 0.5)
    assert site.cluster.routing["weight"] == 0.5

    def note(method: str, path: str) -> None:
        if method != "GET" and "inferenceservices" in path:
            seen.append((f"{method} {path.rpartition('-')[2]}", site.cluster.routing, site.clock.time))

    changed: list[tuple[dict[str, Any], datetime]] = []
    site.clock.then = lambda: changed.append((site.cluster.routing, site.clock.time))
    site.cluster.before = note
    assert site.rollout(settle_seconds=100).promote(new) == new
    assert state(site) == {
        "stable": new, "canary": None, "champion": new, "holder": {},
        "routing": {"stable": place("stable", new), "candidate": None, "weight": 0.0},
    }  # fmt: skip
    stable = site.cluster.objects["inferenceservices", "medforge-stable"]
    assert stable["metadata"]["annotations"]["medforge.io/previous-release"] == old
    assert stable["metadata"]["labels"]["medforge.io/track"] == "stable"  # what Helm wrote stays
    # what the gateways may still use is changed only when all of them know better
    assert [what for what, _, _ in seen] == ["PATCH stable", "DELETE canary"]
    for (_, routing, at), told in zip(
        seen,
        (
            {"stable": place("stable", ""), "candidate": place("canary", new), "weight": 0.5},
            {"stable": place("stable", new), "candidate": None, "weight": 0.0},
        ),
        strict=True,
    ):
        assert routing == told
        first = next(time for routing, time in changed if routing == told)
        assert (at - first).total_seconds() >= 90
    events = ["canary", "weight", "weight", "promoting", "stable", "promoted"]
    assert site.events() == [f"{event} {new[:6]}" for event in events]
    assert site.rollout().promote(new) == new  # once more: nothing is left to be done
    for another in ("", old):
        with pytest.raises(ValueError, match="there is no canary to promote"):
            site.rollout().promote(another)


class Remembered(Store):
    """A store's bucket, copied to memory: what is killed here is between the cluster and us."""

    def __init__(self, store: Store, bucket: str) -> None:
        self.url = store.url
        self.objects = {entry.key: store.get(bucket, entry.key) for entry in store.list(bucket)}

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.objects[key] = data

    def get(self, bucket: str, key: str) -> bytes:
        return self.objects[key]

    def exists(self, bucket: str, key: str) -> bool:
        return key in self.objects

    def list(self, bucket: str, prefix: str = "") -> Entries:
        folder = f"{prefix.strip('/')}/"
        return [Entry(key, len(data), "") for key, data in sorted(self.objects.items()) if key.startswith(folder)]

    def folders(self, bucket: str, prefix: str = "") -> Names:
        return sorted({entry.key.removeprefix(f"{prefix}/").split("/")[0] for entry in self.list(bucket, prefix)})


def act(site: Site, new: str, name: str) -> None:
    rollout = site.rollout(run=f"run-{site.clock.time.timestamp()}")
    if name == "deploy":
        rollout.deploy(new, 0.1)
    elif name == "promote":
        rollout.promote()
    else:
        rollout.rollback("as the test says")


@pytest.mark.parametrize("name", ["deploy", "promote", "rollback", "rollback of a promotion"])
def test_killed_at_any_request_it_goes_on(site: Site, old: str, name: str) -> None:
    """At each request of an act in turn, before it is sent or after it was answered."""
    new = site.publish(0.8)
    site.store = store = Remembered(site.store, site.bucket)
    if name != "deploy":
        act(site, new, "deploy")
    if name == "rollback of a promotion":
        act(site, new, "promote")
    before, objects = site.cluster.saved(), dict(store.objects)

    def begin() -> None:
        site.cluster.restore(before)
        store.objects = dict(objects)

    requests: list[str] = []
    site.cluster.before = lambda method, path: requests.append(method)
    act(site, new, name)
    site.cluster.before = lambda method, path: None
    done = state(site)
    assert done["holder"] == {}
    writes = [index for index, method in enumerate(requests) if method != "GET"]
    assert len(writes) >= 4
    told = {
        "deploy": {"canary", "weight"},
        "promote": {"promoting", "stable", "promoted"},
        "rollback": {"rolled-back"},
        "rollback of a promotion": {"stable", "rolled-back"},
    }
    for index in writes:
        for answered in (False, True):
            begin()
            with killed_at(index, answered), pytest.raises(Killed):
                act(site, new, name)
            site.clock.sleep(121)  # the lock of the dead ends
            last = site.cluster.release("medforge-canary") is None
            if name == "promote" and last:  # its last request had come through
                with pytest.raises(ValueError, match="no canary to promote"):
                    act(site, new, name)
            elif name == "rollback" and last:
                assert site.rollout().rollback("-") == ""
            else:
                act(site, new, name)
            reached = state(site)
            assert "rolling-back-from" not in str(site.cluster.objects["inferenceservices", "medforge-stable"])
            assert reached | {"holder": {}} == done, f"killed at request {index}, answered: {answered}"
            assert told[name] <= {line.split()[0] for line in site.events()}, (
                f"killed at {index}, {answered}: {site.events()}"
            )


def test_what_may_not_be_served_is_refused_before_anything_is_applied(site: Site, old: str) -> None:
    unsigned = site.publish(0.8, approved=False)
    with pytest.raises(ValueError, match="is unsigned: only one that a trusted reviewer approved"):
        site.rollout().deploy(unsigned, 0.1)
    refused = site.publish(0.81)
    site.sign(refused, "refuse")
    with pytest.raises(ValueError, match="is refused"):
        site.rollout().deploy(refused, 0.1)
    lost = site.publish(0.82)
    site.store.remove(site.bucket, f"releases/{lost}/model/config.json")
    with pytest.raises(ValueError, match="missing"):
        site.rollout().deploy(lost, 0.1)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="share"):
            site.rollout().deploy(old, share)
    with pytest.raises(ValueError, match="no release or channel"):
        site.rollout().deploy("nobody", 0.1)
    assert site.rollout().deploy(old, 0.1) == old  # it is served already
    assert site.cluster.changes == []
    assert site.events() == []


def test_for_a_server_that_does_not_check_every_byte_is_read(site: Site) -> None:
    old, new = site.publish(0.7), site.publish(0.8)
    site.cluster.install(old, site.bucket)
    key = f"releases/{new}/model/config.json"
    data = site.store.get(site.bucket, key)
    site.store.put(site.bucket, key, data.replace(b"0.8", b"0.9"))
    site.rollout().deploy(new, 0.1)  # MedForge's predictor finds it, and does not become ready
    site.rollout().rollback("-")
    site.cluster.objects["inferenceservices", "medforge-stable"]["spec"]["predictor"]["model"]["args"] = ["--model=/x"]
    with pytest.raises(ValueError, match=r"model/config.json is corrupted"):
        site.rollout().deploy(new, 0.1)


def test_what_helm_manages_is_left_alone(site: Site) -> None:
    old, new = site.publish(0.7), site.publish(0.8)
    site.cluster.install(old, site.bucket, **{"medforge.io/managed-by-rollout": "false"})
    for act in (lambda: site.rollout().deploy(new, 0.1), lambda: site.rollout().rollback("-")):
        with pytest.raises(ValueError, match="managed by Helm"):
            act()
    assert [change for change in site.cluster.changes if "routing" not in change] == []


def test_nothing_is_installed(site: Site) -> None:
    with pytest.raises(ValueError, match="no InferenceService medforge-stable in namespace med: install the chart"):
        site.rollout().deploy("a", 0.1)


def test_a_canary_that_never_becomes_ready_is_removed_and_told(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.cluster.never_ready.add("medforge-canary")
    with pytest.raises(ValueError, match="after 60 s: 0 of 1 pods are new") as caught:
        site.rollout(ready_seconds=60).deploy(new, 0.1)
    assert "out of memory" in str(caught.value)
    assert "FailedScheduling: 0/3 nodes: no GPU" in str(caught.value)
    assert state(site)["canary"] is None
    assert site.cluster.routing["candidate"] is None
    assert site.events() == [f"canary {new[:6]}", f"failed {new[:6]}"]
    site.cluster.never_ready.clear()
    assert site.rollout().deploy(new, 0.1) == new


def test_another_canary_is_not_pushed_aside(site: Site, old: str) -> None:
    first, second = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(first, 0.1)
    with pytest.raises(ValueError, match=f"a canary of release {first[:12]} is there"):
        site.rollout(run="run-2").deploy(second, 0.1)
    with pytest.raises(ValueError, match=f"the canary is of release {first[:12]}, not {second[:12]}"):
        site.rollout(run="run-2").promote(second)
    assert state(site)["canary"] == first


def test_of_two_at_once_the_second_is_refused_and_a_rollback_stops_the_first(site: Site, old: str) -> None:
    new = site.publish(0.8)
    met: list[str] = []

    def meanwhile() -> None:
        if not met:
            with pytest.raises(LockedError, match=r"a rollout by run-1 is under way; if it was killed, try"):
                site.rollout(run="run-2").deploy(new, 0.2)
            met.append("refused")
            assert site.rollout(run="run-3").rollback("enough") == new

    site.clock.then = meanwhile
    with pytest.raises(ValueError, match=r"this rollout was taken over by another one|medforge-canary is gone"):
        site.rollout(run="run-1").deploy(new, 0.1)
    assert met == ["refused"]
    assert state(site)["canary"] is None
    assert state(site)["routing"]["weight"] == 0


def test_a_stable_service_that_does_not_take_the_release_is_given_the_old_one(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.cluster.never_ready.add("medforge-stable")

    tried: list[str] = []

    def recover() -> None:
        if site.cluster.release("medforge-stable") == new:
            tried.append(new)
        elif tried:
            site.cluster.never_ready.clear()

    site.clock.then = recover
    with pytest.raises(ValueError, match="rolled back, as medforge-stable did not become ready"):
        site.rollout(ready_seconds=300).promote()
    assert state(site) == {
        "stable": old, "canary": None, "champion": None, "holder": {},
        "routing": {"stable": place("stable", old), "candidate": None, "weight": 0.0},
    }  # fmt: skip


def test_a_promotion_is_taken_back(site: Site, old: str) -> None:
    first, second = site.publish(0.8), site.publish(0.9)
    for release in (first, second):
        site.rollout().deploy(release, 0.1)
        site.rollout().promote()
    stable = {"name": "medforge-stable", "namespace": NAMESPACE, "annotations": {"medforge.io/previous-release": first}}
    assert site.cluster.apply("inferenceservices", {"metadata": stable}, "helm-upgrade", False)[0] == 200
    assert site.rollout().rollback("the answers are worse") == second
    assert (state(site)["stable"], state(site)["champion"]) == (first, first)
    assert site.cluster.routing == {"stable": place("stable", first), "candidate": None, "weight": 0.0}
    assert site.rollout().rollback("again") == ""  # not back and forth
    with pytest.raises(ValueError, match="nothing would be rolled back"):
        site.rollout().rollback("again", release=first)
    assert state(site)["stable"] == first
    entry = site.rollout().status()["log"][-1]
    assert (entry["event"], entry["release"], entry["by"]) == ("rolled-back", second, "us")
    assert entry["detail"] == {"reason": "the answers are worse", "stable": first}


def test_a_release_that_was_refused_meanwhile_is_neither_promoted_nor_gone_back_to(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.sign(new, "refuse")
    with pytest.raises(ValueError, match="is refused"):
        site.rollout().promote()
    assert state(site)["stable"] == old
    assert site.rollout().rollback("a reviewer refused it") == new
    other = site.publish(0.9)
    site.rollout().deploy(other, 0.1)
    site.rollout().promote()
    site.sign(old, "refuse")
    with pytest.raises(ValueError, match="is refused"):
        site.rollout().rollback("-")
    assert state(site)["stable"] == other


def test_only_a_runs_own_canary_is_removed_at_its_end(site: Site, old: str) -> None:
    new = site.publish(0.8)
    site.rollout(run="run-1").deploy(new, 0.1)
    assert site.rollout(run="run-2").rollback("-", only_run="run-2") == ""
    assert state(site)["canary"] == new
    assert site.rollout(run="run-1").rollback("-", only_run="run-1") == new
    assert site.rollout(run="run-1").rollback("-", only_run="run-1") == ""


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_decision_log_that_was_changed_is_told(site: Site, old: str, harm: str) -> None:
    new = site.publish(0.8)
    site.rollout().deploy(new, 0.1)
    site.rollout().rollback("-")
    keys = [entry.key for entry in site.store.list(site.bucket, f"rollouts/{NAMESPACE}/medforge")]
    assert len(keys) == 4
    if harm == "change":
        entry = json.loads(site.store.get(site.bucket, keys[1]))
        site.store.put(site.bucket, keys[1], json.dumps(entry | {"by": "another"}).encode())
        assert site.rollout().status()["problem"] == f"{keys[1]}: was changed"
    else:
        site.store.remove(site.bucket, keys[1])
        assert site.rollout().status()["problem"].startswith(f"{keys[2]}: the entry before it was changed, removed")


def test_of_two_that_read_at_the_same_moment_one_is_refused(site: Site, old: str) -> None:
    """The second takes the lock between the first's look at it and its write."""
    new = site.publish(0.8)
    other = site.rollout(run="run-2")
    taken = other._map.held()

    def meanwhile(method: str, path: str) -> None:
        if method == "PATCH":
            site.cluster.before = lambda method, path: None
            taken.__enter__()

    site.cluster.before = meanwhile
    with pytest.raises(LockedError, match="a rollout by run-2 is under way"):
        site.rollout(run="run-1").deploy(new, 0.1)
    assert state(site)["canary"] is None
    assert state(site)["holder"]["medforge.io/rollout-holder"] == "run-2"


def test_a_stable_service_that_was_changed_meanwhile_is_not_overwritten(site: Site, old: str) -> None:
    new, theirs = site.publish(0.8), site.publish(0.9)
    site.rollout().deploy(new, 0.1)

    def meanwhile(method: str, path: str) -> None:
        if method == "PATCH" and path.endswith("medforge-stable"):
            site.cluster.before = lambda method, path: None
            changed = stable_service(theirs, site.bucket, {})
            site.cluster.apply("inferenceservices", changed, "somebody", True)

    site.cluster.before = meanwhile
    with pytest.raises(ValueError, match=f"has been changed to release {theirs[:12]} by somebody else"):
        site.rollout().promote()
    assert state(site)["stable"] == theirs
