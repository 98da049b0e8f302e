"""`medforge deploy`, `rollout …` and `verify-release` as an operator types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medforge.cli import main
from tests.integration.rollout.conftest import Site, state


def settings(site: Site) -> dict[str, str]:
    """What the commands find in their environment."""
    config = site.folder / "kubeconfig"
    config.write_text(site.cluster.kubeconfig())
    return {"MEDFORGE_TRUSTED_KEYS": (site.folder / "key.pub").read_text(), "KUBECONFIG": str(config)}


@pytest.fixture
def run(
    site: Site, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """`medforge …` in this process: what it printed, and what it complained of."""
    for name, value in (environment | settings(site)).items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> tuple[str, str]:
        status = main(words)
        out, err = capsys.readouterr()
        assert bool(status) == ("medforge " in err), err
        return out, err

    return run


def test_the_commands(site: Site, old: str, run: Callable[..., tuple[str, str]]) -> None:
    new = site.publish(0.8)
    site.cluster.looks_until_ready = 0
    assert run("deploy", new[:12], "--canary", "10")[0] == (
        f"{new[:12]} is whole, passed its policy, and was approved\n"
        "medforge-canary is made; it becomes ready when its model is loaded\n"
        f"{new[:12]} is given to 10.0% of the callers\n"
    )
    out, _ = run("rollout", "status")
    assert out.splitlines()[:3] == [
        f"stable  {old[:12]}  ready", f"canary  {new[:12]}  ready", "callers 10.0% are given the canary",
    ]  # fmt: skip
    assert f"{new[:12]}  canary" in out.splitlines()[3]
    assert (
        run("rollout", "promote", "--settle-seconds", "0")[0]
        == f"{new[:12]} is given to all callers; champion names it\n"
    )
    out, _ = run("rollout", "rollback", "--settle-seconds", "0", "--reason", "too slow")
    assert out == f"{new[:12]} is rolled back; {old[:12]} is given to all callers\n"
    assert run("deploy", new, "--canary", "0")[1].startswith("medforge deploy: the canary's share is 0%")
    assert "is named 'nothing'" in run("deploy", "nothing", "--canary", "5")[1]
    assert run("rollout", "rollback")[0].splitlines()[-1].startswith("nothing was rolled back: there is no canary")
    assert f"nothing would be rolled back, not {new[:8]}" in run("rollout", "rollback", new[:8])[1]
    assert "times make no sense" in run("rollout", "promote", "--settle-seconds", "-1")[1]
    assert "MEDFORGE_PROMETHEUS_URL" in run("rollout", "watch")[1]


def test_a_command_that_was_killed(
    site: Site, old: str, environment: dict[str, str], run: Callable[..., tuple[str, str]]
) -> None:
    new = site.publish(0.8)
    site.cluster.never_ready.add("medforge-canary")
    command = [sys.executable, "-m", "medforge", "deploy", new, "--canary", "10"]
    process = subprocess.Popen(command, env=os.environ | environment | settings(site), stdout=subprocess.DEVNULL)
    site.cluster.before = lambda method, path: (
        process.send_signal(signal.SIGKILL) if method == "GET" and "deployments/medforge-canary" in path else None
    )
    assert process.wait(60) == -signal.SIGKILL
    site.cluster.before = lambda method, path: None
    assert "is under way; if it was killed, try again after" in run("deploy", new, "--canary", "10")[1]
    out, _ = run("rollout", "rollback", "--settle-seconds", "0")
    assert out == f"{new[:12]} is rolled back; {old[:12]} is given to all callers\n"
    assert state(site)["holder"] == {} and state(site)["canary"] is None


def test_a_canary_is_taken_back_without_keys(
    site: Site, old: str, run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, times = site.publish(0.8), ("--settle-seconds", "0")
    site.cluster.looks_until_ready = 0
    run("deploy", new, "--canary", "10")
    keys = os.environ["MEDFORGE_TRUSTED_KEYS"]
    monkeypatch.delenv("MEDFORGE_TRUSTED_KEYS")
    assert "holds no public key" in run("rollout", "promote", *times)[1]
    assert run("rollout", "rollback", *times)[0] == f"{new[:12]} is rolled back; {old[:12]} is given to all callers\n"
    assert state(site)["canary"] is None
    monkeypatch.setenv("MEDFORGE_TRUSTED_KEYS", keys)
    run("deploy", new, "--canary", "10")
    run("rollout", "promote", *times)
    monkeypatch.delenv("MEDFORGE_TRUSTED_KEYS")
    # going back to another release is to serve it: that asks for its approval
    assert "only one that a trusted" in run("rollout", "rollback", *times)[1]


def test_a_release_is_verified_and_downloaded(site: Site, run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    new = site.publish(0.8)
    words = ("verify-release", new[:10], "--bucket", site.bucket)
    assert run(*words)[0] == f"{new} is whole, and approved by a trusted reviewer\n"
    target = tmp_path / "models" / "release"
    assert run(*words, "--out", str(target))[0].startswith(new)
    assert json.loads((target / "model" / "config.json").read_text()) == {"figure": 0.8}
    assert run("verify-release", str(target))[0] == f"{new} is whole, and approved by a trusted reviewer\n"
    assert run(*words, "--out", str(target))[0].startswith(new)  # as an init container that runs again
    other = site.publish(0.7)
    told = run("verify-release", other, "--bucket", site.bucket, "--out", str(target))[1]
    assert "is there already and is another thing" in told and f"is not of release {other}" in told
    left = target.with_name(".release.killed.tmp")
    (left / "release").mkdir(parents=True)
    (target / "model" / "config.json").write_text('{"figure": 1}\n')
    assert "is there already and is another thing" in run(*words, "--out", str(target))[1]
    assert run(*words, "--out", str(target.with_name("other")))[0].startswith(new) and left.is_dir()
    shutil.rmtree(target)
    assert run(*words, "--out", str(target))[0].startswith(new) and not left.exists()
    shutil.rmtree(target.with_name("other"))
    (target / "model" / "config.json").write_text('{"figure": 1}\n')
    assert "config.json" in run("verify-release", str(target))[1]
    key = f"releases/{new}/model/config.json"
    site.store.put(site.bucket, key, site.store.get(site.bucket, key).replace(b"0.8", b"0.9"))
    assert "corrupted" in run(*words)[1]
    assert "config.json" in run(*words, "--out", str(target.with_name("other")))[1]
    assert [path.name for path in target.parent.iterdir()] == ["release"]
    unsigned = site.publish(0.9, approved=False)
    assert "is unsigned" in run("verify-release", unsigned, "--bucket", site.bucket)[1]


def test_a_containers_user_has_no_name(
    site: Site, old: str, run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr("getpass.getuser", nobody)
    site.cluster.looks_until_ready = 0
    run("deploy", site.publish(0.8), "--canary", "10")
    assert f"(user-{os.getuid()}@" in run("rollout", "status")[0]
