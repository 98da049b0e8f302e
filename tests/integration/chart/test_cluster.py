"""Chart and rollout at a real Kubernetes API server, where the environment names one; skipped everywhere else.

MEDFORGE_TEST_KUBECONFIG  its kubeconfig, of somebody who may do anything; KServe's CRDs have to be there
MEDFORGE_TEST_STAND_IN    1 where there is neither KServe's controller nor a node (an API server and
                          kube-controller-manager alone): the tests play both. Without it the next are needed
MEDFORGE_TEST_VALUES      values file of the site: images, object store
MEDFORGE_TEST_RELEASES    two approved releases, "DIGEST DIGEST", in the store that MEDFORGE_S3_… names
MEDFORGE_TRUSTED_KEYS     the reviewers' keys of those releases

Everything is made in a namespace with a random name, which is removed at the end.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import helm_python as helm
import pytest
import yaml

from medforge.embedded import serve
from medforge.release.promote import trusted_keys
from medforge.release.sign import new_key
from medforge.rollout.kubeconfig import of_kubeconfig
from medforge.rollout.kubernetes import CONFIG_MAPS, INFERENCE_SERVICES, Kubernetes
from medforge.rollout.kubernetes import ApiError as Refused
from medforge.rollout.rollout import Plan, Rollout
from medforge.rollout.routing import LockedError, RoutingMap
from medforge.storage import Store
from tests.integration.chart.live import SERVING, Admin, ApiError, playing
from tests.integration.rollout.conftest import Site
from tests.unit.chart.rendering import CHART, SETS, Values, merged, objects

KUBECONFIG = os.environ.get("MEDFORGE_TEST_KUBECONFIG", "")
STAND_IN = os.environ.get("MEDFORGE_TEST_STAND_IN") == "1"
pytestmark = [
    pytest.mark.skipif(not KUBECONFIG, reason="MEDFORGE_TEST_KUBECONFIG names no cluster's kubeconfig"),
    pytest.mark.timeout(3600),  # a model takes its time to load
]


@dataclass
class Place:
    """A namespace of the cluster, and a store with two approved releases."""

    admin: Admin
    namespace: str
    folder: Path
    store: Store
    releases: list[str]
    trusted: list[Any]
    values: Values

    def one(self, kind: str, name: str, group: str = "/api/v1") -> dict[str, Any]:
        return self.admin.ask("GET", f"{group}/namespaces/{self.namespace}/{kind}/{name}")

    def names(self, kind: str, group: str = "/api/v1") -> set[str]:
        return {o["metadata"]["name"] for o in self.admin.list(f"{group}/namespaces/{self.namespace}/{kind}")}

    def account(self, name: str) -> Path:
        """A kubeconfig with a token of a ServiceAccount, and nobody else's rights."""
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{name}/token"
        token = self.admin.ask("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]
        config = yaml.safe_load(Path(KUBECONFIG).read_text())
        context = next(c for c in config["contexts"] if c["name"] == config["current-context"])
        context["context"] |= {"user": "account", "namespace": self.namespace}
        file = self.folder / name
        file.write_text(json.dumps(config | {"users": [{"name": "account", "user": {"token": token}}]}))
        return file

    def rollout(self, account: str = "medforge-rollout") -> Rollout:
        """One that acts with a ServiceAccount's rights."""
        api = Kubernetes(of_kubeconfig([self.account(account)]), self.namespace)
        plan = Plan(ready_seconds=60 if STAND_IN else 1800, settle_seconds=0 if STAND_IN else 130, poll_seconds=0.2)
        return Rollout(api, self.store, plan, self.trusted, "the tests", "run-1", say=lambda line: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cluster")
    admin, namespace = Admin(of_kubeconfig([Path(KUBECONFIG)])), f"medforge-test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    admin.ask("POST", "/api/v1/namespaces", {"metadata": {"name": namespace, "labels": labels}})
    try:
        for name, keys in (
            ("medforge-gateway", ("secret-key", "database-url", "redis-url")),
            ("medforge-object-store", ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
        ):
            made = {"metadata": {"name": name}, "stringData": {key: secrets.token_hex(32) for key in keys}}
            admin.ask("POST", f"/api/v1/namespaces/{namespace}/secrets", made)
        with serve(folder) if STAND_IN else nullcontext(dict(os.environ)) as environment:
            store = Store.from_environment(environment)
            if STAND_IN:
                new_key(folder / "key")
                site = Site(cast(Any, None), store, "medforge", folder)  # for its releases; the cluster is the real one
                releases, trusted, values = [site.publish(0.7), site.publish(0.8)], site.trusted, {}
            else:
                releases, trusted = os.environ["MEDFORGE_TEST_RELEASES"].split(), trusted_keys()
                values = yaml.safe_load(Path(os.environ["MEDFORGE_TEST_VALUES"]).read_text())
            values = merged(SETS["production"], values, {"stable": {"release": releases[0]}})
            with playing(admin, namespace) if STAND_IN else nullcontext():
                yield Place(admin, namespace, folder, store, releases, trusted, values)
    finally:
        admin.ask("DELETE", f"/api/v1/namespaces/{namespace}")


@pytest.fixture(scope="module")
def config(place: Place) -> Iterator[helm.Config]:
    with helm.Config(kubeconfig_path=KUBECONFIG, namespace=place.namespace) as config:
        yield config


@pytest.fixture(scope="module")
def installed(place: Place, config: helm.Config) -> Place:
    """The chart with the first release; its hooks have run."""
    config.install(CHART, "medforge", place.values, timeout=60 if STAND_IN else 900)
    return place


def routing(place: Place) -> dict[str, Any]:
    return dict(json.loads(place.one("configmaps", "medforge-routing")["data"]["routing.json"]))


def served(place: Place, track: str = "stable") -> str:
    service = place.one("inferenceservices", f"medforge-{track}", f"{SERVING}/v1beta1")
    return str(service["metadata"]["annotations"]["medforge.io/release"])


@pytest.mark.parametrize("name", SETS)
def test_the_server_takes_every_object(place: Place, name: str) -> None:
    """By a dry server-side apply with every field checked. A kind that the cluster does not have is left out, and
    `helm test`'s pod, which has to have its account first."""
    values = SETS[name] if name != "everything" else merged(SETS[name], {"pipelines": {"namespace": place.namespace}})
    left_out = set()
    for o in objects(values, namespace=place.namespace):
        if o["kind"] == "Pod":
            continue
        try:
            path = place.admin.path(o, place.namespace)
        except ApiError as error:
            assert error.status == 404 and "." in o["apiVersion"]
            left_out.add(o["kind"])
            continue
        place.admin.apply(f"{path}/{o['metadata']['name']}", o, dryRun="All")
    assert not left_out & {"InferenceService", "ServingRuntime"}


def test_a_pod_beyond_the_restricted_standard_is_refused(place: Place) -> None:
    pod = {"metadata": {"name": "root"}, "spec": {"containers": [{"name": "root", "image": "busybox"}]}}
    try:
        place.admin.ask("POST", f"/api/v1/namespaces/{place.namespace}/pods?dryRun=All", pod)
    except ApiError as error:
        assert error.status == 403 and "restricted" in str(error)
    else:
        pytest.skip("this API server enforces no Pod Security, so the test below says nothing about it")


def test_every_pod_is_made(installed: Place) -> None:
    """None is refused, be it by Pod Security, a quota or a ServiceAccount that is missing."""
    wanting = {"medforge-gateway", "medforge-stable-predictor"}
    apps, end = "/apis/apps/v1", time.monotonic() + 60
    while wanting and time.monotonic() < end:
        time.sleep(0.2)
        there = wanting & installed.names("deployments", apps)
        found = {name: installed.one("deployments", name, apps) for name in there}
        wanting -= {name for name, o in found.items() if o["status"].get("replicas") == o["spec"]["replicas"] > 0}
    events = installed.admin.list(f"/api/v1/namespaces/{installed.namespace}/events")
    assert [event["message"] for event in events if event["reason"] == "FailedCreate"] == []
    assert not wanting


RIGHTS = {
    **{name: set[tuple[str, str, str, str]]() for name in ("gateway", "predictor", "jobs")},
    "rollout": {
        ("serving.kserve.io", "inferenceservices", "create", ""),
        *(
            ("serving.kserve.io", "inferenceservices", verb, f"medforge-{track}")
            for verb, track in (("get", "stable"), ("patch", "stable"), ("get", "canary"), ("patch", "canary"))
        ),
        ("serving.kserve.io", "inferenceservices", "delete", "medforge-canary"),
        ("", "configmaps", "get", "medforge-routing"),
        ("", "configmaps", "patch", "medforge-routing"),
        ("apps", "deployments", "get", "medforge-stable-predictor"),
        ("apps", "deployments", "get", "medforge-canary-predictor"),
        ("", "events", "list", ""),
    },
}


@pytest.mark.parametrize("name", RIGHTS)
def test_an_account_has_these_rights_and_no_others(installed: Place, name: str) -> None:
    """Beyond what every account of the namespace has. That they are enough is what the rollout below shows."""
    assert rights(installed, f"medforge-{name}") - rights(installed, "default") == RIGHTS[name]


def rights(place: Place, account: str) -> set[tuple[str, str, str, str]]:
    """(group, resource, verb, name or "") of everything that a ServiceAccount may do in the namespace."""
    review = Admin(of_kubeconfig([place.account(account)])).ask(
        "POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", {"spec": {"namespace": place.namespace}}
    )
    return {
        (group, resource, verb, name)
        for rule in review["status"]["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or [""]
    }


def test_a_rollout_with_the_rights_of_its_account(installed: Place, config: helm.Config) -> None:
    old, new = installed.releases
    assert installed.rollout().deploy(new, 0.1) == new
    assert (served(installed), served(installed, "canary"), routing(installed)["weight"]) == (old, new, 0.1)

    config.upgrade(CHART, "medforge", merged(installed.values, {"predictor": {"maxBatch": 4}}))  # in between
    assert (served(installed), routing(installed)["candidate"]["release"]) == (old, new)

    assert installed.rollout().promote(new) == new
    assert served(installed) == routing(installed)["stable"]["release"] == new
    assert "medforge-canary" not in installed.names("inferenceservices", f"{SERVING}/v1beta1")

    with pytest.raises(helm.HelmError, match=r"conflict.*medforge-rollout"):  # what was served then is not served again
        config.rollback("medforge", version=1)
    assert served(installed) == routing(installed)["stable"]["release"] == new
    config.upgrade(CHART, "medforge", installed.values)  # whose stable.release is the old one
    assert served(installed) == routing(installed)["stable"]["release"] == new
    told = installed.rollout().status()
    assert told["stable"]["previous"] == old and told["problem"] == ""

    assert installed.rollout().rollback("tried") == new
    assert served(installed) == routing(installed)["stable"]["release"] == old


def test_of_two_rollouts_one_is_refused(installed: Place) -> None:
    def holder(name: str) -> RoutingMap:
        api = Kubernetes(of_kubeconfig([installed.account("medforge-rollout")]), installed.namespace)
        return RoutingMap(api, "medforge", name, lambda: datetime.now(timezone.utc))

    first, second = holder("first"), holder("second")
    with pytest.raises(LockedError, match="taken over by second"), first.held():
        with pytest.raises(LockedError, match="by first is under way"), second.held():
            pass
        with second.held(force=True):
            first.write(lambda routing: routing)
    assert first.holder() == ""


def test_what_was_changed_since_it_was_read_is_not_overwritten(installed: Place) -> None:
    api = Kubernetes(of_kubeconfig([installed.account("medforge-rollout")]), installed.namespace)
    name, path = "medforge-stable", f"{SERVING}/v1beta1/namespaces/{installed.namespace}/inferenceservices"
    read = api.get(INFERENCE_SERVICES, name)
    assert read is not None
    installed.admin.ask(
        "PATCH", f"{path}/{name}", {"metadata": {"labels": {"by": "hand"}}}, "application/merge-patch+json"
    )
    wanted = {key: read[key] for key in ("apiVersion", "kind")}
    wanted["metadata"] = {key: read["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
    with pytest.raises(Refused, match="409"):
        api.apply(INFERENCE_SERVICES, wanted, force=True)


@pytest.mark.parametrize("account", ["medforge-gateway", "medforge-jobs"])
def test_an_account_without_the_rights_is_told_so(installed: Place, account: str) -> None:
    with pytest.raises(Refused, match=r"403.*inferenceservices.*needs this right"):
        installed.rollout(account).status()


def test_a_token_that_is_not_valid_is_told_so(installed: Place) -> None:
    file = installed.account("medforge-rollout")
    file.write_text(file.read_text().replace('"token": "ey', '"token": "ex'))
    api = Kubernetes(of_kubeconfig([file]), installed.namespace)
    with pytest.raises(Refused, match=r"401.*token or certificate is not valid"):
        api.get(CONFIG_MAPS, "medforge-routing")


def test_helm_test_passes(installed: Place, config: helm.Config) -> None:
    config.test("medforge", timeout=60)


def test_uninstalling_keeps_the_audit_log_and_the_secrets(installed: Place, config: helm.Config) -> None:
    config.uninstall("medforge")
    assert "medforge-gateway-data" in installed.names("persistentvolumeclaims")
    assert {"medforge-gateway", "medforge-object-store"} <= installed.names("secrets")
    for kind, group in (
        ("inferenceservices", f"{SERVING}/v1beta1"),
        ("services", "/api/v1"),
        ("roles", "/apis/rbac.authorization.k8s.io/v1"),
    ):
        assert not installed.names(kind, group)
