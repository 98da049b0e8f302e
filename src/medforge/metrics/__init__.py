"""Measures of answers, boxes and scores: functions of strings and numbers, for training's validation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from medforge.metrics.boxes import XYXY, box_found
from medforge.metrics.closed import closed_accuracy
from medforge.metrics.text import exact_match, prose


def texts(answer: str, reference: str, boxed: bool) -> tuple[str, str]:
    """The answer and the reference as text metrics compare them: without boxes where the reference has boxes (`boxed`),
    since coordinates are the box metrics' concern. The reference is "" where it is only boxes: text metrics skip it.
    """
    return (prose(answer), prose(reference)) if boxed else (answer, reference)


def correct(
    question: str,
    reference: str,
    answer: str,
    answer_type: str,
    boxes: Sequence[XYXY] = (),
    predicted_boxes: Sequence[XYXY] = (),
) -> bool:
    """Whether an answer is right as a whole.

    A closed question's is by `closed_accuracy`, the rule of results.json; an open one's by `exact_match` after
    normalisation. Where the reference names `boxes`, the text around them decides, or, when there is none, whether
    `predicted_boxes`, those read from the answer, find all of them (IoU of at least 0.5) and name no others.
    """
    said, expected = texts(answer, reference, bool(boxes))
    if not expected:
        return box_found(predicted_boxes, boxes) == 1.0
    if answer_type == "closed":
        return closed_accuracy(said, expected, question) == 1.0
    return exact_match(said, expected) == 1.0
