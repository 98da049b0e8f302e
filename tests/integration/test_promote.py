"""From an approval to the release that is served: whose signature counts, which release is chosen, and the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec import pipeline_spec_pb2

from medforge.config import PolicyConfig, RuleConfig
from medforge.embedded import serve
from medforge.files import sha256_bytes, write_json
from medforge.release.policy import judge
from medforge.release.promote import TRUSTED_KEYS, check, newest_approved, promote, read_keys, trusted_keys
from medforge.release.publish import publish, read_channel
from medforge.release.sign import approve, load_public_key, new_key
from medforge.storage import Store

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("promote")


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    with serve(root) as environment:
        yield Store.from_environment(environment)


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return "t-" + sha256_bytes(request.node.nodeid.encode())[:12]


@pytest.fixture
def make(store: Store, bucket: str, tmp_path: Path) -> Callable[[float], str]:
    """A function that publishes a release with a figure, and returns its digest."""

    def made(figure: float) -> str:
        folder = tmp_path / str(figure)
        cells = {arm: {"all": {"exact_match": {"value": v, "n": 9}}} for arm, v in (("tuned", figure), ("base", 0.4))}
        results = {"arms": cells}
        rules = [RuleConfig(name="good-enough", metric="exact_match", bound=0.5, margin=0.0, min_n=1)]
        write_json(folder / "results.json", results)
        write_json(folder / "verdict.json", judge(results, PolicyConfig(name="unit", rules=rules)))
        write_json(folder / "model" / "config.json", {"figure": figure})
        parts = {name: folder / name for name in ("model", "results.json", "verdict.json")}
        return str(publish(store, bucket, "candidate", parts, {"name": "eyes"}, NOW)["release"])

    return made


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "ours")
    new_key(tmp_path / "other" / "theirs")
    return tmp_path / "keys" / "ours"


def test_only_an_approved_release_is_promoted(
    store: Store, bucket: str, make: Callable[[float], str], key: Path, tmp_path: Path
) -> None:
    digest = make(0.9)
    trusted = [load_public_key(key.with_name("ours.pub"))]
    with pytest.raises(ValueError, match=r"is unsigned: only one that a trusted reviewer approved"):
        promote(store, bucket, digest, "champion", trusted, NOW)
    approve(store, bucket, digest, tmp_path / "other" / "theirs", "Them", "approve", "", NOW)
    with pytest.raises(ValueError, match="is untrusted"):
        promote(store, bucket, digest, "champion", trusted, NOW)
    approve(store, bucket, digest, key, "Us", "approve", "", NOW)
    assert promote(store, bucket, digest, "champion", trusted, NOW) == {
        "channel": "champion",
        "release": digest,
        "published_at": NOW.isoformat(timespec="seconds"),
        "previous": None,
    }
    approve(store, bucket, digest, key, "Us", "refuse", "seen too late", NOW)
    with pytest.raises(ValueError, match="is refused"):
        check(store, bucket, digest, trusted)
    assert read_channel(store, bucket, "champion") is not None  # what is served stays until another is promoted
    another = make(0.8)
    approve(store, bucket, another, key, "Us", "approve", "", NOW)
    with pytest.raises(ValueError, match="no channel name"):
        promote(store, bucket, another, "Champion!", trusted, NOW)


def test_what_is_served_is_the_champion_else_what_was_approved_last(
    store: Store, bucket: str, make: Callable[[float], str], key: Path
) -> None:
    trusted = [load_public_key(key.with_name("ours.pub"))]
    assert newest_approved(store, bucket, "champion", trusted) is None  # not even a bucket
    first, second, third = make(0.7), make(0.8), make(0.9)
    assert newest_approved(store, bucket, "champion", trusted) is None
    approve(store, bucket, second, key, "Us", "approve", "", NOW + timedelta(hours=2))
    approve(store, bucket, first, key, "Us", "approve", "", NOW + timedelta(hours=1))
    assert newest_approved(store, bucket, "champion", trusted) == second  # the third is newer, and unsigned
    promote(store, bucket, first, "champion", trusted, NOW)
    assert newest_approved(store, bucket, "champion", trusted) == first
    approve(store, bucket, first, key, "Us", "refuse", "", NOW + timedelta(hours=3))
    assert newest_approved(store, bucket, "champion", trusted) == second  # the champion was refused afterwards
    assert third != second


def test_keys_come_from_text_files_and_folders(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_key(key.with_name("second"))
    text = read_keys([key.parent])
    raw = {load_public_key(key.with_name(f"{name}.pub")).public_bytes_raw() for name in ("ours", "second")}
    assert {found.public_bytes_raw() for found in trusted_keys(text)} == raw
    monkeypatch.setenv(TRUSTED_KEYS, read_keys([key.with_name("ours.pub")]))
    assert len(trusted_keys()) == 1
    monkeypatch.delenv(TRUSTED_KEYS)
    with pytest.raises(ValueError, match=f"{TRUSTED_KEYS} holds no public key"):
        trusted_keys()
    with pytest.raises(ValueError, match="holds no public key"):
        trusted_keys(key.read_text())  # a private one


def run_release(root: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDFORGE_")}
    command = [sys.executable, "-m", "pipelines.release", "--root", str(root), "--runs", str(folder / "runs"), *words]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_the_pipeline_promotes_what_was_approved(
    root: Path, store: Store, bucket: str, make: Callable[[float], str], key: Path, tmp_path: Path
) -> None:
    digest = make(0.95)
    words = ["--bucket", bucket, "--trusted", str(key.with_name("ours.pub"))]
    refused = run_release(root, tmp_path, *words)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"release: approved: release {digest[:12]} is unsigned")
    assert "Traceback" not in refused.stderr
    assert read_channel(store, bucket, "champion") is None
    approve(store, bucket, digest, key, "Us", "approve", "", NOW)
    done = run_release(root, tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(f"champion: {digest} (before: none)")
    assert (read_channel(store, bucket, "champion") or {})["release"] == digest
    no_keys = run_release(root, tmp_path, "--bucket", bucket)
    assert no_keys.returncode == 1 and "MEDFORGE_TRUSTED_KEYS holds no public key" in no_keys.stderr


def test_the_pipeline_is_sound_for_kubeflow(tmp_path: Path) -> None:
    from pipelines.release import build

    path = tmp_path / "release.yaml"
    compiler.Compiler().compile(build(), str(path))
    spec = yaml.safe_load(path.read_text())
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    inner = {name: one["dag"]["tasks"] for name, one in spec["components"].items() if "dag" in one}
    assert spec["root"]["dag"]["tasks"]["rollback"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    steps = {name: task for tasks in [spec["root"]["dag"]["tasks"], *inner.values()] for name, task in tasks.items()}
    work = {"approved", "promote", "deploy", "watch", "complete", "rollback"}
    assert work <= set(steps)
    # each acts on what stands outside: an answer out of Kubeflow's cache would be none
    assert not [name for name in work if steps[name].get("cachingOptions", {}).get("enableCache")]
    # what is promoted is what was checked, and not what the caller named
    for name, given in (("promote", "release"), ("deploy", "release")):
        assert "approved-Output" in steps[name]["inputs"]["parameters"][given]["componentInputParameter"]
    assert steps["complete"]["inputs"]["parameters"]["release"]["taskOutputParameter"]["producerTask"] == "deploy"
    assert steps["watch"]["dependentTasks"] == ["deploy"]
    assert "watch" in steps["complete"]["dependentTasks"]
