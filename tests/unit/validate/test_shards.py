"""Samples checked in shards are judged as samples checked at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge import validate
from medforge.config import DataConfig, ModelConfig
from medforge.dataset_writer import write_dataset
from medforge.files import read_json, tree_digest, write_json

CONFIG = ModelConfig(max_length=2048)


@pytest.fixture
def model(base: Path) -> Path:
    return base


@pytest.fixture
def dataset(make_sample: Any, tmp_path: Path) -> Path:
    """12 samples, of which one says nothing, one repeats another, and one shares its image with a test sample."""
    samples = [make_sample(n, split="test" if n > 9 else "train") for n in range(12)]
    samples[3] = make_sample(3, split="train", language="")
    repeated = make_sample(1, split="train", id="again")
    shared = make_sample(20, image=11, split="train")
    write_dataset(tmp_path / "in", [*samples, repeated, shared])
    return tmp_path / "in"


def in_shards(dataset: Path, model: Path, folder: Path, data: DataConfig) -> list[Path]:
    files = [folder / f"checks-{shard}.json" for shard in range(data.shards)]
    for shard, file in enumerate(files):
        validate.run_shard(dataset, model, file, data, CONFIG, shard)
    return files[::-1]


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_give_the_same_clean_data_set_and_report(
    dataset: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(validate, "_CHUNK", 2)
    data = DataConfig(shared_images="reject", max_rejected=1.0, shards=shards)
    report = validate.run(dataset, model, tmp_path / "whole", data, CONFIG)
    assert report["counts"]["rejected"] == {"duplicate": 1, "shared-with-test": 1}
    files = in_shards(dataset, model, tmp_path, data)
    again = validate.run(dataset, model, tmp_path / "joined", data, CONFIG, checks=files)
    assert again == report
    assert tree_digest(tmp_path / "joined") == tree_digest(tmp_path / "whole")


def test_checks_that_do_not_fit_are_refused(
    dataset: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "_CHUNK", 2)
    data = DataConfig(max_rejected=1.0, shards=2)
    files = in_shards(dataset, model, tmp_path, data)

    def run(checks: list[Path], **changes: Any) -> None:
        validate.run(dataset, model, tmp_path / "out", data.model_copy(update=changes), CONFIG, checks=checks)

    with pytest.raises(ValueError, match="no shard has checked train samples"):
        run(files[:1])
    with pytest.raises(ValueError, match="are in another shard already"):
        run([*files, files[0]])
    with pytest.raises(ValueError, match="its settings is not that of this step"):
        run(files, shared_images="reject")
    write_json(files[0], read_json(files[0]) | {"dataset": "0" * 64})
    with pytest.raises(ValueError, match="its dataset is not that of this step"):
        run(files)
    assert not (tmp_path / "out").exists()
