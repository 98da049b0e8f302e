"""The metrics of results.json: `METRICS` maps a name to how it is measured and which predictions it applies to.

The value over a set of predictions is ``finish(sum of function / sum of weight)`` over those that it applies to: a
mean for most, and the corpus perplexity exp(sum of NLL / sum of tokens) for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from medforge.evaluate.metrics import boxes, closed, text
from medforge.evaluate.predictions import Prediction


class Metric(NamedTuple):
    """How a metric is measured.

    function: its value for one prediction (perplexity: the NLL in nats). applies: whether it is defined there.
    reason: why it has no value where it applies to none. better: which way is better; "" for a figure that is only
    read along with others. proportion: whether each prediction has 0 or 1, so that Wilson's interval holds.
    """

    function: Callable[[Prediction], float]
    applies: Callable[[Prediction], bool]
    reason: str
    better: Literal["higher", "lower", ""] = "higher"
    proportion: bool = False
    weight: Callable[[Prediction], float] = lambda _: 1.0
    finish: Callable[[float], float] = float


def _has_text(prediction: Prediction) -> bool:
    return bool(text.texts(prediction)[1])


def _is_closed(prediction: Prediction) -> bool:
    return prediction.answer_type == "closed" and _has_text(prediction)


def _of_text(function: Callable[[str, str], float]) -> Callable[[Prediction], float]:
    return lambda prediction: function(*text.texts(prediction))


def _of_choice(function: Callable[[str, str, str], float]) -> Callable[[Prediction], float]:
    return lambda prediction: function(*text.texts(prediction), prediction.question)


def _everywhere(_: Prediction) -> bool:
    return True


_NO_TEXT = "every reference answer is only boxes"
_NO_CLOSED = "no closed question"
_NO_BOXES = "no reference answer holds a box"

METRICS: dict[str, Metric] = {
    "exact_match": Metric(_of_text(text.exact_match), _has_text, _NO_TEXT, proportion=True),
    "soft_match": Metric(_of_text(text.soft_match), _has_text, _NO_TEXT),
    "token_precision": Metric(_of_text(text.token_precision), _has_text, _NO_TEXT),
    "token_recall": Metric(_of_text(text.token_recall), _has_text, _NO_TEXT),
    "token_f1": Metric(_of_text(text.token_f1), _has_text, _NO_TEXT),
    "closed_accuracy": Metric(_of_choice(closed.closed_accuracy), _is_closed, _NO_CLOSED, proportion=True),
    "unparsed_rate": Metric(_of_choice(closed.unparsed), _is_closed, _NO_CLOSED, "lower", proportion=True),
    "box_iou": Metric(lambda p: boxes.box_iou(p.predicted_boxes, p.boxes), lambda p: bool(p.boxes), _NO_BOXES),
    "box_iou_parsed": Metric(
        lambda p: boxes.box_iou(p.predicted_boxes, p.boxes),
        lambda p: bool(p.boxes and p.predicted_boxes),
        "no prediction holds a box where the reference has one",
    ),
    "box_found": Metric(lambda p: boxes.box_found(p.predicted_boxes, p.boxes), lambda p: bool(p.boxes), _NO_BOXES),
    "perplexity": Metric(
        lambda p: p.nll or 0.0,
        lambda p: p.nll is not None,
        "no prediction has the likelihood of its reference answer",
        "lower",
        weight=lambda p: float(p.answer_tokens),
        finish=math.exp,
    ),
    "answer_length": Metric(lambda p: float(p.generated_tokens), _everywhere, "no prediction", ""),
    "truncated_rate": Metric(
        lambda p: float(p.finish == "length"), _everywhere, "no prediction", "lower", proportion=True
    ),
}


def values(metric: Metric, predictions: Sequence[Prediction]) -> list[float | None]:
    """`metric.function` of each prediction, None where the metric does not apply."""
    return [metric.function(p) if metric.applies(p) else None for p in predictions]


def total(
    metric: Metric, predictions: Sequence[Prediction], scores: Sequence[float | None] | None = None
) -> dict[str, Any]:
    """``{"value", "n"}`` of `metric` over `predictions`, n the number of predictions that it applies to.

    Without any, ``{"value": None, "n": 0, "reason"}``: a metric that could not run is never 0. `scores` are the
    `values`, where they are known already. Sums are exact (math.fsum), so the order of the rows does not matter.
    """
    known = values(metric, predictions) if scores is None else scores
    pairs = [(score, metric.weight(p)) for p, score in zip(predictions, known, strict=True) if score is not None]
    if not pairs:
        return {"value": None, "n": 0, "reason": metric.reason}
    ratio = math.fsum(score for score, _ in pairs) / math.fsum(weight for _, weight in pairs)
    try:
        return {"value": metric.finish(ratio), "n": len(pairs)}
    except OverflowError:
        return {"value": None, "n": len(pairs), "reason": f"exp({ratio:.0f}) is beyond a floating point number"}


def is_right(prediction: Prediction) -> bool:
    """Whether an answer is right as a whole: its boxes found, where the reference is boxes; a closed question's choice
    right; an open question's answer an exact match."""
    if not _has_text(prediction):
        return boxes.box_found(prediction.predicted_boxes, prediction.boxes) == 1.0
    name = "closed_accuracy" if prediction.answer_type == "closed" else "exact_match"
    return METRICS[name].function(prediction) == 1.0
