"""InferenceServices as documents: which release they name, and whether all of their pods serve it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from medforge.rollout.services import canary_of, check_managed, checks_itself, release_of, wanting, with_release

OLD, NEW = "a" * 64, "b" * 64


def service(**model: Any) -> dict[str, Any]:
    given = {"storageUri": f"s3://med/releases/{OLD}/", "args": ["--x", f"--release={OLD}"]} | model
    return {
        "metadata": {"name": "m-stable", "namespace": "n", "labels": {}, "annotations": {}},
        "spec": {"predictor": {"minReplicas": 3, "serviceAccountName": "m-predictor", "model": given}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def deployment(**changes: Any) -> dict[str, Any]:
    status = {"observedGeneration": 4, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3} | changes
    return {
        "metadata": {"generation": 4},
        "spec": {"replicas": 3, "template": {"spec": {"containers": [{"args": [f"--release={OLD}"]}]}}},
        "status": status,
    }


@pytest.mark.parametrize("uri", ["", "pvc://x/y", "s3://med/models/1/", f"s3://med/releases/{OLD[:12]}/", f"{OLD}"])
def test_a_service_without_a_release_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"InferenceService m-stable: spec\.predictor\.model\.storageUri"):
        release_of(service(storageUri=uri))


def test_the_release_is_changed_wherever_it_is_named_and_the_original_is_not_touched() -> None:
    given = service()
    before = copy.deepcopy(given)
    assert release_of(given) == ("med", OLD)
    wanted = with_release(given, NEW, {})
    assert wanted["spec"]["predictor"]["model"] == {
        "storageUri": f"s3://med/releases/{NEW}/",
        "args": ["--x", f"--release={NEW}"],
    }
    canary = canary_of(given, "m-canary", NEW, "run")
    assert OLD not in str(canary)
    assert canary["spec"]["predictor"]["serviceAccountName"] == "m-predictor"
    assert given == before


def test_an_autoscaler_of_the_canary_looks_at_the_canary() -> None:
    given = service()
    given["spec"]["predictor"]["autoScaling"] = {"metrics": [{"query": 'sum(q{pod=~"m-stable-predictor-.+"})'}]}
    made = canary_of(given, "m-canary", NEW, "run")["spec"]["predictor"]["autoScaling"]
    assert made == {"metrics": [{"query": 'sum(q{pod=~"m-canary-predictor-.+"})'}]}


def test_which_servers_prove_a_release_themselves() -> None:
    assert checks_itself(service())
    assert not checks_itself(service(args=["--model=/mnt/models/model"]))
    assert not checks_itself(service(args=None))


def test_a_container_that_brings_the_release_brings_the_other() -> None:
    """Before vLLM: what it is told, and whether the release is proven."""
    words = ["medforge", "verify-release", OLD, "--out", "/mnt/models/release"]
    given = service(args=["--model=/mnt/models/release/model"])
    given["spec"]["predictor"]["initContainers"] = [{"name": "storage-initializer", "image": "x", "command": words}]
    assert checks_itself(given)
    for made in (with_release(given, NEW, {}), canary_of(given, "m-canary", NEW, "run")):
        (container,) = made["spec"]["predictor"]["initContainers"]
        assert container == {
            "name": "storage-initializer",
            "image": "x",
            "command": ["medforge", "verify-release", NEW, "--out", "/mnt/models/release"],
        }
    assert given["spec"]["predictor"]["initContainers"][0]["command"] == words
    given["spec"]["predictor"]["initContainers"][0]["command"] = ["fetch", OLD]
    assert not checks_itself(given)


def test_helms_own_is_told_apart() -> None:
    given = service()
    check_managed(given)
    given["metadata"]["annotations"]["medforge.io/managed-by-rollout"] = "true"
    check_managed(given)
    given["metadata"]["annotations"]["medforge.io/managed-by-rollout"] = "false"
    with pytest.raises(ValueError, match=r"rollout\.managedBy"):
        check_managed(given)


def test_all_pods_serve_it() -> None:
    assert wanting(service(), deployment(), OLD) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"observedGeneration": 3}, "has not been looked at yet"),
        ({"updatedReplicas": 1}, "1 of 3 pods are new"),
        ({"availableReplicas": 2}, "2 available"),
        ({"replicas": 4}, "4 there"),  # one of the old ones is still ending
    ],
)
def test_some_pods_do_not(changes: dict[str, int], told: str) -> None:
    """KServe says Ready in each of these cases: the Deployment is available."""
    assert told in wanting(service(), deployment(**changes), OLD)


def test_what_else_may_be_missing() -> None:
    assert "names release aaaa" in wanting(service(), deployment(), NEW)
    assert "no Deployment yet" in wanting(service(), None, OLD)
    other = deployment()
    other["spec"]["template"]["spec"]["containers"][0]["args"] = [f"--release={NEW}"]
    assert "does not have the release yet" in wanting(service(), other, OLD)
    empty = deployment(replicas=0, updatedReplicas=0, availableReplicas=0)
    empty["spec"]["replicas"] = 0
    assert "0 of 0 pods" in wanting(service(), empty, OLD)
    given = service()
    given["status"] = {
        "conditions": [{"type": "Ready", "status": "False", "reason": "R", "message": "M"}],
        "modelStatus": {"lastFailureInfo": {"reason": "ModelLoadFailed", "message": "no\nspace"}},
    }
    assert wanting(given, deployment(), OLD) == "it is not Ready (Ready: R M; model: ModelLoadFailed no space)"
