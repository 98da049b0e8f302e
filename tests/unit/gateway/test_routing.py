"""routing.json: what it may say, and a gateway that follows it while requests run."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serving.gateway import routing, upstream
from serving.gateway.balance import track
from serving.gateway.parts import Caller
from serving.gateway.routing import Place, Routing, parse, read
from serving.gateway.settings import PREFIX, Settings, load
from tests.unit.gateway.conftest import Gateway, Serve, until
from tests.unit.gateway.fake import RELEASE, Fake

A, B, C = RELEASE, "b" * 64, "c" * 64
CALLERS = [Caller(f"key-{number}", "", "system", frozenset()) for number in range(200)]
SAID = {"messages": [{"role": "user", "content": "Hello"}]}


def place(fake: Fake, release: str = "") -> dict[str, str]:
    return {"url": fake.url, "release": release}


def document(stable: dict[str, str], candidate: dict[str, str] | None = None, weight: float = 0.0) -> str:
    return json.dumps({"stable": stable, "candidate": candidate, "weight": weight})


def test_what_the_rollout_writes_is_read() -> None:
    """The two ends of the contract: what `medforge deploy` writes is what a gateway takes."""
    from medforge.rollout import routing as rollout

    for candidate, weight in ((None, 0.0), (rollout.Place("http://c/v1", C), 0.25)):
        written = rollout.Routing(rollout.Place("http://s/v1", ""), candidate, weight)
        told = parse(json.dumps(written.document()).encode(), "x")
        expected = Place(candidate.url, candidate.release) if candidate else None
        assert told == Routing(Place("http://s/v1"), expected, weight)
        assert rollout.parse(json.dumps(written.document()), "x") == written


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "x: is no routing"),
        ("[]", "Expected `object`"),
        ("{}", "stable"),
        ('{"stable": {}}', "url"),
        ('{"stable": {"url": "localhost:1"}}', r"url is 'localhost:1'.*\$.stable"),
        ('{"stable": {"url": "http://s/v1/"}}', "without a slash"),
        ('{"stable": {"url": "http://s/v1", "release": "abc"}}', "release is 'abc'"),
        ('{"stable": {"url": "http://s/v1"}, "wieght": 1}', "wieght"),
        ('{"stable": {"url": "http://s/v1"}, "weight": 0.1}', "there is no candidate"),
        ('{"stable": {"url": "http://s/v1"}, "candidate": {"url": "http://c/v1"}, "weight": 10}', "weight is 10"),
        ('{"stable": {"url": "http://s/v1"}, "candidate": {"url": "http://c/v1"}, "weight": NaN}', "no routing"),
        ('{"stable": {"url": "http://s/v1", "port": 8}}', "port"),
        ("\xff", "no routing"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(text.encode("latin-1"), "x")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.json: cannot be read \(No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)


def test_settings_beside_the_file_would_have_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"stable": "http://s", "candidate": "http://c", "stable_release": A}.items():
        with pytest.raises(ValidationError, match=f"{name}: has no effect"):
            Settings(_env_file=None, **{"routing": tmp_path / "r.json", name: value})  # type: ignore[arg-type]
    monkeypatch.setenv(f"{PREFIX}ROUTING", str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match=r"r.json: cannot be read"):
        load()  # and not only when requests come
    (tmp_path / "r.json").write_text('{"stable": {"url": "http://s/v1"}}')
    assert load().routing == tmp_path / "r.json"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((upstream, "POLL_READY"), (upstream, "POLL_AWAY"), (routing, "SECONDS")):
        monkeypatch.setattr(module, name, 0.03)


@pytest.fixture
def other() -> Iterator[Fake]:
    made = Fake(release=C)
    yield made
    made.close()


class Mounted:
    """A ConfigMap as the kubelet mounts it: a folder behind a link, which is swapped."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()
        (folder / "routing.json").symlink_to("..data/routing.json")

    @property
    def path(self) -> Path:
        return self._folder / "routing.json"

    def write(self, text: str) -> str:
        """Returns the SHA-256."""
        self._count += 1
        data = self._folder / f"..{self._count}"
        data.mkdir()
        (data / "routing.json").write_text(text)
        link = self._folder / "..data_tmp"
        link.symlink_to(data.name)
        os.replace(link, self._folder / "..data")
        return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    return Mounted(tmp_path / "routing")


@pytest.fixture
def routed(serve: Serve, settings: Settings, mounted: Mounted, fake: Fake) -> Iterator[Gateway]:
    """A gateway that follows the file, which names `fake` as the stable predictor."""
    mounted.write(document(place(fake, A)))
    values = settings.model_dump(include=settings.model_fields_set - {"stable"})
    with serve(Settings(_env_file=None, **values, routing=mounted.path)) as gateway:
        yield gateway


def used(gateway: Gateway) -> dict[str, Any]:
    return dict(gateway.client.get("/v1/releases/current").json())


def taken(gateway: Gateway, digest: str) -> bool:
    return gateway.metric("medforge_gateway_routing_info", digest=digest) == 1


def follow(gateway: Gateway, mounted: Mounted, text: str) -> None:
    """Write the file, and wait until the gateway has taken it."""
    digest = mounted.write(text)
    until(lambda: taken(gateway, digest))


def test_a_canary_comes_grows_and_goes(routed: Gateway, mounted: Mounted, fake: Fake, other: Fake) -> None:
    upstreams = routed.parts.upstreams
    assert {upstreams.choose(caller) for caller in CALLERS} == {"stable"}
    before: set[str] = set()
    for weight in (0.2, 0.6):
        follow(routed, mounted, document(place(fake, A), place(other, C), weight))
        until(lambda: upstreams.healthy("candidate"))
        given = {caller.id for caller in CALLERS if upstreams.choose(caller) == "candidate"}
        assert given == {caller.id for caller in CALLERS if track(caller.id, weight) == "candidate"}
        assert before < given  # who had the candidate keeps it
        before = given
    told = used(routed)
    assert (told["candidate"]["digest"], told["candidate_weight"]) == (C, 0.6)
    assert routed.metric("medforge_gateway_routing_weight") == 0.6
    assert routed.client.get("/readyz").json()["upstreams"]["candidate"]["release"] == C
    digest = mounted.write(document(place(fake, A)))
    until(lambda: taken(routed, digest))
    assert {upstreams.choose(caller) for caller in CALLERS} == {"stable"}
    assert used(routed)["candidate"] is None
    assert list(routed.client.get("/readyz").json()["upstreams"]) == ["stable"]
    shown = routed.client.get("/metrics").text
    assert 'medforge_gateway_upstream_ready{track="candidate"}' not in shown  # or an alert would go on
    assert shown.count("medforge_gateway_routing_info{") == 1
    looks = other.looks
    until(lambda: fake.looks > 3)
    assert other.looks <= looks + 1  # nobody looks at it any more


def test_a_candidate_that_is_not_ready_is_given_to_nobody(
    routed: Gateway, mounted: Mounted, fake: Fake, other: Fake
) -> None:
    other.stop()
    digest = mounted.write(document(place(fake, A), place(other, C), 1.0))
    until(lambda: taken(routed, digest))
    assert routed.client.post("/v1/chat/completions", json=SAID).headers["x-medforge-track"] == "stable"
    other.start()
    until(lambda: routed.parts.upstreams.healthy("candidate"))
    assert routed.client.post("/v1/chat/completions", json=SAID).headers["x-medforge-track"] == "candidate"
    assert len(other.requests) == 1


def test_a_file_that_is_broken_changes_nothing_and_is_told_once(
    routed: Gateway, mounted: Mounted, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = lambda: routed.metric("medforge_gateway_routing_refused_total")  # noqa: E731
    for number, text in enumerate(('{"stable": ', document({"url": "nowhere"}), "")):
        mounted.write(text)
        until(partial(lambda seen: refused() == seen, number + 1))
        assert routed.client.post("/v1/chat/completions", json=SAID).status_code == 200
    looks = fake.looks
    until(lambda: fake.looks > looks + 5)  # the same broken file was read several times
    assert refused() == 3
    (mounted.path.parent / "..data").unlink()
    until(lambda: refused() == 4)
    digest = mounted.write(document(place(fake)))
    until(lambda: taken(routed, digest))
    assert used(routed)["stable"]["digest"] == A


def test_callers_are_moved_to_another_stable_predictor_when_it_is_ready(
    routed: Gateway, mounted: Mounted, fake: Fake, other: Fake
) -> None:
    other.stop()
    digest = mounted.write(document(place(other, C)))
    until(lambda: taken(routed, digest))
    looks = fake.looks
    until(lambda: fake.looks > looks + 5)
    assert routed.client.get("/readyz").status_code == 200
    assert used(routed)["stable"]["digest"] == A
    other.release = B  # it comes, but is another release
    other.start()
    looks = other.looks
    until(lambda: other.looks > looks + 3)
    assert used(routed)["stable"]["digest"] == A
    other.release = C
    until(lambda: used(routed)["stable"]["digest"] == C)
    assert routed.client.post("/v1/chat/completions", json=SAID).status_code == 200
    assert (len(fake.requests), len(other.requests)) == (0, 1)
    release = 'medforge_gateway_release_info{digest="%s",model="medforge",track="stable"}'
    shown = routed.client.get("/metrics").text
    assert release % C in shown and release % A not in shown


def test_what_is_withdrawn_before_it_was_ready_is_forgotten(
    routed: Gateway, mounted: Mounted, fake: Fake, other: Fake
) -> None:
    other.stop()
    for stable in (place(other, C), place(fake, A)):
        follow(routed, mounted, document(stable))
    other.start()
    looks = fake.looks
    until(lambda: fake.looks > looks + 5)
    assert used(routed)["stable"]["digest"] == A
    assert other.looks == 0


def test_a_promotion_never_makes_the_gateway_unready(routed: Gateway, mounted: Mounted, fake: Fake) -> None:
    """The stable Service answers with the old release, then with either, then with the new one."""
    ready: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=routed.url, trust_env=False) as client:
            while not stop.is_set():
                ready.append(client.get("/readyz").status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        digest = mounted.write(document(place(fake)))
        until(lambda: taken(routed, digest))
        for release in (B, A, B, A, B):
            fake.release = release
            until(partial(lambda seen: used(routed)["stable"]["digest"] == seen, release))
        digest = mounted.write(document(place(fake, B)))
        until(lambda: taken(routed, digest))
        looks = fake.looks
        until(lambda: fake.looks > looks + 3)
    finally:
        stop.set()
        thread.join(10)
    assert set(ready) == {200}
    assert used(routed)["stable"]["digest"] == B
    fake.release = A  # now it insists again
    until(lambda: routed.client.get("/readyz").status_code == 503)


def test_a_request_ends_where_it_began_and_bears_that_release(
    routed: Gateway, mounted: Mounted, fake: Fake, other: Fake
) -> None:
    for one in (fake, other):
        one.extended = False  # like vLLM: the release is what the routing says
    fake.first_byte_seconds = 1.0
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(routed.client.post("/v1/chat/completions", json=SAID)), daemon=True
    )
    thread.start()
    until(lambda: len(fake.requests) == 1)
    digest = mounted.write(document(place(other, C)))
    until(lambda: taken(routed, digest) and used(routed)["stable"]["digest"] == C)
    assert not answers
    assert routed.client.post("/v1/chat/completions", json=SAID).headers["x-medforge-release"] == C
    thread.join(10)
    assert answers[0].status_code == 200
    assert answers[0].headers["x-medforge-release"] == A
    assert fake.cancelled == 0
