from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.records import BOX_MARK, Box, ImageRef, Sample, Turn, box_mark, problems, sample_from_row, sample_id


def test_row_and_back(make_sample: Any) -> None:
    sample = make_sample(boxes=(Box("mass", (0.1, 0.2, 0.3, 0.4)),), target_diagnosis="mass")[0]
    row = json.loads(json.dumps(sample.to_row()))
    assert sample_from_row(row) == sample


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=4), st.text())
def test_row_and_back_for_any_text(turns: list[tuple[str, str]], text: str) -> None:
    made = tuple(Turn(*turn) for turn in turns)
    sample = Sample(text, (ImageRef("0" * 64, 1, 2),), made, "open", text, "en", text, text, text, "test")
    assert sample_from_row(sample.to_row()) == sample


def test_question_and_answer_are_the_last_ones(make_sample: Any) -> None:
    turns = (Turn("user", "<image>\nfirst"), Turn("assistant", "one"), Turn("user", "second"), Turn("assistant", " 2 "))
    sample = make_sample(turns=turns)[0]
    assert (sample.question, sample.answer) == ("second", "2")
    assert make_sample(turns=())[0].question == ""


def test_id_is_of_the_content_not_of_the_split(make_sample: Any) -> None:
    sample = make_sample()[0]
    assert sample.with_split("test").id == sample.id
    assert sample.with_split("test").split == "test"
    ids = {
        sample_id("a", sample.images, sample.turns),
        sample_id("b", sample.images, sample.turns),
        sample_id("a", (), sample.turns),
        sample_id("a", sample.images, sample.turns[:1]),
        sample_id("a", sample.images, sample.turns, "7"),
    }
    assert len(ids) == 5
    assert all(len(name) == 16 for name in ids)
    assert sample_id("a", (), (Turn("user", "Q"),)) == "0de83c47431e088c"  # written down: ids must not drift


def test_a_sound_sample_has_no_problems(make_sample: Any) -> None:
    box = Box("mass", (0.0, 0.0, 1.0, 1.0))
    turns = (Turn("user", "<image> Where?"), Turn("assistant", box_mark(0)))
    assert problems(make_sample(boxes=(box,), turns=turns)[0]) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"turns": (Turn("user", "<image>Q"),)}, "no-turns"),
        ({"turns": (Turn("user", "<image>Q"), Turn("assistant", "A"), Turn("tool", "x"))}, "bad-role"),
        ({"turns": (Turn("user", "<image>Q"), Turn("assistant", "\n"))}, "empty-answer"),
        ({"turns": (Turn("user", " <image>"), Turn("assistant", "A"))}, "empty-question"),
        ({"turns": (Turn("user", "<image><image>Q"), Turn("assistant", "A"))}, "image-marks"),
        ({"turns": (Turn("user", "Q"), Turn("assistant", "<image>A"))}, "image-marks"),
        ({"boxes": (Box("x", (0, 0, 1.01, 1)),)}, "box-range"),
        ({"boxes": (Box("x", (0, 0, float("nan"), 1)),)}, "box-range"),
        ({"boxes": (Box("x", (0.5, 0, 0.5, 1)),)}, "box-range"),
        ({"boxes": (Box("x", (0, 0, 1, 1), -1),)}, "box-reference"),
        ({"turns": (Turn("user", "<image>Q"), Turn("assistant", "<|box:0|>"))}, "box-reference"),
        ({"answer_type": "OPEN"}, "bad-value"),
        ({"split": "dev"}, "bad-value"),
        ({"question_type_from": "guess"}, "bad-value"),
    ],
)
def test_problems(make_sample: Any, changes: dict[str, Any], reason: str) -> None:
    assert [name for name, _ in problems(replace(make_sample()[0], **changes))] == [reason]


def test_box_mark() -> None:
    assert BOX_MARK.findall(f"{box_mark(0)} and {box_mark(12)}") == ["0", "12"]
