"""Checkpoints against kills, full disks, bad bytes and a failing store. The real server is in the integration tests."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge import checkpoints as module  # noqa: E402
from medforge.checkpoints import Checkpoint, Checkpoints  # noqa: E402
from medforge.files import list_files, sha256_file  # noqa: E402
from medforge.s3 import Entry  # noqa: E402

FILES = ["exp_avg.safetensors", "manifest.json", "state.json", "weights.safetensors"]


def tensors(step: int, size: int = 40) -> dict[str, dict[str, Any]]:
    """Groups whose values tell the step, so that a mixture of two checkpoints is seen."""
    return {
        "weights": {"a": torch.full((size,), float(step)), "b": torch.full((2, 3), step, dtype=torch.bfloat16)},
        "exp_avg": {"a": torch.arange(size) + step, "step": torch.tensor(float(step))},
    }


def save(kept: Checkpoints, step: int, best: bool = False) -> bool:
    return kept.save(step, tensors(step), {"step": step, "loss": 1 / (1 + step), "order": [3, 1, 2]}, best=best)


def check(found: Checkpoint | None, step: int) -> None:
    """`found` is the checkpoint of `step`, each value as `save` was given it."""
    assert found is not None
    assert found.step == step
    assert found.state == {"step": step, "loss": 1 / (1 + step), "order": [3, 1, 2]}
    for group, expected in tensors(step).items():
        read = found.tensors(group)
        assert set(read) == set(expected)
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    """The steps on the disk; fails if there is anything else."""
    return [int(name.removeprefix("step-")) for name in names(folder)]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, log: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "run", log=log.append)


def test_a_checkpoint_comes_back_as_it_went(kept: Checkpoints, log: list[str]) -> None:
    assert kept.latest() is None
    assert kept.best() is None
    assert save(kept, 120)
    assert names(kept.folder) == ["step-00000120"]
    assert names(kept.folder / "step-00000120") == FILES
    manifest = json.loads((kept.folder / "step-00000120" / "manifest.json").read_bytes())
    assert manifest["step"] == 120
    for name in set(FILES) - {"manifest.json"}:
        path = kept.folder / "step-00000120" / name
        assert manifest["files"][name] == {"sha256": sha256_file(path), "size": path.stat().st_size}
    check(kept.latest(), 120)
    assert kept.best() is None
    assert log == []
    with pytest.raises(ValueError, match=r"has no tensors 'exp_avg_sq'; there are: exp_avg, weights"):
        Checkpoint(120, kept.folder / "step-00000120", {}).tensors("exp_avg_sq")


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(Checkpoints(tmp_path / folder), 7)
    for name in FILES:
        assert sha256_file(tmp_path / "a/step-00000007" / name) == sha256_file(tmp_path / "b/step-00000007" / name)


def test_views_and_unordered_strides_are_saved(kept: Checkpoints) -> None:
    flat = torch.arange(12.0, requires_grad=True)
    kept.save(1, {"weights": {"left": flat[:4], "right": flat[4:], "turned": flat.view(3, 4).T}, "none": {}}, {})
    found = kept.latest()
    assert found is not None
    assert torch.equal(found.tensors("weights")["right"], torch.arange(4.0, 12.0))
    assert torch.equal(found.tensors("weights")["turned"], torch.arange(12.0).view(3, 4).T)
    assert found.tensors("none") == {}


def test_what_cannot_be_kept_is_refused(kept: Checkpoints, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"step-00000001.state\.json.*write null"):
            kept.save(1, {}, {"loss": [value]})
    with pytest.raises(ValueError, match=r"'\.\./x' cannot name a file"):
        kept.save(1, {"../x": {}}, {})
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="write s3://bucket/prefix"):
        Checkpoints(tmp_path, url="https://host/bucket")
    assert not kept.folder.exists()


def test_pruning_spares_the_newest_and_the_best(kept: Checkpoints, log: list[str]) -> None:
    for step in (10, 20, 30, 40, 50):
        save(kept, step, best=step in (10, 20))
    assert steps(kept.folder) == [20, 40, 50]
    again = Checkpoints(kept.folder, log=log.append)  # a restart knows the best without being told
    for step in (60, 70):
        save(again, step)
        check(again.best(), 20)
    assert steps(kept.folder) == [20, 60, 70]
    save(again, 80, best=True)
    assert steps(kept.folder) == [70, 80]
    check(Checkpoints(kept.folder, log=log.append).best(), 80)
    assert log == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    kept: Checkpoints, log: list[str], name: str, damage: str
) -> None:
    save(kept, 1, best=True)
    save(kept, 2, best=True)
    DAMAGES[damage](kept.folder / "step-00000002" / name)
    check(kept.latest(), 1)
    check(kept.best(), 1)
    assert len(log) == 2
    assert name in log[0]
    assert "step-00000002 skipped: " in log[0]
    # the run goes on from 1: the damaged one goes, and is not counted among those that are kept
    save(kept, 3)
    assert steps(kept.folder) == [1, 3]


def test_any_flipped_bit_is_seen(kept: Checkpoints) -> None:
    save(kept, 1)
    save(kept, 2)
    chance = random.Random(0)
    for name in FILES:
        path = kept.folder / "step-00000002" / name
        whole = path.read_bytes()
        # of the manifest, which no digest covers, one bit of every byte; of the rest some
        bits = [8 * byte + chance.randrange(8) for byte in range(len(whole))]
        bits = bits if name == "manifest.json" else chance.sample(bits, 50)
        for bit in bits:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            check(kept.latest(), 1)
        path.write_bytes(whole)
        check(kept.latest(), 2)


def test_all_damaged_is_none_and_said(kept: Checkpoints, log: list[str]) -> None:
    save(kept, 1)
    (kept.folder / "step-00000001" / "state.json").unlink()
    (kept.folder / "step-00000002").mkdir()
    assert kept.latest() is None
    assert ["half-deleted" in line for line in log] == [True, True]


def test_a_renamed_folder_is_not_another_step(kept: Checkpoints, log: list[str]) -> None:
    save(kept, 1)
    os.replace(kept.folder / "step-00000001", kept.folder / "step-00000005")
    assert kept.latest() is None
    assert "not that of step 5" in log[0]


def test_other_things_in_the_folder_are_left_alone(kept: Checkpoints) -> None:
    save(kept, 1)
    (kept.folder / "notes").mkdir()
    (kept.folder / "step-1").mkdir()
    (kept.folder / "step-00000009").write_bytes(b"a file")
    for step in (2, 3):
        save(kept, step)
    check(kept.latest(), 3)
    assert names(kept.folder) == ["notes", "step-00000002", "step-00000003", "step-00000009", "step-1"]


def test_what_does_not_fit_is_skipped_and_gives_way(kept: Checkpoints, log: list[str]) -> None:
    for step in (10, 20, 30):
        save(kept, step, best=step == 20)

    def at_most_10(state: Mapping[str, Any]) -> bool:
        if state["step"] == 20:
            raise ValueError("its learning rate is another")
        return state["step"] <= 10

    assert kept.latest(at_most_10) is None
    assert "step-00000030 skipped: its state does not fit this run" in log[0]
    assert "step-00000020 skipped: its learning rate is another" in log[1]
    assert kept.best() is None
    save(kept, 1)
    save(kept, 2)
    assert steps(kept.folder) == [1, 2]
    check(kept.latest(at_most_10), 2)


def test_reading_ranks_write_nothing(kept: Checkpoints, tmp_path: Path) -> None:
    save(kept, 1)
    save(kept, 2, best=True)
    os.replace(kept.folder / "step-00000002", kept.folder / "step-00000002.old")  # a kill amid a replacement
    (kept.folder / ".step-00000003.tmp").mkdir()
    before = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = Checkpoints(kept.folder, url="s3://bucket/never-asked")
    check(other.latest(fetch=False), 2)
    check(other.best(fetch=False), 2)
    assert Checkpoints(tmp_path / "none").latest(fetch=False) is None
    assert {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    check(kept.latest(), 2)  # the writer puts things in order
    assert steps(kept.folder) == [1, 2]


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", [20_000, 200_000, 10_000_000], ids=["between files", "in the first", "far too big"])
def test_a_full_disk_is_said_and_spares_what_was_there(small_disk: Path, log: list[str], size: int) -> None:
    kept = Checkpoints(small_disk, keep=2, log=log.append)
    assert save(kept, 1, best=True)
    assert save(kept, 2)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(small_disk_free(small_disk) - 100_000))
    assert not kept.save(3, tensors(3, size), {})
    need = (size * 4 + size * 8 + 12 + 4) / 2**20
    assert f"step 3 NOT saved: No space left on device: it needs {need:.1f} MiB" in log[0]
    assert "earlier checkpoints are untouched" in log[0]
    assert names(small_disk) == ["ballast", "step-00000001", "step-00000002"]
    assert small_disk_free(small_disk) == pytest.approx(100_000, abs=8192)
    check(kept.latest(), 2)
    check(kept.best(), 1)
    ballast.unlink()
    assert save(kept, 4)  # it goes on when there is room again
    check(kept.latest(), 4)
    assert len(log) == 1


def small_disk_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "replace"])
def test_errors_that_the_system_gives(
    kept: Checkpoints, log: list[str], monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    save(kept, 1)
    save(kept, 2)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if number in (errno.ENOSPC, errno.EDQUOT):
            assert not save(kept, 3)
            assert os.strerror(number) in log[0]
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                save(kept, 3)
    assert steps(kept.folder) == [1, 2]
    check(kept.latest(), 2)


# kills


def killed(work: Callable[[], object], after: float | None = None) -> bool:
    """Do `work` in a process of its own, which is killed `after` seconds. Whether it was killed, by us or itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let this process kill itself at the `number`-th call that changes the disk, right before it is done."""
    left = number

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "chmod"):
        patch.setattr(os, name, wrap(getattr(os, name)))
    patch.setattr(Path, "write_bytes", wrap(Path.write_bytes))
    patch.setattr("safetensors.torch.save_file", wrap(__import__("safetensors.torch").torch.save_file))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_every_call_that_changes_the_disk(tmp_path: Path, keep: int, again: bool) -> None:
    number, was_killed = 0, True
    while was_killed:
        number += 1
        folder = tmp_path / str(number)
        kept = Checkpoints(folder, keep, log=lambda _: None)
        for step in (1, 2, 3):
            save(kept, step, best=step == 1 or again)
        step = 3 if again else 4

        def work(number: int = number, kept: Checkpoints = kept, step: int = step) -> None:
            with pytest.MonkeyPatch.context() as patch:
                kill_at(patch, number)
                save(kept, step, best=again)

        was_killed = killed(work)
        fresh = Checkpoints(folder, keep, log=lambda _: None)
        newest = {3, 4} if was_killed else {step}
        for fetch in (False, True):
            found = fresh.latest(fetch=fetch)
            assert found is not None
            assert found.step in newest
            check(found, found.step)
        check(fresh.best(), 3 if again else 1)
        assert found is not None
        assert save(fresh, 5)
        assert steps(folder)[-keep:] == [found.step, 5][-keep:]
        check(fresh.best(), 3 if again else 1)
        check(fresh.latest(), 5)
    assert number > 15  # that many calls were interrupted


def test_kills_at_random_times(tmp_path: Path) -> None:
    chance, folder = random.Random(0), tmp_path / "run"
    told = tmp_path / "told"  # what a run knew to be saved when it was killed

    def tell(step: int, best: int) -> None:
        (tmp_path / "told.new").write_text(f"{step} {best}")
        os.replace(tmp_path / "told.new", told)

    def train() -> None:
        kept = Checkpoints(folder, log=lambda _: None)
        found = kept.latest()
        step, best = (found.step, found.state["best"]) if found else (0, 0)
        tell(step, best)
        while True:
            step += 1
            best = step if step % 7 == 0 else best
            assert kept.save(step, tensors(step, 20_000), {"best": best}, best=step == best)
            tell(step, best)

    tell(0, 0)
    saved = kills = 0
    while saved < 60:
        assert killed(train, after=0.02 + chance.random() * 0.1)
        kills += 1
        saved, best = map(int, told.read_text().split())
        kept = Checkpoints(folder, log=lambda _: None)
        found, found_best = kept.latest(fetch=False), kept.best(fetch=False)
        assert (found.step if found else 0) in (saved, saved + 1)
        if found:
            assert torch.equal(found.tensors("weights")["a"], tensors(found.step, 20_000)["weights"]["a"])
            assert (found_best.step if found_best else 0) == found.state["best"] >= best
            assert len(names(folder)) < 8  # what kills left is swept up again
    assert kills > 1


# the upload, against a store that is a folder


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
