"""The sample: one conversation about one or several images of one study.

Text marks the place of an image by ``<image>`` and of a box by ``<|box:N|>`` (the N-th of `boxes`). Boxes are
stored once, normalised to 0–1, and written out in a model family's own space only when that family is known
(`medforge.models.prompts`).
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from medforge.files import sha256_json

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation", "test"]

ROLES: tuple[str, ...] = ("system", "user", "assistant")
SPLITS: tuple[str, ...] = ("train", "validation", "test")
ANSWER_TYPES: tuple[str, ...] = ("open", "closed")
TYPE_ORIGINS: tuple[str, ...] = ("field", "rule")

IMAGE_MARK = "<image>"
BOX_MARK = re.compile(r"<\|box:(\d+)\|>")


def box_mark(index: int) -> str:
    """The mark that stands in a text for the box at `index`."""
    return f"<|box:{index}|>"


@dataclass(frozen=True)
class ImageRef:
    """An image by its content: SHA-256 of the encoded file, width and height in pixels as displayed."""

    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation; `role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Box:
    """A labelled region of image number `image`: (x1, y1, x2, y2) as shares of its width and height, 0–1."""

    label: str
    xyxy: tuple[float, float, float, float]
    image: int = 0


@dataclass(frozen=True)
class Sample:
    """One sample of a data set. `question_type_from` says whether a field of the source or a rule gave its type."""

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    answer_type: str
    question_type: str
    language: str
    study_id: str
    source: str
    licence: str
    split: str
    question_type_from: str = "field"
    boxes: tuple[Box, ...] = field(default=())
    target_diagnosis: str | None = None

    @property
    def question(self) -> str:
        """The last user turn without its image marks."""
        texts = [turn.text for turn in self.turns if turn.role == "user"]
        return texts[-1].replace(IMAGE_MARK, "").strip() if texts else ""

    @property
    def answer(self) -> str:
        """The last assistant turn: what evaluation compares with."""
        texts = [turn.text for turn in self.turns if turn.role == "assistant"]
        return texts[-1].strip() if texts else ""

    def with_split(self, split: str) -> Sample:
        """The same sample in another split. The id does not depend on the split."""
        return replace(self, split=split)

    def to_row(self) -> dict[str, Any]:
        """Plain JSON-able values, as `from_row` takes them."""
        row = asdict(self)
        for box in row["boxes"]:
            box["xyxy"] = list(box["xyxy"])
        return row


def sample_from_row(row: dict[str, Any]) -> Sample:
    """The sample that `Sample.to_row` wrote."""
    values = {f.name: row[f.name] for f in fields(Sample)}
    values["images"] = tuple(ImageRef(**image) for image in row["images"])
    values["turns"] = tuple(Turn(**turn) for turn in row["turns"])
    values["boxes"] = tuple(Box(b["label"], tuple(b["xyxy"]), b["image"]) for b in row["boxes"])
    return Sample(**values)


def sample_id(source: str, images: tuple[ImageRef, ...], turns: tuple[Turn, ...], key: str = "") -> str:
    """A content hash (16 hexadecimal digits) of the images and the text; `key` tells true repeats apart."""
    content = [source, [image.sha256 for image in images], [[turn.role, turn.text] for turn in turns], key]
    return sha256_json(content)[:16]


def problems(sample: Sample) -> list[tuple[str, str]]:
    """What breaks the contract, as (reason, detail) pairs; empty for a sound sample.

    Reasons are stable names, for `rejects.parquet` and for tests: no-turns, bad-role, empty-question, empty-answer,
    image-marks, box-range, box-reference, bad-value.
    """
    found: list[tuple[str, str]] = []
    roles = [turn.role for turn in sample.turns]
    if "user" not in roles or "assistant" not in roles:
        found.append(("no-turns", f"a user and an assistant turn are needed, got {roles}"))
    for role in sorted(set(roles) - set(ROLES)):
        found.append(("bad-role", f"turn role {role!r} is not one of {', '.join(ROLES)}"))
    for number, turn in enumerate(sample.turns):
        if not turn.text.replace(IMAGE_MARK, "").strip():
            if turn.role == "assistant":
                found.append(("empty-answer", f"turn {number} (assistant) is blank"))
            elif turn.role == "user":
                found.append(("empty-question", f"turn {number} (user) is blank"))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in sample.turns)
    if marks != len(sample.images):
        found.append(("image-marks", f"{marks} {IMAGE_MARK} marks for {len(sample.images)} images"))
    if any(IMAGE_MARK in turn.text for turn in sample.turns if turn.role == "assistant"):
        found.append(("image-marks", f"an assistant turn holds {IMAGE_MARK}"))
    for number, box in enumerate(sample.boxes):
        x1, y1, x2, y2 = box.xyxy
        inside = all(math.isfinite(v) and 0.0 <= v <= 1.0 for v in box.xyxy)
        if not (inside and x1 < x2 and y1 < y2):
            found.append(
                ("box-range", f"box {number} ({box.label}) {list(box.xyxy)} is not within 0–1 with x1<x2, y1<y2")
            )
        if not 0 <= box.image < len(sample.images):
            found.append(("box-reference", f"box {number} names image {box.image} of {len(sample.images)}"))
    for turn in sample.turns:
        for match in BOX_MARK.finditer(turn.text):
            if int(match.group(1)) >= len(sample.boxes):
                found.append(("box-reference", f"{match.group(0)} but the sample has {len(sample.boxes)} boxes"))
    for name, value, allowed in (
        ("answer_type", sample.answer_type, ANSWER_TYPES),
        ("split", sample.split, SPLITS),
        ("question_type_from", sample.question_type_from, TYPE_ORIGINS),
    ):
        if value not in allowed:
            found.append(("bad-value", f"{name} is {value!r}; expected one of {', '.join(allowed)}"))
    return found
