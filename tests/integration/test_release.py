"""Releases and their signatures against the real embedded server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from medforge.cli import main
from medforge.config import PolicyConfig, RuleConfig
from medforge.embedded import serve
from medforge.files import list_files, sha256_bytes, tree_digest, write_json
from medforge.release.policy import judge
from medforge.release.publish import (
    channels,
    copy_release,
    fetch_release,
    list_releases,
    publish,
    read_channel,
    read_release,
    resolve,
)
from medforge.release.sign import approvals, approve, is_approved, load_public_key, new_key
from medforge.storage import Store

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
ABOUT = {"name": "eyes", "base": "tiny:qwen3-vl", "dataset": "phantom", "licence": "CC0-1.0", "languages": ["en"]}
RULES = [RuleConfig(name="good-enough", metric="exact_match", bound=0.5, margin=0.1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    with serve(root) as environment:
        yield Store.from_environment(environment)


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return "t-" + sha256_bytes(request.node.nodeid.encode())[:12]


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """The parts of a release that passes."""
    return _parts(tmp_path / "parts", 0.9)


def _parts(folder: Path, figure: float) -> dict[str, Path]:
    results = {
        "arms": {
            arm: {"all": {"exact_match": {"value": value, "n": 100}}}
            for arm, value in (("tuned", figure), ("base", 0.4))
        }
    }
    write_json(folder / "results.json", results)
    write_json(folder / "verdict.json", judge(results, PolicyConfig(name="unit", rules=RULES)))
    write_json(folder / "model" / "config.json", {"figure": figure})
    (folder / "model" / "weights.bin").write_bytes(b"\0" * 70_000)
    return {name: folder / name for name in ("model", "results.json", "verdict.json")}


def test_a_release_is_published_found_and_fetched(
    store: Store, bucket: str, parts: dict[str, Path], tmp_path: Path
) -> None:
    made = publish(store, bucket, "candidate", parts, ABOUT, NOW)
    digest = made["release"]
    assert made == {
        "release": digest,
        "outcome": "published",
        "channel": "candidate",
        "published_at": "2026-01-02T03:04:05+00:00",
        "previous": None,
    }
    assert sha256_bytes(store.get(bucket, f"releases/{digest}/manifest.json")) == digest
    assert {resolve(store, bucket, name) for name in (digest, digest[:6], "candidate")} == {digest}

    manifest = fetch_release(store, bucket, digest, tmp_path / "got")
    names = ["README.md", "model/config.json", "model/weights.bin", "results.json", "sbom.json", "verdict.json"]
    assert sorted(manifest["files"]) == list_files(tmp_path / "got") == names
    fetch_release(store, bucket, digest, tmp_path / "model", part="model")
    assert tree_digest(tmp_path / "model") == tree_digest(parts["model"])
    with pytest.raises(ValueError, match="has no folder 'adapter'"):
        fetch_release(store, bucket, digest, tmp_path / "none", part="adapter")

    store.put(bucket, f"releases/{digest}/signatures/one.json", b"{}")
    copy_release(store, bucket, digest, tmp_path / "whole")
    assert sorted([*names, "manifest.json", "signatures/one.json"]) == list_files(tmp_path / "whole")
    assert sha256_bytes((tmp_path / "whole" / "manifest.json").read_bytes()) == digest

    card = (tmp_path / "got" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny:qwen3-vl"
    assert front["license_name"] == "CC0-1.0"
    assert "Not for diagnostic use without review" in card
    assert "| all | exact_match | 0.9 | 0.4 | 100 |" in card
    sbom = json.loads((tmp_path / "got" / "sbom.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5")
    names = [component["name"] for component in sbom["components"]]
    assert "minio" in names
    assert names == sorted(set(names))


def test_a_second_run_reuses_the_release_and_the_channel(store: Store, bucket: str, parts: dict[str, Path]) -> None:
    first = publish(store, bucket, "candidate", parts, ABOUT, NOW)
    again = publish(store, bucket, "candidate", parts, ABOUT, NOW + timedelta(days=1))
    assert again == {**first, "outcome": "reused"}


def test_a_channel_remembers_its_previous_release(store: Store, bucket: str, tmp_path: Path) -> None:
    first = publish(store, bucket, "champion", _parts(tmp_path / "1", 0.8), ABOUT, NOW)
    second = publish(store, bucket, "champion", _parts(tmp_path / "2", 0.9), ABOUT, NOW)
    assert second["previous"] == first["release"] != second["release"]
    assert channels(store, bucket) == {"champion": second["release"]}
    publish(store, bucket, "candidate", _parts(tmp_path / "1", 0.8), ABOUT, NOW)
    named = {row["release"]: row["channels"] for row in list_releases(store, bucket)}
    assert named == {first["release"]: ["candidate"], second["release"]: ["champion"]}


def test_an_interrupted_release_is_completed(store: Store, bucket: str, root: Path, parts: dict[str, Path]) -> None:
    digest = publish(store, bucket, "candidate", parts, ABOUT, NOW)["release"]
    folder = root / "store" / bucket / "releases" / digest
    (folder / "manifest.json").unlink()
    (folder / "results.json").unlink()
    (folder / "model" / "weights.bin").write_bytes(b"\1" * 70_000)
    kept = (folder / "verdict.json").stat().st_mtime_ns
    time.sleep(0.02)
    assert list_releases(store, bucket)[0]["problem"] == "has no manifest: its upload was interrupted"
    with pytest.raises(ValueError, match="there is no such object"):
        read_release(store, bucket, digest)

    assert publish(store, bucket, "candidate", parts, ABOUT, NOW)["outcome"] == "completed"
    assert (folder / "model" / "weights.bin").read_bytes() == b"\0" * 70_000
    assert (folder / "verdict.json").stat().st_mtime_ns == kept
    read_release(store, bucket, digest)


def test_a_verdict_that_did_not_pass_is_not_published(store: Store, bucket: str, tmp_path: Path) -> None:
    parts = _parts(tmp_path / "parts", 0.45)
    with pytest.raises(ValueError, match="did not pass the policy:\n  good-enough"):
        publish(store, bucket, "candidate", parts, ABOUT, NOW)
    # A verdict that only says that it passed does not pass either.
    verdict = json.loads(parts["verdict.json"].read_text())
    write_json(parts["verdict.json"], {**verdict, "passed": True})
    with pytest.raises(ValueError, match="good-enough"):
        publish(store, bucket, "candidate", parts, ABOUT, NOW)
    with pytest.raises(ValueError, match=r"needs a verdict\.json"):
        publish(store, bucket, "candidate", {"model": parts["model"]}, ABOUT, NOW)
    assert not store.has_bucket(bucket)


def test_parts_that_cannot_be_are_told(store: Store, bucket: str, parts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("manifest.json", "README.md", "signatures", "signatures/x"):
        with pytest.raises(ValueError, match="the release's own"):
            publish(store, bucket, "candidate", {**parts, name: parts["model"]}, ABOUT, NOW)
    with pytest.raises(ValueError, match="no such file or folder"):
        publish(store, bucket, "candidate", {**parts, "report.html": tmp_path / "none"}, ABOUT, NOW)
    with pytest.raises(ValueError, match="no channel name"):
        publish(store, bucket, "../champion", parts, ABOUT, NOW)


@pytest.mark.parametrize("damage", ["manifest.json", "verdict.json", "model/weights.bin", "extra", "missing"])
def test_a_tampered_release_is_refused(
    store: Store, bucket: str, root: Path, parts: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    digest = publish(store, bucket, "candidate", parts, ABOUT, NOW)["release"]
    folder = root / "store" / bucket / "releases" / digest
    if damage == "extra":
        (folder / "model" / "evil.py").write_bytes(b"1")
    elif damage == "missing":
        (folder / "model" / "weights.bin").unlink()
    else:
        data = (folder / damage).read_bytes()
        (folder / damage).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    time.sleep(0.02)  # the server lists what changes beneath it after milliseconds
    with pytest.raises(ValueError, match=r"corrupted|evil\.py|weights\.bin\) missing"):
        fetch_release(store, bucket, digest, tmp_path / "got")
    if damage != "model/weights.bin":  # a listing and the small files tell; the big ones are read by `fetch_release`
        assert list_releases(store, bucket)[0]["problem"]
        key = tmp_path / "key"
        new_key(key)
        with pytest.raises(ValueError, match=r"corrupted|evil\.py|missing"):
            approve(store, bucket, digest, key, "R", "approve", "", NOW)
    if damage != "extra":
        with pytest.raises(ValueError, match=r"somebody changed it|corrupted"):
            publish(store, bucket, "candidate", parts, ABOUT, NOW)


def test_names_that_mean_nothing_or_too_much(store: Store, bucket: str, parts: dict[str, Path]) -> None:
    digest = publish(store, bucket, "candidate", parts, ABOUT, NOW)["release"]
    for name in (digest[:5], "champion", "0" * 64, "../x", ""):
        with pytest.raises(ValueError, match="no release or channel"):
            resolve(store, bucket, name)
    store.put(bucket, f"releases/{digest[:10]}{'0' * 54}/x", b"1")
    with pytest.raises(ValueError, match="more than one release"):
        resolve(store, bucket, digest[:8])
    assert resolve(store, bucket, digest) == digest
    assert read_channel(store, bucket, "none") is None


@pytest.fixture
def signer(store: Store, bucket: str, parts: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Signs the release with the key of a name, made on first use."""
    digest = publish(store, bucket, "candidate", parts, ABOUT, NOW)["release"]

    def sign(name: str, decision: Any = "approve", comment: str = "", now: datetime = NOW) -> dict[str, Any]:
        path = tmp_path / name
        if not path.exists():
            new_key(path)
        return approve(store, bucket, digest, path, name, decision, comment, now)

    return sign


def test_approval_needs_a_trusted_key_and_no_refusal(
    store: Store, bucket: str, signer: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    digest = resolve(store, bucket, "candidate")

    def status(*trusted: str) -> str:
        keys = [load_public_key(tmp_path / f"{name}.pub") for name in trusted]
        found: str = approvals(store, bucket, digest, keys)["status"]
        assert is_approved(store, bucket, digest, keys) is (found == "approved")
        return found

    new_key(tmp_path / "anna")
    assert status("anna") == "unsigned"
    signed = signer("boris")
    assert signed["payload"]["release"] == signed["payload"]["manifest_sha256"] == digest
    assert status() == "untrusted"
    assert status("anna") == "untrusted"
    assert status("anna", "boris") == "approved"
    signer("carla", "refuse", "sees findings that are not there")
    assert status("boris") == "approved"  # a stranger's refusal does not count
    assert status("boris", "carla") == "refused"
    signer("boris", "refuse")  # changed their mind
    assert status("boris") == "refused"


def test_a_decision_stands(store: Store, bucket: str, signer: Callable[..., dict[str, Any]]) -> None:
    first = signer("anna", comment="first")
    assert signer("anna", comment="second", now=NOW + timedelta(days=1)) == first


@pytest.mark.parametrize("damage", ["comment", "garbage", "renamed"])
def test_a_tampered_signature_is_bad(
    store: Store, bucket: str, signer: Callable[..., dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    digest = resolve(store, bucket, "candidate")
    signer("anna")
    document = signer("boris", "refuse")
    prefix = f"releases/{digest}/signatures"
    key = next(entry.key for entry in store.list(bucket, prefix) if entry.key.endswith("refuse.json"))
    if damage == "comment":
        document["payload"]["comment"] = "never mind"
        store.put(bucket, key, json.dumps(document).encode())
    elif damage == "garbage":
        store.put(bucket, key, b"\xff\x00")
    else:
        store.put(bucket, key, b"")
        store.put(bucket, key.replace("refuse", "approve"), json.dumps(document).encode())
    trusted = [load_public_key(tmp_path / f"{name}.pub") for name in ("anna", "boris")]
    found = approvals(store, bucket, digest, trusted)
    assert found["status"] == "bad"
    assert any(row["why"] for row in found["signatures"])
    signer("boris", "refuse")  # signing again puts the right document in its place
    assert approvals(store, bucket, digest, trusted)["status"] == "refused"


def test_the_commands(
    tmp_path: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MEDFORGE_S3_ENDPOINT", "MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        status = main(list(words))
        told = capsys.readouterr()
        return status, told.out + told.err

    assert run("releases") == (
        0,
        "No releases in bucket 'medforge' yet; `make pipeline-run` makes one. "
        "(There is no store at .medforge/store.)\n",
    )
    assert not (tmp_path / ".medforge").exists()

    policy = PolicyConfig(name="unit", rules=RULES)
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    assert run("gate", str(parts["results.json"]), "policy.yaml", "verdict.json")[0] == 0
    assert (tmp_path / "verdict.json").read_bytes() == parts["verdict.json"].read_bytes()
    bad = _parts(tmp_path / "bad", 0.45)
    status, told = run("gate", str(bad["results.json"]), "policy.yaml", "bad.json")
    assert status == 1
    assert "| good-enough | fail |" in told
    assert json.loads((tmp_path / "bad.json").read_text())["passed"] is False

    with serve(Path(".medforge")) as environment:
        digest = publish(Store.from_environment(environment), "medforge", "candidate", parts, ABOUT, NOW)["release"]
    assert run("signing-key", "anna")[0] == 0
    row = f"{digest[:12]}  eyes  candidate  passed   exact_match 0.900 (base 0.400)  "
    assert row + "unsigned" in run("releases")[1]
    status, told = run("approve", "candidate", "--key", "anna", "--reviewer", "Anna", "--comment", "fine")
    assert (status, f"{digest[:12]} is approved by Anna" in told) == (0, True)
    assert row + "untrusted" in run("releases")[1]
    assert row + "approved" in run("releases", "--trusted", "anna.pub")[1]
    assert run("approve", digest[:8], "--key", "anna", "--reviewer", "Anna", "--refuse")[0] == 0
    assert row + "refused" in run("releases", "--trusted", "anna.pub")[1]
    assert run("approve", "champion", "--key", "anna", "--reviewer", "Anna")[0] == 1
    assert run("releases", "--trusted", "anna")[0] == 1

    status, told = run("store", "get", f"s3://medforge/releases/{digest}", "copy")
    assert (status, told.endswith(" bytes\n")) == (0, True)  # and not: no manifest was there
    assert len(list_files(tmp_path / "copy" / "signatures")) == 2
    weights = Path(f".medforge/store/medforge/releases/{digest}/model/weights.bin")
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    assert run("store", "get", f"s3://medforge/releases/{digest}", "changed")[0] == 1
    assert not (tmp_path / "changed").exists()
