"""A stage in several processes by torchrun, and with its checkpoints in an object store."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medforge.config import CheckpointConfig, DataConfig, ParallelConfig, PhantomConfig, TinyConfig
from medforge.embedded import serve
from tests.unit.train.runs import (
    about,
    at_step,
    changed,
    checkpoint,
    checkpoints,
    close,
    copy_samples,
    figures,
    same_files,
    train,
)

# micro-batches enough for two; a claim, a box or a question of one kind may be in one process alone
STAGE = changed(
    heads={}, steps=4, batch_size=8, micro_tokens=128, evaluate_every=2, validation_samples=9, generate_samples=5
)
LONG = changed(
    lora={"r": 4, "alpha": 8}, steps=40, batch_size=8, micro_tokens=128, evaluate_every=5, generate_samples=0
)
TWO = ParallelConfig(processes=2)
FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_region_iou", "eval_match_auroc", "eval_accuracy")
PARENT = """
import sys
from pathlib import Path
from medforge.config import ModelConfig, ParallelConfig, StageConfig
from medforge.train import Inputs, run
base, data, folder = map(Path, sys.argv[1:4])
settings = StageConfig.model_validate_json(sys.argv[4])
run(Inputs(base, data, None), folder / "out", folder / "work", folder / "logs", settings, ModelConfig(), 3,
    ParallelConfig(processes=2))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medforge.models.tiny import build

    folder = tmp_path_factory.mktemp("tiny") / "base"
    build(folder, "qwen3-vl", TinyConfig(steps=0))
    return folder


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medforge.convert import run as convert

    folder = tmp_path_factory.mktemp("phantoms") / "dataset"
    convert("phantom", folder, DataConfig(source="phantom", phantom=PhantomConfig(images=24, size=96)))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """The adapter of one process."""
    return train(tmp_path_factory.mktemp("alone"), base, phantoms, STAGE)


def same_curves(one: Path, other: Path, tolerance: float) -> None:
    told, expected = about(one), about(other)
    assert told.keys() == expected.keys()
    for name in ("steps", "best_step", "best_by", "samples", "trainable_parameters", "base", "data"):
        assert told[name] == expected[name]
    for name in (name for name in FIGURES if any(name in row for row in expected["curves"])):
        close(figures(one, name), figures(other, name), tolerance)


def test_two_processes_train_as_one(tmp_path: Path, base: Path, phantoms: Path, alone: Path) -> None:
    """Dropout and claims too: random numbers follow the micro-batch, not the process."""
    adapter = train(tmp_path, base, phantoms, STAGE, parallel=TWO)
    same_curves(adapter, alone, 1e-4)
    assert all(any(name in row for row in about(adapter)["curves"]) for name in FIGURES)
    rows = [json.loads(line) for line in (tmp_path / "logs" / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]  # one process tells
    assert (adapter / "curves.png").is_file()
    assert not (tmp_path / "work" / "error.txt").exists()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_trains_as_one(tmp_path: Path, base: Path, phantoms: Path, alone: Path, strategy: Any) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'medforge[distributed]'")
    adapter = train(tmp_path, base, phantoms, STAGE, parallel=ParallelConfig(processes=2, strategy=strategy))
    same_curves(adapter, alone, 1e-3)


def test_sigterm_reaches_all_processes_and_one_goes_on(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """The parent alone is sent the signal, as a pod's first process is."""
    whole = train(tmp_path / "whole", base, phantoms, LONG)
    folder = tmp_path / "broken"
    given = [str(base), str(phantoms), str(folder), LONG.model_dump_json()]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        progress = folder / "logs" / "progress.jsonl"
        while not (progress.is_file() and progress.stat().st_size) and parent.poll() is None:
            time.sleep(0.05)
        parent.send_signal(signal.SIGTERM)
        said = parent.communicate(timeout=60)[0]
    finally:
        parent.kill()
    assert parent.returncode == 143, said
    assert not (folder / "out").exists()
    step = max(checkpoints(folder))
    assert 5 <= step < 40
    with pytest.MonkeyPatch.context() as patch:
        taken = at_step(patch, lambda _: None)
        adapter = train(folder, base, phantoms, LONG)
    assert taken == list(range(step + 1, 41))
    same_curves(adapter, whole, 1e-3)


def test_an_error_in_a_process_is_told_in_its_own_words(tmp_path: Path, base: Path, phantoms: Path) -> None:
    dataset = copy_samples(phantoms, tmp_path / "dataset", lambda sample: sample.split != "train")
    with pytest.raises(ValueError, match=r"^\S+/dataset: the train split is empty$"):
        train(tmp_path / "run", base, dataset, STAGE, parallel=TWO)
    assert not (tmp_path / "run" / "out").exists()


def test_a_bad_step_ends_all_processes(tmp_path: Path, base: Path, phantoms: Path) -> None:
    stage = changed(STAGE, learning_rate=1e30, warmup=0.0, generate_samples=0)
    with pytest.raises(
        ValueError, match=r"^stage 'see': step 2: the loss is nan .*bad-step-00000002.json\. Weights"
    ) as error:
        train(tmp_path, base, phantoms, stage, parallel=TWO)
    told = json.loads((tmp_path / "work" / "bad-step-00000002.json").read_text())
    assert len(told["samples"]) == 8
    assert "Traceback" not in str(error.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder beneath an embedded server that the environment names."""
    root = tmp_path_factory.mktemp("embedded")
    with serve(root) as values, pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield root / "store"


@pytest.mark.parametrize("end", [3, 5], ids=["newest-is-best", "best-is-older"])
def test_a_fresh_disk_goes_on_from_the_store(
    tmp_path: Path, base: Path, phantoms: Path, store: Path, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    """The run and its disk are lost; another finds the newest checkpoint, and the best, in the store."""
    from medforge.train.validation import Validation

    stage = changed(steps=6, evaluate_every=1)
    kept = CheckpointConfig(url=f"s3://checkpoints/{end}/")
    losses = dict(enumerate([5.0, 4.0, 3.0, 3.5, 3.5, 3.5], start=1))  # step 3 is the best

    def scripted(steps: range) -> None:
        rows = iter([{"loss": losses[step]} for step in steps])
        monkeypatch.setattr(Validation, "run", lambda *_: next(rows))

    scripted(range(1, 7))
    whole = train(tmp_path / "whole", base, phantoms, stage)
    assert about(whole)["best_step"] == 3
    scripted(range(1, end))
    with monkeypatch.context() as patch:
        at_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == end else None)
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path / "lost", base, phantoms, stage, checkpoints=kept)
    shutil.rmtree(tmp_path / "lost")
    sent = [path.parent for path in (store / "checkpoints" / str(end)).glob("see-*/step-*/manifest.json")]
    assert f"step-{end:08d}" in {path.name for path in sent}
    assert len({path.parent.name for path in sent}) == 1
    scripted(range(end, 7))
    taken = at_step(monkeypatch, lambda _: None)
    same_files(train(tmp_path / "fresh", base, phantoms, stage, checkpoints=kept), whole)
    assert taken == list(range(end + 1, 7))
    assert checkpoint(tmp_path / "fresh", 3).is_dir()


def test_another_stage_does_not_go_on_from_it(
    tmp_path: Path, base: Path, phantoms: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run has a prefix of its own below the url, named by all that decides its result."""
    kept = CheckpointConfig(url="s3://checkpoints/shared")
    taken = at_step(monkeypatch, lambda _: None)
    stages = [changed(steps=2), changed(steps=2, learning_rate=1e-3), changed(steps=2)]
    for number, stage in enumerate(stages):
        train(tmp_path / str(number), base, phantoms, stage, checkpoints=kept)
    assert taken == [1, 2, 1, 2]
    assert len(list((store / "checkpoints" / "shared").glob("see-*"))) == 2
