"""Boxes written out in a text, in the notation of Qwen-VL and Qwen2-VL, to boxes that are normalised to 0–1.

<ref>label</ref><box>(x1,y1),(x2,y2)</box>
<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>
"""

from __future__ import annotations

import re

from medforge.convert.common import RowError, refuse_special
from medforge.records import IMAGE_MARK, Box, Turn, box_mark

_PAIR = r"\(\s*([\d.]+)\s*,\s*([\d.]+)\s*\)\s*,\s*\(\s*([\d.]+)\s*,\s*([\d.]+)\s*\)"
_BOX = re.compile(
    rf"(?:<ref>((?:(?!<ref>).)*?)</ref>\s*)?<box>\s*{_PAIR}\s*</box>"
    rf"|(?:<\|object_ref_start\|>((?:(?!<\|object_ref_start).)*?)<\|object_ref_end\|>\s*)?"
    rf"<\|box_start\|>\s*{_PAIR}\s*<\|box_end\|>",
    re.DOTALL,
)
_LABEL = re.compile(r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
_LEFT_OVER = re.compile(r"</?(?:box|ref)>|<\|(?:box|quad|object_ref)_(?:start|end)\|>")


def extract(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Box, ...]]:
    """The turns with `<|box:N|>` for each box that was written out (label and all), and the boxes, normalised to 0–1.

    The scale is 0–1000 when any coordinate of the row is more than 1, else 0–1. A box belongs to the last image that
    was marked before it; one without a label takes that of the box that it follows immediately. Raises RowError
    bad-box for a half-written box, special-token for a text with other control tokens.
    """
    matches = [match for turn in turns for match in _BOX.finditer(turn.text)]
    scale = 1000.0 if any(value > 1 for match in matches for value in _coordinates(match)) else 1.0
    boxes: list[Box] = []
    images = 0
    marked = []
    for turn in turns:
        pieces: list[str] = []
        end, label = 0, ""
        for match in _BOX.finditer(turn.text):
            between = turn.text[end : match.start()]
            images += between.count(IMAGE_MARK)
            own = match.group(1) or match.group(6) or ""
            label = own.strip() or (label if pieces and not between.strip() else "")
            x1, y1, x2, y2 = (value / scale for value in _coordinates(match))
            pieces += [_plain(between), box_mark(len(boxes))]
            refuse_special(label)
            boxes.append(Box(label, (x1, y1, x2, y2), max(images - 1, 0)))
            end = match.end()
        images += turn.text[end:].count(IMAGE_MARK)
        marked.append(Turn(turn.role, "".join([*pieces, _plain(turn.text[end:])])))
    return tuple(marked), tuple(boxes)


def _plain(text: str) -> str:
    """The text between boxes: a label without a box is an ordinary word."""
    text = _LABEL.sub(lambda match: match.group(1) or match.group(2) or "", text)
    if left := _LEFT_OVER.search(text):
        raise RowError("bad-box", f"{left.group(0)} belongs to no box of the form (x1,y1),(x2,y2)")
    refuse_special(text)
    return text


def _coordinates(match: re.Match[str]) -> tuple[float, ...]:
    texts = match.groups()[1:5] if match.group(2) is not None else match.groups()[6:10]
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        raise RowError("bad-box", f"a coordinate of {match.group(0)} is no number") from None
