"""What a free answer to a closed question says."""

from __future__ import annotations

from pathlib import Path

import pytest

from medforge.files import read_json
from medforge.metrics.closed import closed_accuracy, parse_closed, parse_yes_no, unparsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes, there is no doubt", "yes"),
        ("No, it is present elsewhere", "no"),
        ("The answer is yes.", "yes"),
        ("There is a fracture with no displacement", "yes"),
        ("A nodule is present in the left lung", "yes"),
        ("No evidence of pneumothorax", "no"),
        ("There is no effusion.", "no"),
        ("There isn’t any effusion", "no"),
        ("The mass is not seen", "no"),
        ("Clear lungs without consolidation", "no"),
        ("The lungs appear normal.", "unparsed"),
        ("A nodule", "unparsed"),
        ("I know", "unparsed"),
        ("No. 3 rib", "unparsed"),
        ("yes or no", "unparsed"),
        ("It cannot be excluded", "unparsed"),
        ("I am not sure", "unparsed"),
        ("", "unparsed"),
        ("是的。", "yes"),
        ("有", "yes"),
        ("左肺有结节", "yes"),
        ("不是", "no"),
        ("没有异常", "no"),
        ("未见异常", "no"),
        ("肺部看起来正常", "unparsed"),
        ("无法确定", "unparsed"),
    ],
)
def test_yes_and_no_are_read_by_words_and_negation(text: str, expected: str) -> None:
    assert parse_yes_no(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "question", "parsed", "right"),
    [
        ("CT", "CT", "", "option", 1.0),
        ("It is a CT scan.", "CT", "Is it CT or MRI?", "option", 1.0),
        ("MRI", "CT", "Is it CT or MRI?", "option", 0.0),
        ("CT or MRI", "CT", "Is it CT or MRI?", "unparsed", 0.0),
        ("CT. MRI", "CT", "Is it CT or MRI?", "unparsed", 0.0),
        ("not CT", "CT", "", "unparsed", 0.0),
        ("", "CT", "", "unparsed", 0.0),
        ("unclear", "CT", "", "unparsed", 0.0),
        ("yes", "CT", "Is it CT or MRI?", "yes", 0.0),
        ("doctor", "CT", "", "option", 0.0),  # no substring
        ("x-ray", "X-Ray", "", "option", 1.0),
        ("Right, Left Lung", "Left Lung, Right", "", "option", 1.0),
        ("Left Lung", "Left Lung, Right", "", "option", 0.0),
        ("the left lung is bigger than the right lung", "right lung", "", "unparsed", 0.0),
        ("The left lung", "Left lung", "Is it the left lung or the right lung?", "option", 1.0),
        ("left lung right lung", "Right lung", "Is it the left lung or the right lung?", "unparsed", 0.0),
        ("without contrast", "without contrast", "with or without contrast?", "option", 1.0),
        ("是左肺", "左肺", "左肺还是右肺？", "option", 1.0),
        ("是", "包含", "图中包含肺吗？", "yes", 1.0),
        ("不包含", "包含", "图中包含肺吗？", "no", 0.0),
        ("不正常", "正常", "", "unparsed", 0.0),
        ("Not sure", "Not sure", "", "option", 1.0),
        ("左肺右肺", "左肺", "左肺还是右肺？", "unparsed", 0.0),
    ],
)
def test_options(answer: str, reference: str, question: str, parsed: str, right: float) -> None:
    assert parse_closed(answer, reference, question) == parsed
    assert closed_accuracy(answer, reference, question) == right
    assert unparsed(answer, reference, question) == float(parsed == "unparsed")


@pytest.mark.parametrize("name", ["slake/test.json", "vqa_rad/testset.json"])
def test_every_real_closed_reference_is_right_as_its_own_answer(shared_data: Path, name: str) -> None:
    rows = [row for row in read_json(shared_data / name) if row["answer_type"].strip() == "CLOSED"]
    assert len(rows) > 200
    for row in rows:
        answer = str(row["answer"])
        assert closed_accuracy(answer, answer, row["question"]) == 1.0, row
        assert unparsed(answer, answer, row["question"]) == 0.0, row


def test_an_unparsed_answer_is_wrong_whatever_the_reference() -> None:
    for reference in ("yes", "no"):
        assert closed_accuracy("The lungs appear normal.", reference) == 0.0
        assert unparsed("The lungs appear normal.", reference) == 1.0
    assert closed_accuracy("No evidence of disease", "no") == 1.0
