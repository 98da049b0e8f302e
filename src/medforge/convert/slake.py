"""SLAKE (Liu et al. 2021, https://arxiv.org/abs/2102.09542), CC-BY-4.0: English and Chinese questions.

train.json, validate.json (the hub's copy: validation.json) and test.json; images at imgs/<img_name>. Its splits are
image-disjoint within a language only: with both languages, `split: by-study` is the honest choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from medforge.convert.common import (
    Format,
    Pair,
    Row,
    RowError,
    Source,
    answer_type_field,
    each_row,
    find_image,
    head,
    json_rows,
    optional_text,
    question_sample,
    text_field,
)

NAME = "SLAKE"
LICENCE = "CC-BY-4.0"
NEEDS = "train.json, validate.json (or validation.json) and test.json with img_name and q_lang, and imgs/ beside them"
FILES = {"train.json": "train", "validate.json": "validation", "validation.json": "validation", "test.json": "test"}
LANGUAGES = ("en", "zh")


def found(path: Path) -> str | None:
    """What of SLAKE is in the folder, or None."""
    names = [name for name in FILES if (path / name).is_file() and '"q_lang"' in head(path / name)]
    return f"{', '.join(names)} with q_lang" if names else None


def rows(source: Source) -> Iterator[Row]:
    """A sample or a reject for every row. Raises ValueError when the folder has no file of SLAKE."""
    files = {name: split for name, split in FILES.items() if (source.path / name).is_file()}
    if not files:
        raise ValueError(f"{source.path}: is not SLAKE, which needs {NEEDS}")
    if {"validate.json", "validation.json"} <= set(files):
        raise ValueError(f"{source.path}: has both validate.json and validation.json; remove one of them")
    for name, split in files.items():
        yield from each_row(name, json_rows(source.path / name), partial(_make, source, split))


def _make(source: Source, split: str, row: Any) -> Pair:
    question = text_field(row, "question", blank="blank-question")
    answer = text_field(row, "answer", blank="blank-answer")
    language = text_field(row, "q_lang").lower()
    if language not in LANGUAGES:
        raise RowError("unknown-language", f"field q_lang is {language!r}; expected {' or '.join(LANGUAGES)}")
    name = text_field(row, "img_name")
    image = source.images.load(find_image(source.folder, [f"imgs/{name}", name]))
    return question_sample(
        source=NAME,
        licence=LICENCE,
        split=split,
        image=image,
        question=question,
        answer=answer,
        answer_type=answer_type_field(row, answer),
        question_type=optional_text(row, "content_type").lower() or None,
        language=language,
        study_id=PurePosixPath(name).parent.name or name,
        key=optional_text(row, "qid"),
    )


FORMAT = Format(LICENCE, NEEDS, found, rows)
