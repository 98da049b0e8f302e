from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medforge.config import DataConfig, ModelConfig, TinyConfig
from medforge.dataset import Dataset, Reject
from medforge.dataset_writer import DatasetWriter, write_dataset
from medforge.files import read_json, tree_digest
from medforge.records import Turn
from medforge.validate import WorkerKilledError, run

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was not trained: its tokenizer, processor and template are what counts."""
    from medforge.models.tiny import build

    folder = tmp_path_factory.mktemp("model") / "tiny"
    build(folder, "qwen3-vl", TinyConfig(steps=0))
    return folder


@pytest.fixture
def validate(tmp_path: Path, model: Path) -> Run:
    """A function that validates `tmp_path`/in to `tmp_path`/out."""

    def make(workers: int = 1, out: str = "out", max_length: int = 2048, **settings: Any) -> dict[str, Any]:
        config = ModelConfig(max_length=max_length)
        return run(tmp_path / "in", model, tmp_path / out, DataConfig(**settings), config, workers)

    return make


def test_sound_samples_pass(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    manifest = write_dataset(tmp_path / "in", [make_sample(n, split=s) for n, s in enumerate(("train", "test"))])
    report = validate()
    assert report == read_json(tmp_path / "out/validation.json")
    assert (report["dataset_in"], report["dataset_out"]) == (manifest["root"], manifest["root"])
    assert report["counts"]["kept"] == {"train": 1, "test": 1}
    assert report["images"]["width"] == {"min": 64, "median": 64, "p95": 64, "max": 64}
    assert report["tokens"]["image"]["min"] == 4  # 64x48 within the limits is 64x64, of 32x32 pixels a token
    assert report["tokens"]["length"]["min"] > report["tokens"]["image"]["min"] + report["tokens"]["answer"]["min"]
    clean = Dataset.open(tmp_path / "out")
    assert (clean.manifest["min_pixels"], clean.manifest["max_pixels"]) == (56 * 56, 512 * 512)
    assert "tokenizer_config.json" in report["settings"]["processor"]


def test_rejects_keep_their_history(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    with DatasetWriter(tmp_path / "in", "unit", "CC0-1.0", "unit") as writer:
        writer.reject(Reject("x#1", "convert", "missing-image", "gone"))
        for number in range(4):
            writer.add(*make_sample(number))
        broken = make_sample(5, turns=(Turn("user", "<image>Q"), Turn("assistant", "")))
        writer.add(*broken)
        writer.add(*make_sample(0, id="again"))
    report = validate(max_rejected=0.2)
    assert [(r.id, r.stage, r.reason) for r in Dataset.open(tmp_path / "out").rejects()] == [
        ("x#1", "convert", "missing-image"),
        ("again", "validate", "duplicate"),
        (broken[0].id, "validate", "empty-answer"),
    ]
    assert report["counts"] == {
        "in": {"train": 6},
        "kept": {"train": 4},
        "rejected": {"duplicate": 1, "empty-answer": 1},
        "rejected_by_split": {"train": {"duplicate": 1, "empty-answer": 1}},
    }


def test_too_many_broken_samples_stop_the_run(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    write_dataset(tmp_path / "in", [make_sample(n) for n in range(3)])
    with pytest.raises(ValueError) as error:
        validate(max_length=16)
    message = str(error.value)
    assert "3 of 3 samples (100.0%) are broken, max_rejected is 5.0%: too-long 3; such as " in message
    assert "limit 16 (model.max_length)" in message
    assert not (tmp_path / "out").exists()
    written = json.loads((tmp_path / "out.rejected.json").read_text())
    assert len(written["rejects"]) == 3
    assert written["report"]["counts"]["rejected"] == {"too-long": 3}
    validate()
    assert not (tmp_path / "out.rejected.json").exists()


def test_repeats_do_not_count_as_broken(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    write_dataset(tmp_path / "in", [make_sample(0), make_sample(0, id="2"), make_sample(0, id="3")])
    assert validate(max_rejected=0)["counts"]["rejected"] == {"duplicate": 2}


def test_shared_images(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    samples = [make_sample(n, image=n % 3) for n in range(6)] + [make_sample(9, image=0, split="test")]
    write_dataset(tmp_path / "in", samples)
    reported = validate(max_rejected=0)
    assert reported["counts"]["kept"] == {"train": 6, "test": 1}
    assert reported["leakage"][0]["samples"] == {"train": 2, "test": 1}
    rejected = validate(max_rejected=0, shared_images="reject")
    assert rejected["counts"]["kept"] == {"train": 4, "test": 1}
    assert rejected["counts"]["rejected"] == {"shared-with-test": 2}
    assert rejected["leakage"][0]["rejected"] == 2


def test_a_split_that_is_left_empty_is_an_error(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    write_dataset(tmp_path / "in", [make_sample(0), make_sample(1, image=0, split="test")])
    with pytest.raises(ValueError, match="no sample is left in train: shared-with-test 1"):
        validate(shared_images="reject")


def test_an_image_that_does_not_decode(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    good = [make_sample(n) for n in range(3)]
    sample, _ = make_sample(7)
    write_dataset(tmp_path / "in", [*good, (sample, [b"\x89PNG broken"])])
    assert validate(max_rejected=0.3)["counts"]["rejected"] == {"unreadable-image": 1}


def test_the_number_of_workers_changes_nothing(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    samples = [make_sample(n, image=n // 2) for n in range(150)]
    write_dataset(tmp_path / "in", [*samples, make_sample(3, image=1, id="again")])
    validate(workers=1, out="one")
    validate(workers=2, out="two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_a_killed_worker_is_an_error_not_a_hang(
    make_sample: Any, tmp_path: Path, validate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda pool, *_: submit(pool, _die))
    write_dataset(tmp_path / "in", [make_sample(n) for n in range(150)])
    with pytest.raises(WorkerKilledError, match="memory ran out; use fewer workers"):
        validate(workers=2)
    assert not (tmp_path / "out").exists()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_faults_of_the_user(make_sample: Any, tmp_path: Path, validate: Run) -> None:
    with pytest.raises(ValueError, match=r"in: has no manifest\.json, so it is not a data set"):
        validate()
    write_dataset(tmp_path / "in", [make_sample()])
    with pytest.raises(ValueError, match="workers is 0"):
        validate(workers=0)
    with pytest.raises(ValueError, match=r"gone: has no config\.json, so it is no model folder"):
        run(tmp_path / "in", tmp_path / "gone", tmp_path / "out", DataConfig(), ModelConfig())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: exists and is no data set"):
        validate(out="file")
