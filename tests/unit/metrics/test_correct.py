"""Whether an answer is right as a whole."""

from __future__ import annotations

import pytest

from medforge.metrics import correct, texts

BOX = (0.1, 0.2, 0.5, 0.6)
SHIFTED = (0.12, 0.2, 0.52, 0.6)  # IoU 0.38 / 0.42 with BOX
FAR = (0.6, 0.7, 0.9, 0.9)


@pytest.mark.parametrize(
    ("answer_type", "reference", "answer", "right"),
    [
        ("closed", "yes", "Yes, there is a nodule.", True),
        ("closed", "yes", "There is no nodule.", False),
        ("closed", "CT", "It is a CT scan.", True),
        ("open", "Left lung", " left lung. ", True),
        ("open", "left lung", "the left lung", False),  # exact match, not a choice
        ("open", "yes", "Yes, there is a nodule.", False),
    ],
)
def test_closed_answers_by_their_choice_and_open_ones_by_exact_match(
    answer_type: str, reference: str, answer: str, right: bool
) -> None:
    assert correct("Is there a nodule?", reference, answer, answer_type) is right


def test_an_option_beside_an_or_of_the_question_is_a_rival() -> None:
    assert correct("CT or MRI?", "CT", "an MRI CT", "closed") is False


def test_boxes_decide_where_the_reference_is_nothing_else() -> None:
    written = '{"bbox_2d": [100, 200, 500, 600], "label": "nodule"}'
    assert correct("Where?", written, "anything", "open", [BOX], [SHIFTED]) is True
    assert correct("Where?", written, written, "open", [BOX], [FAR]) is False
    assert correct("Where?", written, written, "open", [BOX], [SHIFTED, FAR]) is False
    assert correct("Where?", written, written, "open", [BOX], []) is False


def test_text_around_boxes_decides_where_there_is_some() -> None:
    said = "a nodule at [120, 200, 520, 600]"
    assert texts(said, "A nodule at [100, 200, 500, 600]", boxed=True) == ("a nodule at", "A nodule at")
    assert correct("What?", "A nodule at [100, 200, 500, 600]", said, "open", [BOX], [FAR]) is True
    assert correct("What?", "A nodule at [100, 200, 500, 600]", said, "open") is False
