from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medforge.records import Turn
from tests.conftest import png


def row(qid: int, **changes: Any) -> dict[str, Any]:
    values = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "What modality is used to take this image?",
        "answer": "MRI",
        "q_lang": "en",
        "answer_type": "OPEN",
        "content_type": "Modality",
        "qid": qid,
    }
    return values | changes


def test_worked_example(source: Any, convert: Any) -> None:
    chinese = row(2, question="图中有肝脏吗？", answer="有", q_lang="zh", answer_type="CLOSED", content_type="Organ")
    files = {"train.json": [row(1), chinese], "validation.json": [row(3)], "test.json": [row(4)]}
    done = convert(source(files, {"imgs/xmlab1/source.jpg": 1}))
    english, other = sorted(done.dataset.samples("train"), key=lambda s: s.language)
    assert english.turns == (
        Turn("user", "<image>\nWhat modality is used to take this image?"),
        Turn("assistant", "MRI"),
    )
    assert (english.answer_type, english.question_type, english.question_type_from) == ("open", "modality", "field")
    assert (english.study_id, english.source, english.licence) == ("xmlab1", "SLAKE", "CC-BY-4.0")
    assert (other.language, other.answer_type, other.question_type, other.answer) == ("zh", "closed", "organ", "有")
    assert len({s.id for s in done.samples}) == 4
    assert done.dataset.splits() == ["train", "validation", "test"]


def test_dirt(source: Any, convert: Any) -> None:
    rows = [row(1), row(2, q_lang="fr"), row(3, answer=""), row(4, img_name="xmlab9/source.jpg"), {"qid": 5}]
    done = convert(source({"train.json": rows}, {"xmlab1/source.jpg": 1}))
    assert done.reasons == {
        "train.json#2": "unknown-language",
        "train.json#3": "blank-answer",
        "train.json#4": "missing-image",
        "train.json#5": "bad-row",
    }
    assert "field q_lang is 'fr'; expected en or zh" in done.rejects[0].detail


def test_without_images_the_error_says_where_they_were_looked_for(shared_data: Path, convert: Any) -> None:
    with pytest.raises(ValueError) as error:
        convert(shared_data / "slake")
    assert "not one row is usable (missing-image 14027, blank-answer 1)" in str(error.value)
    assert "no file imgs/xmlab1/source.jpg or xmlab1/source.jpg in the source folder" in str(error.value)


def test_languages_that_are_not_wanted_are_rejected_not_lost(source: Any, convert: Any) -> None:
    rows = [row(1), row(2, q_lang="zh")]
    done = convert(source({"train.json": rows}, {"imgs/xmlab1/source.jpg": 1}), languages=["zh"])
    assert [s.language for s in done.samples] == ["zh"]
    assert [(r.reason, r.detail) for r in done.rejects] == [("language-left-out", "language en is not among zh")]


def test_two_validation_files(source: Any, convert: Any) -> None:
    with pytest.raises(ValueError, match=r"both validate\.json and validation\.json"):
        convert(source({"validate.json": [row(1)], "validation.json": [row(2)]}))


def test_the_real_rows_with_generated_images(shared_data: Path, tmp_path: Path, convert: Any) -> None:
    folder = tmp_path / "slake"
    names: dict[str, int] = {}
    for name in ("train.json", "validate.json", "test.json"):
        text = (shared_data / "slake" / name).read_text("utf-8")
        (folder).mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
        for item in json.loads(text):
            names.setdefault(item["img_name"], len(names))
    for name, seed in names.items():
        path = folder / "imgs" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(png(seed, 8, 8))
    done = convert(folder)
    counts = {split: count["samples"] for split, count in done.manifest["counts"].items()}
    assert counts == {"train": 9834, "validation": 2099, "test": 2094}
    assert [(r.id, r.reason) for r in done.rejects] == [("train.json#1623", "blank-answer")]
    assert len({s.id for s in done.samples}) == 14027
    test = done.dataset.samples("test")
    assert Counter(s.language for s in test) == {"en": 1061, "zh": 1033}
    assert Counter(s.answer_type for s in test) == {"open": 1258, "closed": 836}
    train = {s.study_id for s in done.dataset.samples("train") if s.language == "zh"}
    english = {s.study_id for s in test if s.language == "en"}
    assert (len(english), len(english & train)) == (96, 72)  # the leak that by-study mends
