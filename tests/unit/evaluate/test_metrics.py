"""Metrics of predictions: which they apply to, what they are over several, and what a missing head leaves null."""

from __future__ import annotations

from typing import Any

import pytest

from medforge.evaluate.metrics import METRICS, OF_HEADS, total
from medforge.metrics.boxes import XYXY
from tests.unit.evaluate.examples import prediction

LEFT: XYXY = (0.0, 0.0, 0.5, 1.0)
WHOLE: XYXY = (0.0, 0.0, 1.0, 1.0)
BOTH = ("region", "match")


@pytest.mark.parametrize("boxes", ["<|box:0|>", "(1,2),(30,40)", '[{"bbox_2d": [1, 2, 30, 40], "label": "lung"}]'])
def test_a_reference_of_boxes_alone_has_no_text(boxes: str) -> None:
    row = prediction(reference=boxes, boxes=((0, 0, 1, 1),))
    for name in ("exact_match", "soft_match", "token_f1", "closed_accuracy"):
        assert not METRICS[name].applies(row)
    assert METRICS["box_iou"].applies(row)
    mixed = prediction(
        reference=f"The nodule is at {boxes}.", prediction="the nodule is at (9,9),(10,10)", boxes=((0, 0, 1, 1),)
    )
    assert METRICS["exact_match"].function(mixed) == 1.0


def test_a_prediction_that_adds_boxes_where_none_are_asked_is_no_match() -> None:
    assert METRICS["exact_match"].function(prediction(prediction="yes [1, 2, 3, 4]")) == 0.0


def test_open_questions_are_not_counted() -> None:
    rows = [prediction(1), prediction(2, answer_type="open"), prediction(3, prediction="Perhaps")]
    assert total(METRICS["closed_accuracy"], rows) == {"value": 0.5, "n": 2}
    assert total(METRICS["unparsed_rate"], rows) == {"value": 0.5, "n": 2}
    only_open = total(METRICS["closed_accuracy"], rows[1:2])
    assert only_open == {"value": None, "n": 0, "reason": "no closed question"}


def test_both_the_unconditional_and_the_parsed_figure_with_their_n() -> None:
    boxed: dict[str, Any] = {"boxes": (LEFT,), "reference": "<|box:0|>"}
    rows = [
        prediction(1, **boxed, predicted_boxes=(LEFT,)),
        prediction(2, **boxed),
        prediction(3, **boxed),
        prediction(4, predicted_boxes=(LEFT,)),  # no reference box: not counted
    ]
    assert total(METRICS["box_iou"], rows) == {"value": pytest.approx(1 / 3), "n": 3}
    assert total(METRICS["box_iou_parsed"], rows) == {"value": 1.0, "n": 1}
    assert total(METRICS["box_found"], rows) == {"value": pytest.approx(1 / 3), "n": 3}
    assert total(METRICS["exact_match"], rows)["n"] == 1
    none = total(METRICS["box_iou_parsed"], rows[1:3])
    assert none["value"] is None and none["n"] == 0 and "no prediction holds a box" in none["reason"]


def test_regions_count_where_there_is_one_to_find() -> None:
    rows = [
        prediction(1, heads=BOTH, region=LEFT, region_target=LEFT),
        prediction(2, heads=BOTH, region=LEFT, region_target=WHOLE),  # exactly 0.5
        prediction(3, heads=BOTH, region=LEFT, region_target=(0.25, 0.0, 1.0, 1.0)),  # 0.25 of 1
        prediction(4, heads=BOTH, region=LEFT),
    ]
    assert total(METRICS["region_iou"], rows) == {"value": pytest.approx((1 + 0.5 + 0.25) / 3), "n": 3}
    assert total(METRICS["region_at_50"], rows) == {"value": pytest.approx(2 / 3), "n": 3}
    none = total(METRICS["region_iou"], rows[3:])
    assert none == {"value": None, "n": 0, "reason": "no sample has exactly one box on its first image"}


def test_the_match_head_is_judged_over_all_claims() -> None:
    # right 0.9, 0.6, 0.2; wrong 0.6, 0.3: see test_ranking for the area
    scores: list[tuple[float | None, float | None]] = [(0.9, None), (0.6, 0.6), (0.2, 0.3), (None, None)]
    rows = [
        prediction(n, heads=BOTH, match_reference=right, match_wrong=wrong) for n, (right, wrong) in enumerate(scores)
    ]
    assert total(METRICS["match_auroc"], rows) == {"value": 3.5 / 6, "n": 3}
    assert total(METRICS["match_auroc"], rows[::-1]) == total(METRICS["match_auroc"], rows)
    assert total(METRICS["match_recall"], rows) == {"value": pytest.approx(2 / 3), "n": 3}
    assert total(METRICS["match_false_alarms"], rows) == {"value": 0.5, "n": 2}


def test_an_area_without_wrong_claims_is_null_with_its_reason() -> None:
    rows = [prediction(1, heads=BOTH, match_reference=0.9)]
    reason = "no reference answer, or no certainly wrong one, could be judged"
    assert total(METRICS["match_auroc"], rows) == {"value": None, "n": 1, "reason": reason}
    nothing = total(METRICS["match_false_alarms"], rows)
    assert nothing == {"value": None, "n": 0, "reason": "no certainly wrong answer could be judged"}


def test_a_head_that_the_model_lacks_is_said() -> None:
    for name in OF_HEADS:
        cell = total(METRICS[name], [prediction(1)])
        assert cell == {"value": None, "n": 0, "reason": f"the model has no {METRICS[name].head} head"}
    only = [prediction(1, heads=("match",), match_reference=0.5)]
    assert total(METRICS["region_iou"], only)["reason"] == "the model has no region head"
    assert total(METRICS["match_recall"], only) == {"value": 1.0, "n": 1}
