"""Checkpoints against full disks and kills."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge.checkpoints import Checkpoints  # noqa: E402
from medforge.s3 import Entry  # noqa: E402
from tests.unit.checkpoints.kept import check, names, save, steps, tensors  # noqa: E402

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
