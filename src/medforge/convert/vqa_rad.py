"""VQA-RAD (Lau et al. 2018, https://doi.org/10.1038/sdata.2018.251), CC0-1.0.

Two forms: trainset.json and testset.json with images/ beside them, or the hub's Parquet files, whose rows hold only
image, question and answer. Known dirt: ``"CLOSED "`` with a space, integer answers, types such as ``"PRES, ATTRIB"``
(the first one counts) and the misspelt ``PRSE`` and ``ATRIB``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from medforge.convert import types
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

NAME = "VQA-RAD"
LICENCE = "CC0-1.0"
NEEDS = (
    "trainset.json and testset.json with image_name, question and answer, and images/ beside them; "
    "or the hub's Parquet files (train-*.parquet, test-*.parquet)"
)
FILES = {"trainset.json": "train", "testset.json": "test"}
QUESTION_TYPES = {
    "PRES": "presence",
    "PRSE": "presence",
    "POS": "position",
    "ABN": "abnormality",
    "MODALITY": "modality",
    "PLANE": "plane",
    "SIZE": "size",
    "ORGAN": "organ",
    "COLOR": "color",
    "ATTRIB": "attribute",
    "ATRIB": "attribute",
    "COUNT": "quantity",
    "OTHER": "other",
}
_PARQUET_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def found(path: Path) -> str | None:
    """What of VQA-RAD is in the folder, or None. Parquet files are taken for it only if something names it.

    PathVQA's hub copy has the very same columns, and another licence.
    """
    names = [name for name in FILES if (path / name).is_file() and '"image_name"' in head(path / name)]
    if names:
        return f"{' and '.join(names)} with image_name"
    if path.is_dir() and (files := _parquet_files(path)):
        card = head(path / "README.md") if (path / "README.md").is_file() else ""
        if re.search(r"vqa[-_ ]?rad", f"{path.name} {card}", re.IGNORECASE):
            return f"{len(files)} Parquet files of the hub's copy"
    return None


def rows(source: Source) -> Iterator[Row]:
    """A sample or a reject for every row. Raises ValueError when the folder has no file of VQA-RAD."""
    files = {name: split for name, split in FILES.items() if (source.path / name).is_file()}
    if files:
        for name, split in files.items():
            yield from each_row(name, json_rows(source.path / name), partial(_json, source, split))
        return
    parquet = _parquet_files(source.path) if source.path.is_dir() else []
    if not parquet:
        raise ValueError(f"{source.path}: is not VQA-RAD, which needs {NEEDS}")
    for file, split in parquet:
        name = file.relative_to(source.path).as_posix()
        yield from each_row(name, _parquet_rows(file), partial(_hub, source, split))


def _json(source: Source, split: str, row: Any) -> Pair:
    question = text_field(row, "question", blank="blank-question")
    answer = text_field(row, "answer", blank="blank-answer")
    name = text_field(row, "image_name")
    image = source.images.load(find_image(source.folder, [f"images/{name}", name]))
    first = optional_text(row, "question_type").split(",")[0].strip().upper()
    return question_sample(
        source=NAME,
        licence=LICENCE,
        split=split,
        image=image,
        question=question,
        answer=answer,
        answer_type=answer_type_field(row, answer),
        question_type=QUESTION_TYPES.get(first),
        language="en",
        study_id=name,
        key=optional_text(row, "qid"),
    )


def _hub(source: Source, split: str, row: dict[str, Any]) -> Pair:
    question = text_field(row, "question", blank="blank-question")
    answer = text_field(row, "answer", blank="blank-answer")
    data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    if not isinstance(data, bytes):
        raise RowError("missing-image", "field image holds no bytes")
    ref = source.images.of_bytes(data)
    return question_sample(
        source=NAME,
        licence=LICENCE,
        split=split,
        image=(ref, data),
        question=question,
        answer=answer,
        answer_type=types.answer_type(answer),
        question_type=None,
        language="en",
        study_id=ref.sha256,  # the hub's copy has no names; the same picture has the same bytes there
        key="",
    )


def _parquet_files(folder: Path) -> list[tuple[Path, str]]:
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    named = [(file, _PARQUET_SPLITS.get(file.name.split("-")[0].removesuffix(".parquet"))) for file in files]
    return [(file, split) for file, split in named if split]


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: is not a Parquet file: {error}") from None
    if missing := [name for name in ("image", "question", "answer") if name not in table.schema_arrow.names]:
        raise ValueError(f"{file}: has no column {' and no '.join(missing)}; found {table.schema_arrow.names}")
    for batch in table.iter_batches(batch_size=64, columns=["image", "question", "answer"]):
        yield from batch.to_pylist()


FORMAT = Format(LICENCE, NEEDS, found, rows)
