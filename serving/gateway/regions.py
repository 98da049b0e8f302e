"""Boxes as heads and texts give them, to regions of the image as it was sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from medforge.models.families import FAMILIES
from medforge.models.prompts import Size, parse_boxes
from serving.gateway import api
from serving.gateway.answers import Capabilities
from serving.gateway.images import MAX_ELONGATION, Picture

# what Qwen2-VL's and Qwen2.5-VL's preprocessors take where nobody says otherwise
MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280
_MOST = 20  # boxes of one text; a model that repeats itself may write hundreds

Box = Sequence[float]


def smart_resize(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The width and height that a Qwen-VL sees: multiples of `factor`, between the two numbers of pixels.

    As the families' own preprocessors do it (transformers, `qwen2_vl.image_processing_qwen2_vl.smart_resize`). Raises
    ValueError for an image that is more than 200 times longer than wide.
    """
    width, height = size
    if max(size) > MAX_ELONGATION * min(size):
        raise ValueError(f"more than {MAX_ELONGATION} times longer than wide")
    resized = [round(side / factor) * factor for side in size]
    if resized[0] * resized[1] > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        resized = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
    elif resized[0] * resized[1] < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        resized = [math.ceil(side * grow / factor) * factor for side in size]
    return resized[0], resized[1]


def text_boxes(text: str, capabilities: Capabilities, picture: Picture) -> list[Box]:
    """The boxes that the text of a model names, as shares 0–1; none where its family is not known."""
    family = FAMILIES.get(capabilities.family or "")
    if family is None:
        return []
    least, most = capabilities.min_pixels or MIN_PIXELS, capabilities.max_pixels or MAX_PIXELS
    size = smart_resize(picture.size, family.patch_size * 2, least, most)  # two by two patches make a token
    return list(parse_boxes(text, family, size))


def regions(boxes: Iterable[Box], label: str, source: str, picture: Picture) -> list[api.Region]:
    """The boxes as regions of image 0, cut at its edges. One that is inverted or has no extent is left out."""
    width, height = picture.out.width, picture.out.height
    found: list[api.Region] = []
    for box in boxes:
        x1, y1, x2, y2 = (min(1.0, max(0.0, float(value))) for value in box)
        if not (x1 < x2 and y1 < y2):
            continue
        pixels = round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)
        region = api.Region(
            label=label, image=0, box=(x1, y1, x2, y2), pixels=pixels, source="head" if source == "head" else "text"
        )
        if region not in found:
            found.append(region)
    return found[:_MOST]
