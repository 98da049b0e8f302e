"""A cluster, a store with releases, and time that passes when somebody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from medforge.config import PolicyConfig, RuleConfig
from medforge.embedded import serve
from medforge.files import sha256_bytes, write_json
from medforge.release.policy import judge
from medforge.release.publish import publish, read_channel
from medforge.release.sign import approve, load_public_key, new_key
from medforge.rollout.kubeconfig import Cluster as Connection
from medforge.rollout.kubernetes import Kubernetes
from medforge.rollout.rollout import Plan, Rollout
from medforge.storage import Store
from tests.integration.rollout.cluster import NAMESPACE, TOKEN, Cluster

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


@dataclass
class Clock:
    """Time that passes when somebody waits; `then` is called at each wait."""

    time: datetime = NOW
    then: Callable[[], None] = lambda: None
    said: list[str] = field(default_factory=list)

    def now(self) -> datetime:
        self.time += timedelta(microseconds=1)
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        self.then()


@dataclass
class Site:
    """An installation: its cluster, its store, and what acts on them."""

    cluster: Cluster
    store: Store
    bucket: str
    folder: Path
    clock: Clock = field(default_factory=Clock)

    def publish(self, figure: float, approved: bool = True) -> str:
        """Publish a release with a figure; returns its digest."""
        folder = self.folder / str(figure)
        cells = {arm: {"all": {"exact_match": {"value": v, "n": 9}}} for arm, v in (("tuned", figure), ("base", 0.4))}
        rules = [RuleConfig(name="good-enough", metric="exact_match", bound=0.5, margin=0.0, min_n=1)]
        write_json(folder / "results.json", {"arms": cells})
        write_json(folder / "verdict.json", judge({"arms": cells}, PolicyConfig(name="unit", rules=rules)))
        write_json(folder / "model" / "config.json", {"figure": figure})
        parts = {name: folder / name for name in ("model", "results.json", "verdict.json")}
        digest = str(publish(self.store, self.bucket, "candidate", parts, {"name": "eyes"}, NOW)["release"])
        if approved:
            self.sign(digest)
        return digest

    def sign(self, digest: str, decision: Any = "approve") -> None:
        approve(self.store, self.bucket, digest, self.folder / "key", "Us", decision, "", NOW)

    @property
    def trusted(self) -> list[Any]:
        return [load_public_key(self.folder / "key.pub")]

    def rollout(self, run: str = "run-1", store: Store | None = None, **plan: Any) -> Rollout:
        """One that needs no time."""
        api = Kubernetes(Connection(self.cluster.url, NAMESPACE, None, lambda: TOKEN))
        clock = self.clock
        return Rollout(
            api, store or self.store, Plan(**plan), self.trusted, "us", run,
            now=clock.now, sleep=clock.sleep, say=clock.said.append,
        )  # fmt: skip

    def events(self) -> list[str]:
        """What the decision log tells, oldest first."""
        log = self.rollout().status()
        assert log["problem"] == ""
        return [f"{entry['event']} {entry['release'][:6]}" for entry in log["log"]]


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollout")


@pytest.fixture(scope="package")
def environment(root: Path) -> Iterator[dict[str, str]]:
    """The variables that name the store."""
    with serve(root) as values:
        yield dict(values)


@pytest.fixture
def site(request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path) -> Iterator[Site]:
    """An installation that serves nothing yet: `site.cluster.install(...)`."""
    new_key(tmp_path / "key")
    bucket = "t-" + sha256_bytes(request.node.nodeid.encode())[:12]
    cluster = Cluster()
    yield Site(cluster, Store.from_environment(environment), bucket, tmp_path)
    cluster.close()


URL = f"http://medforge-{{}}-predictor.{NAMESPACE}.svc.cluster.local/openai/v1"


class Killed(BaseException):
    """As SIGKILL: nothing of the process runs any more."""


def place(track: str, release: str) -> dict[str, str]:
    return {"url": URL.format(track), "release": release}


@pytest.fixture
def old(site: Site) -> str:
    """The release that is served."""
    digest = site.publish(0.7)
    site.cluster.install(digest, site.bucket)
    return digest


def state(site: Site) -> dict[str, Any]:
    """All that a rollout decides."""
    return {
        "stable": site.cluster.release("medforge-stable"),
        "canary": site.cluster.release("medforge-canary"),
        "routing": site.cluster.routing,
        "champion": (read_channel(site.store, site.bucket, "champion") or {}).get("release"),
        "holder": site.cluster.objects["configmaps", "medforge-routing"]["metadata"].get("annotations", {}),
    }


@contextmanager
def killed_at(index: int, answered: bool) -> Iterator[None]:
    """The process dies at its request of that number: before it is sent, or when its answer has come."""
    count = 0
    send = Kubernetes._send

    def fatal(self: Kubernetes, *given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > index + 1 or (count == index + 1 and not answered):
            raise Killed
        result = send(self, *given, **more)
        if count == index + 1:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kubernetes, "_send", fatal)
        yield
