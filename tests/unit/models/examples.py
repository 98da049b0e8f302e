"""Samples, pictures and a hand-computed loss that several tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from medforge.records import Box, ImageRef, Sample, Turn

SIZE = 96  # of the phantoms; nine image tokens in Qwen3-VL
IGNORE = -100


def picture(seed: int, width: int = 100, height: int = 60) -> Image.Image:
    """Coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(
    turns: Sequence[tuple[str, str]], images: Sequence[Image.Image] = (), boxes: Sequence[Box] = (), **changes: Any
) -> Sample:
    """A sample of `turns` (role, text) about `images`."""
    values: dict[str, Any] = {
        "id": "example",
        "images": tuple(ImageRef(f"{number:064x}", *image.size) for number, image in enumerate(images)),
        "turns": tuple(Turn(role, text) for role, text in turns),
        "answer_type": "open",
        "question_type": "other",
        "language": "en",
        "study_id": "study",
        "source": "unit",
        "licence": "CC0-1.0",
        "split": "train",
        "boxes": tuple(boxes),
    }
    return Sample(**(values | changes))


def token_losses(model: Any, batch: Mapping[str, Any]) -> list[list[float]]:
    """-ln p of each labelled token, a list a row, worked out in float64 numpy from all logits of `model`."""
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits.double().numpy()
    rows = []
    for scores, labels in zip(logits, batch["labels"].numpy(), strict=True):
        losses = []
        for place in np.flatnonzero(labels != IGNORE):
            before = scores[place - 1]
            top = before.max()
            losses.append(float(top + np.log(np.exp(before - top).sum()) - before[labels[place]]))
        rows.append(losses)
    return rows
