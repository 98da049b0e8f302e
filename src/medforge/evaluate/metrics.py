"""The metrics of results.json: `METRICS` maps a name to how it is measured and which predictions it applies to.

The value over a set of predictions is made of what each one that it applies to contributes: the mean for most, the
corpus perplexity exp(sum of NLL / sum of tokens), and the area under a ROC curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from medforge.evaluate.predictions import Prediction
from medforge.metrics import boxes, closed, correct, text, texts
from medforge.metrics.ranking import auroc

THRESHOLD = 0.5  # of the match head's probability


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class Metric(NamedTuple):
    """How a metric is measured.

    function: what one prediction contributes: its value, or what `over` takes. applies: whether it is defined there.
    reason: why it has no value where it applies to none. better: which way is better; "" for a figure that is only
    read along with others. proportion: whether each prediction has 0 or 1, so that Wilson's interval holds. over: the
    value of the contributions, of which there is at least one; None for no value. head: the task head that it needs.
    """

    function: Callable[[Prediction], Any]
    applies: Callable[[Prediction], bool]
    reason: str
    better: Literal["higher", "lower", ""] = "higher"
    proportion: bool = False
    over: Callable[[Sequence[Any]], float | None] = _mean
    head: str = ""


def _texts(prediction: Prediction) -> tuple[str, str]:
    return texts(prediction.prediction, prediction.reference, bool(prediction.boxes))


def _has_text(prediction: Prediction) -> bool:
    return bool(_texts(prediction)[1])


def _is_closed(prediction: Prediction) -> bool:
    return prediction.answer_type == "closed" and _has_text(prediction)


def _of_text(function: Callable[[str, str], float]) -> Callable[[Prediction], float]:
    return lambda prediction: function(*_texts(prediction))


def _of_choice(function: Callable[[str, str, str], float]) -> Callable[[Prediction], float]:
    return lambda prediction: function(*_texts(prediction), prediction.question)


def _everywhere(_: Prediction) -> bool:
    return True


def _perplexity(counts: Sequence[tuple[float, int]]) -> float:
    ratio = math.fsum(nll for nll, _ in counts) / sum(tokens for _, tokens in counts)
    try:
        return math.exp(ratio)
    except OverflowError:
        raise OverflowError(f"exp({ratio:.0f}) is beyond a floating point number") from None


def region_iou(prediction: Prediction) -> float:
    """IoU of the region head's box with the sample's box, 0–1, where both are known."""
    assert prediction.region is not None and prediction.region_target is not None
    return boxes.iou(prediction.region, prediction.region_target)


def match_scores(predictions: Sequence[Prediction]) -> tuple[list[float], list[float]]:
    """The match head's probabilities for the reference answers and for the certainly wrong ones, where known."""
    right = [p.match_reference for p in predictions if p.match_reference is not None]
    wrong = [p.match_wrong for p in predictions if p.match_wrong is not None]
    return right, wrong


def _has_region(prediction: Prediction) -> bool:
    return prediction.region is not None and prediction.region_target is not None


def _is_judged(prediction: Prediction) -> bool:
    return prediction.match_reference is not None or prediction.match_wrong is not None


def _passes(score: float | None) -> float:
    assert score is not None
    return float(score >= THRESHOLD)


_NO_TEXT = "every reference answer is only boxes"
_NO_CLOSED = "no closed question"
_NO_BOXES = "no reference answer holds a box"
_NO_REGION = "no sample has exactly one box on its first image"

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
        lambda p: (p.nll, p.answer_tokens),
        lambda p: p.nll is not None,
        "no prediction has the likelihood of its reference answer",
        "lower",
        over=_perplexity,
    ),
    "answer_length": Metric(lambda p: float(p.generated_tokens), _everywhere, "no prediction", ""),
    "truncated_rate": Metric(
        lambda p: float(p.finish == "length"), _everywhere, "no prediction", "lower", proportion=True
    ),
    "region_iou": Metric(region_iou, _has_region, _NO_REGION, head="region"),
    "region_at_50": Metric(
        lambda p: float(region_iou(p) >= boxes.FOUND), _has_region, _NO_REGION, proportion=True, head="region"
    ),
    "match_auroc": Metric(
        lambda p: p,
        _is_judged,
        "no reference answer, or no certainly wrong one, could be judged",
        over=lambda judged: auroc(*match_scores(judged)),
        head="match",
    ),
    "match_recall": Metric(
        lambda p: _passes(p.match_reference),
        lambda p: p.match_reference is not None,
        "no reference answer could be judged",
        proportion=True,
        head="match",
    ),
    "match_false_alarms": Metric(
        lambda p: _passes(p.match_wrong),
        lambda p: p.match_wrong is not None,
        "no certainly wrong answer could be judged",
        "lower",
        proportion=True,
        head="match",
    ),
}
OF_HEADS = tuple(name for name, metric in METRICS.items() if metric.head)


def values(metric: Metric, predictions: Sequence[Prediction]) -> list[Any]:
    """`metric.function` of each prediction, None where the metric does not apply."""
    return [metric.function(p) if metric.applies(p) else None for p in predictions]


def total(metric: Metric, predictions: Sequence[Prediction], scores: Sequence[Any] | None = None) -> dict[str, Any]:
    """``{"value", "n"}`` of `metric` over `predictions`, n the number of predictions that it applies to.

    Without any, ``{"value": None, "n": 0, "reason"}``: a metric that could not run is never 0. `scores` are the
    `values`, where they are known already. Sums are exact (math.fsum), so the order of the rows does not matter.
    """
    known = [score for score in (values(metric, predictions) if scores is None else scores) if score is not None]
    if metric.head and not any(metric.head in p.heads for p in predictions):
        return {"value": None, "n": 0, "reason": f"the model has no {metric.head} head"}
    reason = metric.reason
    try:
        value = metric.over(known) if known else None
    except OverflowError as error:
        value, reason = None, str(error)
    return {"value": value, "n": len(known)} | ({"reason": reason} if value is None else {})


def is_right(prediction: Prediction) -> bool:
    """Whether an answer is right as a whole, by `medforge.metrics.correct`."""
    return correct(
        prediction.question,
        prediction.reference,
        prediction.prediction,
        prediction.answer_type,
        prediction.boxes,
        prediction.predicted_boxes,
    )
