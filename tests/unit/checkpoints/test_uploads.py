"""Checkpoints that are sent to a store, which may fail. The real server is in the integration tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge import checkpoints as module  # noqa: E402
from medforge.checkpoints import Checkpoints  # noqa: E402
from medforge.files import list_files, sha256_file  # noqa: E402
from medforge.s3 import Entry  # noqa: E402
from tests.unit.checkpoints.kept import FILES, check, names, save, steps  # noqa: E402

Steps = list[int]
Entries = list[Entry]


class FolderStore:
    """As much of the store as checkpoints use."""

    url = "http://fake"

    def __init__(self, root: Path) -> None:
        self.root, self.order = root, list[str]()
        self.down = self.refuse_removal = False
        self.gate = threading.Event()  # sending waits for it
        self.gate.set()

    def _path(self, bucket: str, key: str = "") -> Path:
        if self.down:
            raise ValueError("the object store cannot be reached")
        return self.root / bucket / key

    def has_bucket(self, bucket: str) -> bool:
        return self._path(bucket).is_dir()

    def ensure_bucket(self, bucket: str) -> None:
        self._path(bucket).mkdir(parents=True, exist_ok=True)

    def exists(self, bucket: str, key: str) -> bool:
        return self._path(bucket, key).is_file()

    def list(self, bucket: str, prefix: str) -> Entries:
        root = self._path(bucket)
        return [Entry(name, 0, "") for name in list_files(root) if name.startswith(prefix)]

    def get(self, bucket: str, key: str) -> bytes:
        path = self._path(bucket, key)
        if not path.is_file():
            raise ValueError(f"{key}: there is no such object")
        return path.read_bytes()

    def put(self, bucket: str, key: str, data: bytes) -> None:
        path = self._path(bucket, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.order.append(key)

    def send(self, source: Path, bucket: str, key: str, count: Callable[[int], None]) -> dict[str, Any]:
        while not self.gate.wait(0.01):
            count(0)
        self.put(bucket, key, source.read_bytes())
        return {"sha256": sha256_file(source), "size": source.stat().st_size}

    def remove(self, bucket: str, key: str) -> None:
        if self.refuse_removal:
            raise ValueError("removal is not allowed")
        self._path(bucket, key).unlink()
        self.order.append(f"-{key}")

    def download_files(self, bucket: str, prefix: str, files: Mapping[str, Any], target: Path) -> None:
        target.mkdir(parents=True)
        for name, info in files.items():
            (target / name).write_bytes(self.get(bucket, f"{prefix}/{name}"))
            if sha256_file(target / name) != info["sha256"]:
                raise ValueError(f"{name}: is corrupted")

    def steps(self) -> Steps:
        """The steps that are whole in the store."""
        return sorted(int(path.parent.name[5:]) for path in self.root.glob("bucket/run/step-*/manifest.json"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    store = FolderStore(tmp_path / "store")

    @contextmanager
    def connect() -> Iterator[FolderStore]:
        store._path("bucket")
        yield store

    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.02))
    return store


@pytest.fixture
def sent(tmp_path: Path, log: list[str], store: FolderStore) -> Iterator[Checkpoints]:
    kept = Checkpoints(tmp_path / "run", url="s3://bucket/run/", log=log.append)
    yield kept
    kept.close(0.1)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_uploads_put_the_manifest_last_and_prune_it_first(
    sent: Checkpoints, store: FolderStore, log: list[str]
) -> None:
    for step in (1, 2, 3, 4):
        save(sent, step, best=step == 2)
        wait(lambda: not sent._unsent)
    sent.close()
    assert store.steps() == steps(sent.folder) == [2, 3, 4]
    assert {p.name for p in store.root.glob("bucket/run/*") if any(p.iterdir())} == {f"step-0000000{n}" for n in "234"}
    for step in (1, 2, 3, 4):
        put = [key for key in store.order if f"/step-0000000{step}/" in key and not key.startswith("-")]
        assert sorted(Path(key).name for key in put) == FILES
        assert put[-1].endswith("manifest.json")
    gone = [key for key in store.order if key.startswith("-")]
    assert [Path(key).name for key in gone] == ["manifest.json", *sorted(set(FILES) - {"manifest.json"})]
    assert log == []


def test_training_never_waits_and_what_waits_stays_on_the_disk(
    sent: Checkpoints, store: FolderStore, log: list[str]
) -> None:
    store.gate.clear()
    save(sent, 1)
    wait(lambda: sent._sending == 1)
    began = time.monotonic()
    for step in (2, 3, 4, 5, 6):
        save(sent, step)
    assert time.monotonic() - began < 5
    assert [line.split(" is not uploaded")[0][-1] for line in log] == ["2", "3", "4"]
    assert steps(sent.folder) == [1, 5, 6]  # 1 is being sent
    store.gate.set()
    sent.close()
    assert [key for key in store.order if key.endswith("manifest.json") and key[0] != "-"] == [
        f"run/step-0000000{step}/manifest.json" for step in (1, 5, 6)
    ]
    assert store.steps() == [5, 6]
    assert len(log) == 3


def test_a_dropped_best_is_sent_later(sent: Checkpoints, store: FolderStore) -> None:
    store.gate.clear()
    save(sent, 1)
    wait(lambda: sent._sending == 1)
    for step in (2, 3, 4, 5):
        save(sent, step, best=step == 2)
    store.gate.set()
    sent.close()
    assert store.steps() == [2, 4, 5]
    assert steps(sent.folder) == [1, 2, 4, 5]  # 1 was being sent when the last was saved; the next save prunes it


def test_a_failed_upload_is_said_and_training_goes_on(sent: Checkpoints, store: FolderStore, log: list[str]) -> None:
    store.down = True
    assert save(sent, 1, best=True)
    wait(lambda: log)
    assert "step 1 is not uploaded to s3://bucket/run after several tries: the object store cannot be reached" in log[0]
    assert save(sent, 2)
    wait(lambda: len(log) == 2)
    store.down = False
    assert save(sent, 3)
    sent.close()
    assert store.steps() == [1, 3]  # the best is made up for
    assert log[2:] == ["not uploaded to s3://bucket/run: the checkpoint of step 2; see " + str(sent.folder)]


def test_an_upload_is_tried_again(
    sent: Checkpoints, store: FolderStore, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.05,) * 100)
    store.down = True
    save(sent, 1)
    time.sleep(0.12)
    store.down = False
    sent.close()
    assert store.steps() == [1]
    assert log == []


def test_closing_is_bounded_and_says_what_is_missing(sent: Checkpoints, store: FolderStore, log: list[str]) -> None:
    store.gate.clear()
    for step in (1, 2):
        save(sent, step)
    began = time.monotonic()
    sent.close(0.2)
    assert 0.2 <= time.monotonic() - began < 1
    assert log == [f"not uploaded to s3://bucket/run: the checkpoint of step 1, 2; see {sent.folder}"]
    assert sent._thread is not None
    assert not sent._thread.is_alive()
    assert store.steps() == []
    sent.close()  # again is nothing
    assert len(log) == 1


def test_a_file_that_changed_on_the_disk_is_not_vouched_for(
    sent: Checkpoints, store: FolderStore, log: list[str]
) -> None:
    store.gate.clear()
    save(sent, 1)
    path = sent.folder / "step-00000001" / "weights.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    store.gate.set()
    sent.close()
    assert store.steps() == []
    assert "weights.safetensors: is corrupted" in log[0]


def test_a_store_that_forbids_removal_still_takes_uploads(
    sent: Checkpoints, store: FolderStore, log: list[str]
) -> None:
    store.refuse_removal = True
    for step in (1, 2, 3):
        save(sent, step)
        wait(lambda: not sent._unsent)
    sent.close()
    assert store.steps() == [1, 2, 3]
    assert len(log) == 1
    assert "could not be removed, the next upload tries again: removal is not allowed" in log[0]


def test_a_store_that_cannot_be_asked(sent: Checkpoints, store: FolderStore, log: list[str]) -> None:
    store.down = True
    with pytest.raises(ValueError, match="cannot be reached"):  # never: None, and a run that begins anew
        sent.latest()
    save(sent, 4)
    check(sent.latest(), 4)
    assert "may have a newer checkpoint: the object store cannot be reached" in log[-1]


def test_a_store_that_fails_amid_a_fetch_is_not_a_bad_checkpoint(
    sent: Checkpoints, store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sent, 1)
    save(sent, 2)
    sent.close()

    def fail(*_: object) -> None:
        store.down = True
        raise ValueError("the object store cannot be reached")

    monkeypatch.setattr(store, "download_files", fail)
    fresh = Checkpoints(tmp_path / "fresh", url="s3://bucket/run", log=lambda _: None)
    with pytest.raises(ValueError, match="cannot be reached"):
        fresh.latest()
    assert names(fresh.folder) == []


def test_what_a_killed_run_did_not_send_is_sent_at_the_restart(
    sent: Checkpoints, store: FolderStore, log: list[str]
) -> None:
    alone = Checkpoints(sent.folder)  # without the store
    save(alone, 1, best=True)
    save(alone, 2)
    check(sent.latest(), 2)
    sent.close()
    assert store.steps() == [2]
    again = Checkpoints(sent.folder, url="s3://bucket/run", log=log.append)
    check(again.latest(), 2)
    save(again, 3)
    again.close()
    assert store.steps() == [1, 2, 3], log
