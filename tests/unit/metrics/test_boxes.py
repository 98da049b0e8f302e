"""Boxes: IoU, the matching against brute force, and what missing, surplus and broken boxes cost."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.metrics.boxes import XYXY, box_found, box_iou, iou, matched

SHARE = st.floats(0, 1).map(lambda v: round(v, 3))
BOX = st.tuples(SHARE, SHARE, SHARE, SHARE)
SOUND = st.tuples(st.floats(0, 0.8), st.floats(0, 0.8), st.floats(0.01, 0.2), st.floats(0.01, 0.2)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)

LEFT: XYXY = (0.0, 0.0, 0.5, 1.0)
TOP: XYXY = (0.0, 0.0, 1.0, 0.5)
WHOLE: XYXY = (0.0, 0.0, 1.0, 1.0)


def test_iou_by_hand() -> None:
    assert iou(LEFT, LEFT) == 1.0
    assert iou(LEFT, TOP) == pytest.approx(0.25 / 0.75)
    assert iou(LEFT, WHOLE) == 0.5
    assert iou(LEFT, (0.5, 0.0, 1.0, 1.0)) == 0.0  # touching
    assert iou(LEFT, (0.5, 1.0, 0.0, 0.0)) == 0.0  # inverted on both axes
    assert iou((0.2, 0.2, 0.2, 0.9), WHOLE) == 0.0  # no width


@given(BOX, BOX)
def test_iou_is_symmetric_and_between_0_and_1(one: XYXY, other: XYXY) -> None:
    assert iou(one, other) == iou(other, one)
    assert 0.0 <= iou(one, other) <= 1.0


@given(st.lists(SOUND, min_size=1, max_size=5), st.lists(SOUND, min_size=1, max_size=5))
def test_the_matching_is_the_best_of_all(predicted: list[XYXY], reference: list[XYXY]) -> None:
    few, many = sorted((predicted, reference), key=len)
    best = max(
        math.fsum(iou(a, b) for a, b in zip(few, choice, strict=True))
        for choice in itertools.permutations(many, len(few))
    )
    assert math.fsum(matched(predicted, reference)) == pytest.approx(best)
    assert len(matched(predicted, reference)) == len(few)


@given(st.lists(SOUND, min_size=1, max_size=5), st.lists(SOUND, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_boxes_does_not_matter(reference: list[XYXY], predicted: list[XYXY], random: object) -> None:
    shuffled = list(predicted)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert box_iou(shuffled, reference) == pytest.approx(box_iou(predicted, reference))
    assert box_iou(reference, reference) == pytest.approx(1.0)
    assert 0.0 <= box_iou(predicted, reference) <= 1.0


def test_greedy_matching_would_be_worse() -> None:
    # the first prediction suits both references, the second only the first one
    reference: list[XYXY] = [(0.0, 0.0, 0.4, 1.0), (0.4, 0.0, 1.0, 1.0)]
    predicted: list[XYXY] = [(0.0, 0.0, 0.8, 1.0), (0.0, 0.0, 0.3, 1.0)]
    # straight: .5 + 0; crossed: .4 (of the second by the first) + .75
    assert sorted(matched(predicted, reference)) == pytest.approx([0.4, 0.75])


def test_missing_and_surplus_boxes_count_as_nothing() -> None:
    assert box_iou([], [LEFT]) == box_found([], [LEFT]) == 0.0
    assert box_iou([LEFT], [LEFT, (0.5, 0.0, 1.0, 1.0)]) == 0.5
    assert box_iou([LEFT, TOP, WHOLE, TOP], [LEFT]) == 0.25  # naming many boxes does not pay
    assert box_found([LEFT, TOP], [LEFT]) == 0.5
    assert box_found([WHOLE], [LEFT]) == 1.0  # exactly 0.5
