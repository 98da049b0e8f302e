"""A stage that is killed, stopped or short of disk goes on, and ends with the bytes of an unbroken run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medforge import checkpoints as checkpoints_module
from medforge.config import StageConfig
from medforge.files import link_tree, tree_digest
from medforge.train import loop
from tests.unit.train.runs import (
    STAGE,
    about,
    at_step,
    changed,
    checkpoint,
    checkpoints,
    child,
    copy_work,
    figures,
    same_files,
    train,
    weights_are_those_of,
)

KILL = """
import os, signal
from medforge.checkpoints import Checkpoints
save = Checkpoints.save
def killed(self, step, *args, **rest):
    save(self, step, *args, **rest)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = killed
"""
SLOW = """
import time
one_step = loop.one_step
def slow(*args):
    time.sleep(0.3)
    return one_step(*args)
loop.one_step = slow
"""
# everything that draws random numbers; no interval is a multiple of another
MIXED = changed(
    lora={"r": 4, "alpha": 8, "dropout": 0.2},
    heads={},
    steps=7,
    evaluate_every=4,
    checkpoint_every=3,
    batch_size=6,
    micro_tokens=128,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The folder of a run from its start to its end; its adapter is out/01-see."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, base, phantoms, draw=True)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Iterator[dict[str, Path]]:
    """The folders of two such runs in processes of their own: one killed after its checkpoint of step 4, one that was
    sent SIGTERM at some time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("killed", "stopped")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "77")  # sets have another order in each process; that must not matter either
        killed = child(folders["killed"], base, phantoms, STAGE, KILL)
        stopped = child(folders["stopped"], base, phantoms, STAGE, SLOW)
    try:
        progress = folders["stopped"] / "logs" / "progress.jsonl"
        while not (progress.is_file() and progress.stat().st_size) and stopped.poll() is None:
            time.sleep(0.05)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate()[0]
        assert stopped.returncode == 143, said
        said = killed.communicate()[0]
        assert killed.returncode == -signal.SIGKILL, said
        yield folders
    finally:
        for process in (killed, stopped):
            process.kill()


def finished(folder: Path, base: Path, phantoms: Path, unbroken: Path) -> list[int]:
    """Go on in `folder` and compare; the steps that were taken are returned."""
    with pytest.MonkeyPatch.context() as patch:
        taken = at_step(patch, lambda _: None)
        same_files(train(folder, base, phantoms, draw=True), unbroken / "out" / "01-see")
    return taken


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, broken: dict[str, Path]
) -> None:
    """Also in another folder, and past newer checkpoints that the kill cut short."""
    assert not (broken["killed"] / "out").exists()
    copy_work(broken["killed"], tmp_path)
    for step, name in ((5, "weights.safetensors"), (6, "manifest.json")):
        torn = checkpoint(tmp_path, step)
        shutil.copytree(checkpoint(tmp_path, 4), torn)
        (torn / name).write_bytes((torn / name).read_bytes()[:100])
    shutil.copytree(checkpoint(tmp_path, 4), checkpoint(tmp_path, 6).with_name(".step-00000006.tmp"))
    assert finished(tmp_path, base, phantoms, unbroken) == [5, 6]
    assert checkpoints(tmp_path) == [4, 6]
    assert not list((tmp_path / "work" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["exp_avg.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_that_was_half_deleted_is_passed_over(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, broken: dict[str, Path], name: str
) -> None:
    copy_work(broken["killed"], tmp_path)
    (checkpoint(tmp_path, 4) / name).unlink()
    assert finished(tmp_path, base, phantoms, unbroken) == [3, 4, 5, 6]


def test_a_checkpoint_of_other_settings_is_passed_over(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, broken: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_work(broken["killed"], tmp_path)
    taken = at_step(monkeypatch, lambda _: None)
    other = train(tmp_path, base, phantoms, changed(learning_rate=1e-3))
    assert taken == [1, 2, 3, 4, 5, 6]
    assert figures(other, "loss") != figures(unbroken / "out" / "01-see", "loss")


def test_a_run_killed_at_its_end_only_writes_its_result(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path
) -> None:
    link_tree(unbroken / "work", tmp_path / "work")
    assert finished(tmp_path, base, phantoms, unbroken) == []


def test_a_run_that_was_sent_sigterm_goes_on_to_the_same_bytes(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, broken: dict[str, Path]
) -> None:
    """A process of its own, and a signal that comes at no particular time."""
    assert not (broken["stopped"] / "out").exists()
    step = max(checkpoints(broken["stopped"]))
    copy_work(broken["stopped"], tmp_path)
    assert 2 <= step < 6
    assert finished(tmp_path, base, phantoms, unbroken) == list(range(step + 1, 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_at_every_step(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Stopped after each of its steps: also where a validation belongs, between two logged steps, and at the end."""
    stage = changed(MIXED, speed={"workers": workers})
    whole = train(tmp_path / "whole", base, phantoms, stage)
    assert figures(whole, "eval_loss").keys() == {4, 7}
    taken = at_step(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    for step in range(1, 8):
        with pytest.raises(SystemExit) as ending:
            train(tmp_path / "broken", base, phantoms, stage)
        assert ending.value.code == 143
        assert taken == list(range(1, step + 1))
        assert max(checkpoints(tmp_path / "broken")) == step
        assert not (tmp_path / "broken" / "out").exists()
        assert signal.getsignal(signal.SIGTERM) is before
    same_files(train(tmp_path / "broken", base, phantoms, stage), whole)
    assert len(taken) == 7


def test_sigterm_during_a_validation(
    tmp_path: Path, base: Path, phantoms: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the validation found is kept, and one more step is taken."""
    from medforge.train.validation import Validation

    validate = Validation.run
    with monkeypatch.context() as patch:

        def stopped(self: Any, *args: Any) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return validate(self, *args)

        patch.setattr(Validation, "run", stopped)
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, base, phantoms)
    assert max(checkpoints(tmp_path)) == 3
    assert finished(tmp_path, base, phantoms, unbroken) == [4, 5, 6]


class FullDisk:
    """Has no space for the checkpoints of some steps, and a little less after each."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: set[int]) -> None:
        self.steps = steps
        self._write = checkpoints_module.write_files
        patch.setattr(checkpoints_module, "write_files", self)

    def __call__(self, folder: Path, step: int, *args: Any) -> None:
        self._write(folder, step, *args)
        if step in self.steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def test_training_goes_on_when_the_disk_is_full(
    tmp_path: Path,
    base: Path,
    phantoms: Path,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FullDisk(monkeypatch, {4})
    kept: dict[int, str] = {}

    def look(step: int) -> None:
        kept[step] = tree_digest(checkpoint(tmp_path, 2)) if step > 2 else ""

    taken = at_step(monkeypatch, look)
    same_files(train(tmp_path, base, phantoms, draw=True), unbroken / "out" / "01-see")
    assert taken == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path) == [2, 6]
    assert kept[3] == kept[6] == tree_digest(checkpoint(tmp_path, 2))
    assert "checkpoint of step 4 NOT saved: No space left on device" in capsys.readouterr().out


def rising(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Let validation find the step `best` to be the best of all."""
    from medforge.train.validation import Validation

    steps = iter(range(2, 100, 2))

    def scripted(self: Any, show: Any) -> dict[str, float]:
        return {"loss": 1.0 + abs(next(steps) - best)}

    monkeypatch.setattr(Validation, "run", scripted)


@pytest.mark.parametrize("full", [{4}, {4, 6}, {2, 4, 6}], ids=str)
def test_a_result_that_could_not_be_saved_is_told_and_made_up_for(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, full: set[int]
) -> None:
    """Step 4 is the best. Without its checkpoint there is no result; with room, another run makes it."""
    with monkeypatch.context() as patch:
        rising(patch, best=4)
        whole = train(tmp_path / "whole", base, phantoms)
    assert about(whole)["best_step"] == 4
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        rising(patch, best=4)
        FullDisk(patch, full)
        with pytest.raises(ValueError, match="the checkpoint of step 4, which is the result, could not be written"):
            train(folder, base, phantoms)
    assert not (folder / "out").exists()
    assert set(checkpoints(folder)) == {2, 4, 6} - full
    with monkeypatch.context() as patch:
        validations = iter({2: [2, 4, 6], 0: [4, 6]}[2 if 2 in full else 0])
        from medforge.train.validation import Validation

        patch.setattr(Validation, "run", lambda *_: {"loss": 1.0 + abs(next(validations) - 4)})
        same_files(train(folder, base, phantoms), whole)


def test_a_best_checkpoint_that_was_lost_is_made_again(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint alone could never give the result, however often the stage is run."""
    stage = changed(learning_rate=50.0, schedule="constant", warmup=0.0)
    whole = train(tmp_path / "whole", base, phantoms, stage)
    best = about(whole)["best_step"]
    assert best < 6
    copy_work(tmp_path / "whole", tmp_path / "lost")
    shutil.rmtree(checkpoint(tmp_path / "lost", best))
    taken = at_step(monkeypatch, lambda _: None)
    same_files(train(tmp_path / "lost", base, phantoms, stage), whole)
    assert taken[-1] == 6 and best in taken


def test_the_best_checkpoint_is_what_is_kept(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """A learning rate that is far too large makes the validation loss rise; an interruption does not hide it."""
    stage = changed(learning_rate=50.0, schedule="constant", warmup=0.0, steps=8)
    adapter = train(tmp_path / "one", base, phantoms, stage)
    told, losses = about(adapter), figures(adapter, "eval_loss")
    assert told["best_step"] == min(losses, key=lambda step: losses[step]) < 6
    assert told["eval_loss"] == min(losses.values())
    assert checkpoints(tmp_path / "one") == [told["best_step"], 6, 8]
    weights_are_those_of(adapter, checkpoint(tmp_path / "one", told["best_step"]))
    shutil.move(tmp_path / "one" / "work", tmp_path / "two" / "work")
    same_files(train(tmp_path / "two", base, phantoms, stage), adapter)


def test_early_stopping(tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage ends after `patience` validations without gain; running it again, also after a kill, trains no more."""
    stage = changed(learning_rate=50.0, schedule="constant", warmup=0.0, steps=20, patience=2)
    taken = at_step(monkeypatch, lambda _: None)
    adapter = train(tmp_path / "one", base, phantoms, stage)
    told, losses = about(adapter), figures(adapter, "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    assert told["best_step"] == best
    assert told["steps"] == best + 2 * 2 == len(taken) < 20
    copy_work(tmp_path / "one", tmp_path / "two")
    same_files(train(tmp_path / "two", base, phantoms, stage), adapter)
    assert len(taken) == told["steps"]


def test_early_stopping_where_the_run_was_stopped(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at the very step whose validation ends the stage: the resumed run validates, and then ends too."""
    stage = changed(learning_rate=50.0, schedule="constant", warmup=0.0, steps=20, patience=1)
    whole = train(tmp_path / "whole", base, phantoms, stage)
    end = about(whole)["steps"]
    with monkeypatch.context() as patch:
        at_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == end else None)
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path / "broken", base, phantoms, stage)
    taken = at_step(monkeypatch, lambda _: None)
    same_files(train(tmp_path / "broken", base, phantoms, stage), whole)
    assert taken == []


def test_the_state_that_is_kept(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """A checkpoint between two logged steps holds the losses that are not yet in the curves."""
    from medforge.files import read_json

    stage: StageConfig = changed(steps=4, evaluate_every=4, checkpoint_every=3)
    adapter = train(tmp_path, base, phantoms, stage)
    state = read_json(checkpoint(tmp_path, 3) / "state.json")
    assert state.keys() - {"identity"} == loop.State().__dict__.keys()
    assert (state["step"], state["curves"], state["best"]) == (3, [], None)
    assert [loss for loss, _ in state["unlogged"]] == state["losses"]
    last = read_json(checkpoint(tmp_path, 4) / "state.json")
    assert last["losses"][:3] == state["losses"]
    assert figures(adapter, "loss")[4] == pytest.approx(sum(last["losses"]) / 4)
