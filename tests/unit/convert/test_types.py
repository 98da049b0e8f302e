from __future__ import annotations

import pytest

from medforge.convert import types


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many lesions are there?", "quantity"),
        ("What color is the liver?", "color"),
        ("Is this an axial slice?", "plane"),
        ("Is this a CT scan?", "modality"),
        ("Is this a T2 weighted image?", "modality"),
        ("Is the heart enlarged?", "size"),
        ("Where is the mass?", "position"),
        ("Are the lungs normal appearing?", "abnormality"),
        ("Which organ is shown?", "organ"),
        ("Is there evidence of a pneumothorax", "presence"),
        ("Does he smoke?", "presence"),
        ("Why?", "other"),
        ("The patient is active.", "other"),  # `ct` and `any` match whole words only
        ("图中有几个肿块？", "quantity"),
        ("这是什么模态？", "modality"),
        ("病变在哪里？", "position"),
        ("图中是否有肝脏？", "presence"),
    ],
)
def test_question_type(question: str, expected: str) -> None:
    assert types.question_type(question) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "closed"),
        (" NO. ", "closed"),
        ("是。", "closed"),
        ("没有", "closed"),
        ("Yes, on the left", "open"),
        ("normal", "open"),
        ("无异常", "open"),
        ("", "open"),
    ],
)
def test_answer_type(answer: str, expected: str) -> None:
    assert types.answer_type(answer) == expected


def test_language() -> None:
    assert (types.language("CT 图像"), types.language("CT image, naïve")) == ("zh", "en")
