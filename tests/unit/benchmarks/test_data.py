"""The samples are the same in every framework's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.train import data
from medforge.dataset import Dataset
from medforge.dataset_writer import DatasetWriter
from medforge.files import sha256_file
from medforge.records import Box, Sample, Turn, box_mark

Make = Callable[..., tuple[Sample, list[bytes]]]


@pytest.fixture
def dataset(tmp_path: Path, make_sample: Make) -> Dataset:
    """Five images with three questions each, and one whose answer is a box."""
    with DatasetWriter(tmp_path / "dataset", "unit", "CC0-1.0", "unit") as writer:
        for number in range(15):
            writer.add(*make_sample(number, image=number // 3))
        turns = (Turn("user", "<image>\nWhere?"), Turn("assistant", box_mark(0)))
        writer.add(*make_sample(15, image=5, turns=turns, boxes=(Box("lesion", (0.1, 0.1, 0.2, 0.2)),)))
    return Dataset.open(tmp_path / "dataset")


def test_images_are_drawn_with_all_their_questions(dataset: Dataset) -> None:
    chosen = data.choose_images(dataset.samples("train"), 7, seed=1)
    images = [sample.images[0].sha256 for sample in chosen]
    assert len(chosen) == 7
    assert [images.count(image) for image in dict.fromkeys(images)] == [3, 3, 1]


def test_another_seed_draws_other_images(dataset: Dataset) -> None:
    def drawn(seed: int) -> set[str]:
        return {sample.id for sample in data.choose_images(dataset.samples("train"), 6, seed)}

    assert drawn(0) == drawn(0)
    assert len({frozenset(drawn(seed)) for seed in range(8)}) > 1


def test_answers_that_are_boxes_are_left_out(dataset: Dataset) -> None:
    train = dataset.samples("train")
    assert len(train) == 16
    assert all("|box:" not in sample.answer for sample in data.choose_images(train, 15, seed=0))
    with pytest.raises(ValueError, match="--samples 16: the train split has only 15"):
        data.choose_images(train, 16, seed=0)


def test_every_format_holds_the_same_questions_answers_and_images(dataset: Dataset, tmp_path: Path) -> None:
    chosen = data.choose_images(dataset.samples("train"), 7, seed=1)
    out = tmp_path / "out"
    data.write(dataset, chosen, out)
    expected = {(s.question, s.answer, s.images[0].sha256) for s in chosen}
    assert len(expected) == 7

    ours = Dataset.open(out / "medforge").samples("train")
    assert {(s.question, s.answer, s.images[0].sha256) for s in ours} == expected

    info = json.loads((out / "dataset_info.json").read_text())["benchmark"]
    rows = json.loads((out / info["file_name"]).read_text())
    assert info["columns"] == {"messages": "messages", "images": "images"}
    assert {read(row, out) for row in rows} == expected

    lines = [json.loads(line) for line in (out / "ms-swift.jsonl").read_text().splitlines()]
    assert all(Path(line["images"][0]).is_absolute() for line in lines)
    assert {read(line, Path("/")) for line in lines} == expected


def read(row: dict[str, list[dict[str, str]] | list[str]], folder: Path) -> tuple[str, str, str]:
    """Question, answer and the image's digest of a peer's row."""
    user, assistant = row["messages"]
    (image,) = row["images"]
    assert isinstance(user, dict)
    assert isinstance(assistant, dict)
    assert user["role"] == "user"
    assert assistant["role"] == "assistant"
    assert user["content"].startswith("<image>")
    return user["content"].removeprefix("<image>"), assistant["content"], sha256_file(folder / str(image))


def test_image_files_are_the_sources_own_bytes(dataset: Dataset, tmp_path: Path) -> None:
    chosen = data.choose_images(dataset.samples("train"), 3, seed=0)
    data.write(dataset, chosen, tmp_path / "out")
    (file,) = (tmp_path / "out" / "images").iterdir()
    assert file.suffix == ".png"
    assert file.read_bytes() == dataset.image_bytes(chosen[0].images[0])


def test_phantoms_stand_in_where_vqa_rad_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PHANTOM", data.PHANTOM.model_copy(update={"images": 12, "size": 56}))
    dataset = data.prepare(tmp_path / "none", tmp_path / "dataset")
    assert "phantom" in dataset.manifest["source"]
    assert data.choose_images(dataset.samples("train"), 10, seed=0)


def test_real_vqa_rad_can_be_drawn_from(shared_data: Path, tmp_path: Path) -> None:
    """The images of the drawn samples are JPEG files, as VQA-RAD has them."""
    if not (shared_data / "vqa_rad").is_dir():
        pytest.skip("no VQA-RAD")
    dataset = data.prepare(shared_data / "vqa_rad", tmp_path / "dataset")
    chosen = data.choose_images(dataset.samples("train"), 32, seed=0)
    data.write(dataset, chosen, tmp_path / "out")
    originals = {sha256_file(path) for path in (shared_data / "vqa_rad" / "images").iterdir()}
    written = list((tmp_path / "out" / "images").iterdir())
    assert all(path.suffix == ".jpg" for path in written)
    assert {sha256_file(path) for path in written} <= originals
