"""A sample in a family's own words: chat messages, and boxes written and read in the family's space.

| family | text | space |
|---|---|---|
| Qwen2-VL | ``<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`` | 0–1000 |
| Qwen2.5-VL | ``{"bbox_2d": [x1, y1, x2, y2], "label": "…"}`` | pixels of the resized image |
| Qwen3-VL | the same JSON | 0–1000 |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from medforge.models.families import Family
from medforge.records import BOX_MARK, IMAGE_MARK, Box, Sample

Size = tuple[int, int]  # width, height in pixels of the image as the model sees it

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_TOKENS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_JSON = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def messages(sample: Sample, family: Family, sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """The sample's turns as chat messages for the family's template; `sizes` are the resized images' sizes."""
    rendered = []
    for turn in sample.turns:
        text = BOX_MARK.sub(lambda match: _render(sample.boxes[int(match.group(1))], family, sizes), turn.text.strip())
        rendered.append({"role": turn.role, "content": _content(text) if turn.role == "user" else text})
    return rendered


def _content(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _render(box: Box, family: Family, sizes: Sequence[Size]) -> str:
    return render_box(box, family, sizes[box.image])


def render_box(box: Box, family: Family, size: Size) -> str:
    """The box in the family's own notation, for an image that is `size` after resizing."""
    scale = size if family.box_space == "json-pixels" else (1000, 1000)
    x1, y1, x2, y2 = (round(value * scale[axis % 2]) for axis, value in enumerate(box.xyxy))
    if family.box_space == "tokens-1000":
        name = f"<|object_ref_start|>{box.label}<|object_ref_end|>"
        return f"{name}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    return f'{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": {json.dumps(box.label, ensure_ascii=False)}}}'


def parse_boxes(text: str, family: Family, size: Size) -> list[tuple[float, float, float, float]]:
    """The boxes that a model wrote, normalised to 0–1 and in their order.

    Text that is not in the family's notation gives none, nor do numbers too large for a float. Values are not clipped:
    a box out of range or inverted is the model's mistake, and the metrics have to see it.
    """
    scale = size if family.box_space == "json-pixels" else (1000, 1000)
    pattern = _TOKENS if family.box_space == "tokens-1000" else _JSON
    boxes = []
    for match in pattern.finditer(text):
        x1, y1, x2, y2 = (float(value) / scale[axis % 2] for axis, value in enumerate(match.groups()))
        if all(map(math.isfinite, (x1, y1, x2, y2))):
            boxes.append((x1, y1, x2, y2))
    return boxes
