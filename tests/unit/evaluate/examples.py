"""Predictions for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medforge.evaluate.predictions import Prediction, prediction_key
from medforge.records import Sample


def prediction(number: int = 0, arm: str = "base", **changes: Any) -> Prediction:
    """A sound row of a closed question whose answer is right; keyword arguments replace fields."""
    values: dict[str, Any] = {
        "key": prediction_key(f"sample-{number}", arm, "model", {"max_new_tokens": 8}),
        "id": f"sample-{number:04d}",
        "arm": arm,
        "question": "Is there a nodule?",
        "reference": "yes",
        "prediction": "Yes.",
        "nll": 0.5,
        "answer_tokens": 2,
        "generated_tokens": 3,
        "finish": "stop",
        "answer_type": "closed",
        "question_type": "presence",
        "question_type_from": "field",
        "language": "en",
        "images": (f"image-{number}",),
    }
    return Prediction(**(values | changes))


def answers(samples: Sequence[Sample], arm: str, texts: Sequence[str], **changes: Any) -> list[Prediction]:
    """One prediction for each sample, as the step that generates would write it."""
    return [
        prediction(
            arm=arm,
            key=prediction_key(sample.id, arm, "model", {}),
            id=sample.id,
            question=sample.question,
            reference=sample.answer,
            prediction=text,
            answer_type=sample.answer_type,
            question_type=sample.question_type,
            language=sample.language,
            images=tuple(image.sha256 for image in sample.images),
            **changes,
        )
        for sample, text in zip(samples, texts, strict=True)
    ]
