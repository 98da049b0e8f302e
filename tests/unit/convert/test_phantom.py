"""The phantom data set: its answers against what is seen in the pictures."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medforge.config import DataConfig, PhantomConfig
from medforge.convert import phantom, run
from medforge.dataset import Dataset
from medforge.drawing import Scene, draw
from medforge.files import sha256_bytes, tree_digest
from medforge.records import Sample, problems

CONFIG = PhantomConfig(images=60, size=96, seed=2)


@pytest.fixture(scope="module")
def rows() -> list[tuple[Sample, list[bytes]]]:
    return list(phantom.rows(CONFIG))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)


def by_image(rows: list[tuple[Sample, list[bytes]]]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Each picture's pixels, and its samples by question."""
    groups: dict[bytes, dict[str, Any]] = defaultdict(dict)
    for sample, (data,) in rows:
        groups[data][sample.question] = sample
    for data, samples in groups.items():
        yield pixels(data), samples


def test_every_sample_keeps_the_contract(rows: list[tuple[Sample, list[bytes]]]) -> None:
    for sample, (data,) in rows:
        assert problems(sample) == []
        assert sample.images[0].sha256 == sha256_bytes(data)
        assert Image.open(io.BytesIO(data)).size == (96, 96) == (sample.images[0].width, sample.images[0].height)
    assert len({sample.id for sample, _ in rows}) == len(rows)
    assert len({sample.study_id for sample, _ in rows}) == 60


def test_the_splits_share_no_image_and_none_is_empty(rows: list[tuple[Sample, list[bytes]]]) -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for sample, _ in rows:
        where[sample.images[0].sha256].add(sample.split)
    assert all(len(splits) == 1 for splits in where.values())
    counts = [sum(splits == {name} for splits in where.values()) for name in ("train", "validation", "test")]
    assert counts == [45, 6, 9]  # 75, 10 and 15 of 100


def test_the_smallest_set_has_every_split() -> None:
    splits = {sample.split for sample, _ in phantom.rows(PhantomConfig(images=12))}
    assert splits == {"train", "validation", "test"}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        config = DataConfig(source="phantom", phantom=PhantomConfig(images=12, size=56, seed=seed))
        run("phantom", tmp_path / name, config)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "again")
    digests = {Dataset.open(tmp_path / name).digest for name in ("one", "other")}
    assert len(digests) == 2


def test_lesions_are_counted_and_placed_as_they_are_drawn(rows: list[tuple[Sample, list[bytes]]]) -> None:
    """All spots are drawn at one brightness a style, brighter than what is around; boxes must hold all of that."""
    seen = 0
    for picture, samples in by_image(rows):
        count = ("none", "one", "two", "three").index(samples["How many lesions are there?"].answer)
        assert samples["Is there a lesion in this image?"].answer == ("yes" if count else "no")
        boxes = samples["How many lesions are there?"].boxes
        assert len(boxes) == count
        for box in boxes:
            x1, y1, x2, y2 = (round(value * 96) for value in box.xyxy)
            inside = picture[y1:y2, x1:x2]
            # a disc fills pi / 4 of its box
            assert 0.65 < (inside > 205).mean() <= 1.0
            assert picture[(y1 + y2) // 2 - 2 : (y1 + y2) // 2 + 2, (x1 + x2) // 2 - 2 : (x1 + x2) // 2 + 2].min() > 195
        assert samples["What imaging modality is this?"].target_diagnosis == ("lesion" if count else "no lesion")
        place, ground = samples.get("Where is the lesion?"), samples.get("Give the bounding box of the lesion.")
        assert (place is not None) == (ground is not None) == (count == 1)
        if place is not None and ground is not None:
            seen += 1
            x1, y1, x2, y2 = boxes[0].xyxy
            row, column = int((y1 + y2) / 2 * 3), int((x1 + x2) / 2 * 3)
            names = [["upper left", "upper middle", "upper right"], ["left", "center", "right"]]
            names.append(["lower left", "lower middle", "lower right"])
            assert place.answer == names[row][column]
            assert ground.answer == "<|box:0|>"
    assert seen > 10


def test_modalities_are_told_apart_by_the_corners(rows: list[tuple[Sample, list[bytes]]]) -> None:
    """CT and MRI have a dark ground, X-ray a light one; a CT's body has a bright rim, an MRI's a dark one."""
    answers = set()
    for picture, samples in by_image(rows):
        corner = picture[:6, :6].mean()
        rim = picture[46:50, 4:8].max()
        expected = "X-ray" if corner > 100 else "CT" if rim > 180 else "MRI"
        assert samples["What imaging modality is this?"].answer == expected
        answers.add(expected)
    assert answers == {"CT", "MRI", "X-ray"}


def test_organs_are_told_apart_by_their_shape(rows: list[tuple[Sample, list[bytes]]]) -> None:
    """The nearest of the four noiseless figures of the picture's style, spots and rims left out."""
    answers = set()
    for picture, samples in by_image(rows):
        style = ("CT", "MRI", "X-ray").index(samples["What imaging modality is this?"].answer)
        spots = np.zeros(picture.shape, bool)
        for box in samples["How many lesions are there?"].boxes:
            x1, y1, x2, y2 = (round(value * 96) for value in box.xyxy)
            spots[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = True
        distances = [
            np.abs(picture - draw(Scene(style, figure, (), 1), 96).astype(int))[~spots].mean() for figure in range(4)
        ]
        organ = ("lung", "liver", "brain", "kidney")[int(np.argmin(distances))]
        assert samples["Which organ is shown?"].answer == organ
        (asked,) = [question for question in samples if question.startswith("Does this image show the ")]
        assert samples[asked].answer == ("yes" if asked == f"Does this image show the {organ}?" else "no")
        answers.add(samples[asked].answer)
    assert answers == {"yes", "no"}


def test_closed_questions_are_those_of_yes_and_no(rows: list[tuple[Sample, list[bytes]]]) -> None:
    for sample, _ in rows:
        assert (sample.answer_type == "closed") == (sample.answer in ("yes", "no"))
    kinds = {sample.question_type for sample, _ in rows}
    assert kinds == {"modality", "organ", "abnormality", "quantity", "position", "grounding"}


def test_the_picture_has_the_size_that_was_asked_for() -> None:
    _, (data,) = next(phantom.rows(PhantomConfig(images=12, size=130)))
    assert Image.open(io.BytesIO(data)).size == (130, 130)
    assert Image.open(io.BytesIO(data)).mode == "RGB"
