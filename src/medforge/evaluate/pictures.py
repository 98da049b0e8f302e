"""The report's thumbnails: an image of a sample with the boxes of the reference, the arms and their region heads."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from medforge.dataset import Dataset
from medforge.evaluate.predictions import XYXY, Prediction
from medforge.models.generate import boxed_image
from medforge.records import Sample

THUMBNAIL = 224  # pixels of the longer side
STYLES = (  # of the rectangles, as report.html draws them: the reference, up to three arms, up to two region heads
    *("white, solid", "yellow, dotted", "blue, dashed", "orange, dash and dot"),
    *("pink, long dashes", "green, long dashes and dots"),
)
_MOST_BOXES = 12


def picture(dataset: Dataset, sample: Sample, rows: Sequence[Prediction], number: int) -> dict[str, Any] | None:
    """Image `number` of the sample as a JPEG thumbnail, with boxes as rectangles in its pixels; None without an image.

    Boxes are shown on the image that they are about: those of the reference and of each arm in `rows` on the
    `boxed_image`, those of the region heads on the first. Where the reference names none, it is the heads' target.
    """
    if not sample.images:
        return None
    image = dataset.images(sample)[number]
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    reference: Sequence[XYXY] = ()
    arms: list[tuple[str, int, Sequence[XYXY]]] = []
    if number == boxed_image(sample):
        reference = rows[0].boxes
        arms += [(row.arm, min(style, 3), row.predicted_boxes) for style, row in enumerate(rows, 1)]
    if number == 0:
        reference = reference or [row.region_target for row in rows if row.region_target is not None][:1]
        headed = [(row.arm, row.region) for row in rows if row.region is not None]
        arms += [(f"{arm}, region head", min(style, 5), [box]) for style, (arm, box) in enumerate(headed, 4)]
    drawn = [("reference", 0, reference), *arms]
    boxes: list[dict[str, Any]] = [
        {"who": who, "style": style, **_rectangle(box, *image.size)}
        for who, style, found in drawn
        for box in found[:_MOST_BOXES]
    ]
    names = list(dict.fromkeys((box["who"], STYLES[box["style"]]) for box in boxes))
    more = len(sample.images) - 1
    return {
        "src": data_uri(stream.getvalue(), "jpeg"),
        "width": image.width,
        "height": image.height,
        "boxes": boxes,
        "legend": names,
        "more": f"image {number + 1} of {more + 1}" if more else "",
    }


def data_uri(data: bytes, kind: str) -> str:
    """An image as a URI that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _rectangle(box: XYXY, width: int, height: int) -> dict[str, float]:
    """A box in the thumbnail's pixels, cut at its edges; an inverted one is turned round so that it shows."""
    x1, x2 = sorted(min(1.0, max(0.0, x)) * width for x in box[::2])
    y1, y2 = sorted(min(1.0, max(0.0, y)) * height for y in box[1::2])
    return {"x": round(x1, 1), "y": round(y1, 1), "width": round(x2 - x1, 1), "height": round(y2 - y1, 1)}
