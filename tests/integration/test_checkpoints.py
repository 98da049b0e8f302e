"""Checkpoints in a real object store: the embedded server, also killed and started again beneath a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge import checkpoints as module  # noqa: E402
from medforge.checkpoints import Checkpoint, Checkpoints  # noqa: E402
from medforge.embedded import serve  # noqa: E402
from medforge.files import list_files, tree_digest  # noqa: E402
from medforge.storage import Store  # noqa: E402

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("embedded")
    with serve(root) as values:
        yield {**values, "ROOT": str(root)}


@pytest.fixture
def stored(environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder beneath the server where the objects of the test's url are."""
    for name, value in environment.items():
        if name.startswith("MEDFORGE_"):
            monkeypatch.setenv(name, value)
    return Path(environment["ROOT"]) / "store" / url.removeprefix("s3://")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/runs/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, url: str, stored: Path, log: list[str]) -> Iterator[Callable[..., Checkpoints]]:
    """Makes the checkpoints of a pod: the folder is its own, the url is shared."""
    made: list[Checkpoints] = []

    def make(pod: str = "pod", **options: Any) -> Checkpoints:
        made.append(Checkpoints(tmp_path / pod, url=url, log=log.append, **options))
        return made[-1]

    yield make
    for one in made:
        one.close(0)


def weights(step: int) -> dict[str, dict[str, Any]]:
    # more than the 16 MiB of one part of an upload
    return {"weights": {"w": torch.full((5 << 20,), float(step))}, "exp_avg": {"w": torch.arange(9) + step}}


def save(kept: Checkpoints, step: int, best: bool = False) -> None:
    assert kept.save(step, weights(step), {"step": step}, best=best)


def check(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.state) == (step, {"step": step})
    for group, tensors in weights(step).items():
        assert torch.equal(found.tensors(group)["w"], tensors["w"])


def whole(stored: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in stored.glob("step-*/manifest.json"))


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_fresh_pod_goes_on_from_the_store(
    make: Callable[..., Checkpoints], stored: Path, log: list[str], tmp_path: Path, url: str
) -> None:
    kept = make("one")
    assert kept.latest() is None  # there is no bucket yet
    for step in (1, 2, 3, 4):
        save(kept, step, best=step == 1)
        wait(lambda: not kept._unsent)
    kept.close()
    assert whole(stored) == [1, 3, 4]
    assert list_files(stored / "step-00000002") == [] or not (stored / "step-00000002").exists()
    assert tree_digest(stored / "step-00000004") == tree_digest(kept.folder / "step-00000004")
    assert log == []
    fresh = make("two")
    check(fresh.latest(), 4)
    check(fresh.best(), 1)
    assert sorted(p.name for p in fresh.folder.iterdir()) == ["step-00000001", "step-00000004"]
    assert log == [f"fetched checkpoint {url}/step-00000004", f"fetched checkpoint {url}/step-00000001"]
    check(Checkpoints(fresh.folder, url=url).latest(fetch=False), 4)  # another rank of the pod
    save(fresh, 5)
    fresh.close()
    assert whole(stored) == [1, 4, 5]
    # the first pod comes back to a disk that is behind the store
    check(make("one").latest(), 5)


def test_a_half_uploaded_checkpoint_is_passed_over_and_removed(
    make: Callable[..., Checkpoints], stored: Path, log: list[str]
) -> None:
    kept = make("one")
    for step in (1, 2):
        save(kept, step)
    kept.close()
    (stored / "step-00000002" / "manifest.json").unlink()
    time.sleep(0.02)  # the server lists what changes beneath it after milliseconds
    fresh = make("two")
    check(fresh.latest(), 1)
    assert "step-00000002 skipped: is half-uploaded" in log[0]
    save(fresh, 3)
    fresh.close()
    assert whole(stored) == [1, 3]
    assert not list(stored.glob("step-00000002/*"))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_in_the_store_is_seen(
    make: Callable[..., Checkpoints], stored: Path, log: list[str], name: str, damage: str
) -> None:
    kept = make("one")
    for step in (1, 2):
        save(kept, step)
    kept.close()
    path = stored / "step-00000002" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    time.sleep(0.02)
    fresh = make("two")
    check(fresh.latest(), 1)
    assert sorted(p.name for p in fresh.folder.iterdir()) == ["step-00000001"]
    assert "step-00000002 skipped: " in log[0]
    save(fresh, 2)  # takes the place of the damaged one
    fresh.close()
    check(make("three").latest(), 2)


def test_what_is_corrupt_on_the_disk_is_fetched(make: Callable[..., Checkpoints], log: list[str]) -> None:
    kept = make()
    for step in (1, 2):
        save(kept, step)
    kept.close()
    path = kept.folder / "step-00000002" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    check(make().latest(), 2)
    assert "weights.safetensors is corrupted" in log[0]
    assert "fetched" in log[1]
    check(make().latest(fetch=False), 2)


def test_what_does_not_fit_is_not_fetched(make: Callable[..., Checkpoints], log: list[str]) -> None:
    kept = make("one")
    for step in (1, 2):
        save(kept, step)
    kept.close()
    fresh = make("two")
    check(fresh.latest(lambda state: state["step"] == 1), 1)
    assert sorted(p.name for p in fresh.folder.iterdir()) == ["step-00000001"]
    assert "step-00000002 skipped: its state does not fit this run" in log[0]


@contextmanager
def server(root: Path, port: int) -> Iterator[None]:
    """rclone at a fixed port, so that it can go down and come back where it was."""
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(root), "--config", ""]
    command += ["--addr", f"127.0.0.1:{port}", "--dir-cache-time", "5ms", "--etag-hash", ""]
    keys = {"RCLONE_AUTH_KEY": '"key,long-secret"'}
    with subprocess.Popen(command, env=os.environ | keys, stderr=subprocess.DEVNULL) as process:
        try:
            store = Store(f"127.0.0.1:{port}", "key", "long-secret", "us-east-1", False)
            wait(lambda: _answers(store))
            yield
        finally:
            process.kill()


def _answers(store: Store) -> bool:
    try:
        return store.buckets() is not None
    except ValueError:
        return False


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_store_that_goes_down_and_comes_back(tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, port = tmp_path / "store", _free_port()
    root.mkdir()
    for name, value in {"ENDPOINT": f"127.0.0.1:{port}", "ACCESS_KEY": "key", "SECRET_KEY": "long-secret"}.items():
        monkeypatch.setenv(f"MEDFORGE_S3_{name}", value)
    monkeypatch.setenv("MEDFORGE_S3_SECURE", "false")
    monkeypatch.setattr(module, "_PAUSES", (0.1, 0.1))
    url, stored = f"s3://{BUCKET}/run", root / BUCKET / "run"
    kept = Checkpoints(tmp_path / "one", url=url, log=log.append)
    with server(root, port):
        assert kept.latest() is None
        save(kept, 1)
        wait(lambda: not kept._unsent)
    began = time.monotonic()
    save(kept, 2, best=True)
    assert time.monotonic() - began < 5  # training does not wait for it
    wait(lambda: log)
    assert "step 2 is not uploaded" in log[0]
    assert "cannot be reached" in log[0]
    save(kept, 3)
    wait(lambda: len(log) == 2)
    with server(root, port):
        save(kept, 4)
        kept.close()
        assert whole(stored) == [2, 4]  # 2 is made up for, being the best; 3 is not needed any more
        check(Checkpoints(tmp_path / "two", url=url, log=log.append).latest(), 4)
        check(Checkpoints(tmp_path / "three", url=url, log=log.append).best(), 2)
    # down again: a pod that has nothing does not begin anew, one that has something goes on
    with pytest.raises(ValueError, match="cannot be reached"):
        Checkpoints(tmp_path / "four", url=url, log=log.append).latest()
    check(Checkpoints(tmp_path / "one", url=url, log=log.append).latest(), 4)
    assert "may have a newer checkpoint" in log[-1]
    last = Checkpoints(tmp_path / "one", url=url, log=log.append)
    save(last, 5)
    began = time.monotonic()
    last.close(0.5)
    assert time.monotonic() - began < 3
    assert log[-1] == f"not uploaded to {url}: the checkpoint of step 5; see {tmp_path / 'one'}"


CHILD = """
import sys
from pathlib import Path
import torch
from medforge.checkpoints import Checkpoints
kept = Checkpoints(Path(sys.argv[1]), url=sys.argv[2])
found = kept.latest()
step = found.step if found else 0
print("from", step, flush=True)
while True:
    step += 1
    kept.save(step, {"weights": {"w": torch.full((5 << 20,), float(step))}, "exp_avg": {"w": torch.arange(9) + step}},
              {"step": step}, best=step % 3 == 0)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_pods_that_are_killed_amid_uploads(
    make: Callable[..., Checkpoints], stored: Path, url: str, tmp_path: Path
) -> None:
    """Each pod has a fresh disk: whatever the kill left in the store, the next goes on from a whole checkpoint."""
    reached = 0
    for pod, saves in enumerate((3, 1, 4)):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / f"child-{pod}"), url],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        start = int(next(line for line in lines if line.startswith("from")).split()[1])
        assert start >= reached
        before = set(whole(stored))
        for _ in range(saves):
            next(lines)
        wait(lambda before=before: set(whole(stored)) - before)  # type: ignore[misc]
        time.sleep(0.05 * pod)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        found = make(f"after-{pod}").latest()
        assert found is not None
        assert found.step >= max(before, default=0)
        check(found, found.step)
        reached = found.step
    assert reached > 2
