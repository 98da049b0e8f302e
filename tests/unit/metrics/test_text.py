"""Text metrics against hand-worked figures, difflib, and SQuAD's published evaluation."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.metrics.text import (
    exact_match,
    normalise,
    prose,
    soft_match,
    token_f1,
    token_precision,
    token_recall,
    tokens,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = st.lists(st.sampled_from(["lung", "the", "left", "x-ray", "mass,", "a", "Is", "no.", "(ct)"]), max_size=8)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Yes.", "yes"),
        ("  left \n Lung", "Left lung"),
        ('"CT"', "ct"),
        ("左肺。", "左肺"),
        ("ＣＴ", "CT"),  # full-width letters
        ("是的！", "是的"),
    ],
)
def test_exact_match_sees_through_case_space_edges_and_width(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("pneumothorax", "no pneumothorax"),
        ("1.5 cm", "15 cm"),
        ("50%", "50"),
        ("+", "-"),
        ("?", "!"),
        ("", "yes"),
        ("the lung", "lung"),
        ("左肺", "右肺"),
    ],
)
def test_exact_match_keeps_what_carries_meaning(answer: str, reference: str) -> None:
    assert exact_match(answer, reference) == 0.0


def test_soft_match_does_not_fall_to_autojunk() -> None:
    report = "the lung fields are clear and " * 9  # 270 characters: autojunk would drop all its letters
    assert difflib.SequenceMatcher(None, "lung", normalise(report)).ratio() == 0.0
    # 'lung' is 4 characters of 4 + 269 (the last space is stripped), on either side
    assert soft_match("lung", report) == soft_match(report, "lung")
    assert soft_match("lung", report) == pytest.approx(2 * 4 / (4 + 269))


def test_soft_match_by_hand() -> None:
    # longest block "left " (5) and "lung" (4): 2 * 9 / (9 + 13)
    assert soft_match("Left lung", "left the lung") == pytest.approx(18 / 22)


def squad_f1(prediction: str, truth: str) -> float:
    """The published evaluate-v1.1.py of SQuAD, word for word but for types."""

    def normalize_answer(s: str) -> str:
        lowered = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())

    said, expected = normalize_answer(prediction).split(), normalize_answer(truth).split()
    same = sum((Counter(said) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(expected)
    return 2 * precision * recall / (precision + recall)


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_token_f1_is_squads(answer: str, reference: str) -> None:
    if set(tokens(answer)) - {"a", "the"} and set(tokens(reference)) - {"a", "the"}:
        assert token_f1(answer, reference) == pytest.approx(squad_f1(answer, reference))


def test_tokens_count_as_often_as_they_stand() -> None:
    # two of the three "left" are surplus: 2 common tokens of 4 said, of 2 expected
    assert token_precision("left left left lung", "left lung") == pytest.approx(2 / 4)
    assert token_recall("left left left lung", "left lung") == 1.0
    assert token_f1("left left left lung", "left lung") == pytest.approx(2 / 3)


def test_chinese_is_scored_by_character() -> None:
    assert tokens("CT显示左肺。") == ["ct", "显", "示", "左", "肺"]
    assert token_f1("左肺叶", "左肺") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))


def test_decimals_letters_and_empty_answers() -> None:
    assert token_f1("1.5 cm", "15 cm") == pytest.approx(0.5)
    assert tokens("A") == ["a"]
    assert token_f1("", "yes") == token_precision("", "yes") == token_recall("", "yes") == 0.0
    assert token_f1("+", "+") == 1.0
    assert token_f1("-", "+") == 0.0


@given(TEXT, TEXT)
def test_every_text_metric_is_between_0_and_1(answer: str, reference: str) -> None:
    for metric in (exact_match, soft_match, token_precision, token_recall, token_f1):
        assert 0.0 <= metric(answer, reference) <= 1.0
    assert normalise(normalise(answer)) == normalise(answer)


@given(TEXT)
def test_a_perfect_answer_has_1(text: str) -> None:
    for metric in (exact_match, soft_match, token_precision, token_recall, token_f1):
        assert metric(text, text) == 1.0


@given(WORDS)
def test_the_order_of_words_does_not_matter_to_tokens(words: list[str]) -> None:
    assert token_f1(" ".join(reversed(words)), " ".join(words)) == 1.0


@pytest.mark.parametrize(
    "boxes",
    [
        "<|box:0|>",
        "<|object_ref_start|>left lung<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>",
        '```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "left lung"}]\n```',
        "(1,2),(30,40)",
        "[0.1, 0.2, 0.3, -0.4]",
    ],
)
def test_a_text_of_boxes_alone_has_no_prose(boxes: str) -> None:
    assert prose(boxes) == ""
    assert prose(f"The nodule is at {boxes}.").startswith("The nodule is at")
