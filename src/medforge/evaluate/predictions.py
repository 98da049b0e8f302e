"""The predictions file: append-only JSONL, one row a sample and arm, keyed by a content hash.

A run that was killed is resumed by predicting the keys that are `missing`; `seal` then puts the rows into one order,
so that a resumed run leaves the same bytes as an unbroken one.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from medforge.files import canonical_json, sha256_json, write_atomic
from medforge.metrics.boxes import XYXY
from medforge.records import ANSWER_TYPES, TYPE_ORIGINS

FINISHES: tuple[str, ...] = ("stop", "length")
HEADS: tuple[str, ...] = ("region", "match")


@dataclass(frozen=True)
class Prediction:
    """What one arm (base, tuned, champion) answered to one sample, and what it was asked.

    nll: sum over the reference answer's tokens, the end token included, of the negative log-likelihood, in nats;
        None where the back end gives no likelihoods.
    answer_tokens: the number of those tokens. generated_tokens: length of the answer, in tokens of the same model.
    finish: `stop` when the model ended its answer, `length` when the limit cut it off.
    boxes, predicted_boxes: (x1, y1, x2, y2) as shares of the image's width and height: the boxes that the reference
        answer names, and those read from the prediction, which may be inverted or out of range.
    images: SHA-256 of the sample's images.
    heads: the task heads that the model has; the fields below are None without them, and left out of the row.
    region: the region head's box on the first image. region_target: the sample's one box there, None where it has
        none or several.
    match, match_reference, match_wrong: the match head's probability, 0–1, that a claim fits the image: the model's
        own answer, the reference answer, a certainly wrong one; None where there is no such claim.
    """

    key: str
    id: str
    arm: str
    question: str
    reference: str
    prediction: str
    nll: float | None
    answer_tokens: int
    generated_tokens: int
    finish: str
    answer_type: str
    question_type: str
    question_type_from: str
    language: str
    boxes: tuple[XYXY, ...] = ()
    predicted_boxes: tuple[XYXY, ...] = ()
    images: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    region: XYXY | None = None
    region_target: XYXY | None = None
    match: float | None = None
    match_reference: float | None = None
    match_wrong: float | None = None

    def to_row(self) -> dict[str, Any]:
        """Plain JSON-able values, as `prediction_from_row` takes them."""
        row = asdict(self)
        return row if self.heads else {name: value for name, value in row.items() if name not in _OF_HEADS}


_NAMES = tuple(f.name for f in fields(Prediction))
_OF_HEADS = _NAMES[_NAMES.index("heads") :]
_TEXTS = (
    *("key", "id", "arm", "question", "reference", "prediction", "finish"),
    *("answer_type", "question_type", "question_type_from", "language"),
)
_ALLOWED = {"finish": FINISHES, "answer_type": ANSWER_TYPES, "question_type_from": TYPE_ORIGINS}


def prediction_key(sample_id: str, arm: str, model_digest: str, settings: Mapping[str, Any]) -> str:
    """The key of a row: SHA-256 over the sample, the arm, the model and the prompt and generation settings."""
    return sha256_json([sample_id, arm, model_digest, dict(settings)])


def prediction_from_row(row: Any) -> Prediction:
    """The prediction that `Prediction.to_row` wrote; ValueError names the field that breaks the contract."""
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if absent := [name for name in _NAMES if name not in row and (row.get("heads") or name not in _OF_HEADS)]:
        raise ValueError(f"field {absent[0]!r} is missing")
    if unknown := sorted(set(row) - set(_NAMES)):
        raise ValueError(f"field {unknown[0]!r} is not part of a prediction")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"field {name!r} is {row[name]!r}; a text is expected")
    if not row["reference"].strip():
        raise ValueError("field 'reference' is blank; there is nothing to compare with")
    for name, allowed in _ALLOWED.items():
        if row[name] not in allowed:
            raise ValueError(f"field {name!r} is {row[name]!r}; expected one of {', '.join(allowed)}")
    for name, least in (("answer_tokens", 1), ("generated_tokens", 0)):
        if type(row[name]) is not int or row[name] < least:
            raise ValueError(f"field {name!r} is {row[name]!r}; a whole number of at least {least} is expected")
    if row["nll"] is not None and not (_is_number(row["nll"]) and row["nll"] >= 0):
        raise ValueError(f"field 'nll' is {row['nll']!r}; null or a finite number of at least 0 is expected")
    if not isinstance(row["images"], list | tuple) or not all(isinstance(image, str) for image in row["images"]):
        raise ValueError(f"field 'images' is {row['images']!r}; a list of SHA-256 is expected")
    values = row | {name: _boxes(name, row[name]) for name in ("boxes", "predicted_boxes")}
    return Prediction(**(values | {"images": tuple(row["images"])} | _of_heads(row)))


def _of_heads(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a model's task heads fill; none where it has no head."""
    heads = row.get("heads", ())
    if not isinstance(heads, list | tuple) or not all(head in HEADS for head in heads):
        raise ValueError(f"field 'heads' is {heads!r}; a list of {', '.join(HEADS)} is expected")
    values: dict[str, Any] = {"heads": tuple(heads)}
    for name in _OF_HEADS[1:]:
        value = row.get(name)
        if value is None:
            continue
        if name.partition("_")[0] not in heads:
            raise ValueError(f"field {name!r} is {value!r}, but field 'heads' names no such head")
        if name in ("region", "region_target"):
            (values[name],) = _boxes(name, [value])
        elif _is_number(value) and 0 <= value <= 1:
            values[name] = float(value)
        else:
            raise ValueError(f"field {name!r} is {value!r}; null or a probability from 0 to 1 is expected")
    return values


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _boxes(name: str, value: Any) -> tuple[XYXY, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"field {name!r} is {value!r}; a list of [x1, y1, x2, y2] is expected")
    for box in value:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(number) for number in box):
            raise ValueError(f"field {name!r} holds {box!r}; four finite numbers are expected")
    return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in value)


def _line(prediction: Prediction) -> bytes:
    return canonical_json(prediction.to_row()) + b"\n"


def append(path: Path, rows: Iterable[Prediction]) -> None:
    """Add `rows` at the end of `path` in one write, flushed to the disk, after cutting off a torn last line."""
    data = b"".join(map(_line, rows))
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("ab", buffering=0) as stream:
        written = stream.write(data)
        assert written == len(data), f"{path}: {written} of {len(data)} bytes were written"
        os.fsync(stream.fileno())


def _mend(path: Path) -> None:
    """Cut off, or end with a new line, what a crash left behind the last new line."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        content = stream.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if _is_whole(tail):
            stream.write(b"\n")
        else:
            stream.truncate(len(content) - len(tail))


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        return False
    return True


def read(path: Path) -> list[Prediction]:
    """The rows of `path` in file order; of rows with the same key the first counts.

    A last line that a crash tore off (no new line behind it, no whole JSON) is dropped and told on stderr. ValueError
    names the file, the line and the field of any other broken row.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: is not a predictions file: {error.strerror}") from None
    if lines[-1] and not _is_whole(lines[-1]):
        print(f"{path}: line {len(lines)} is torn (the run was interrupted) and is dropped", file=sys.stderr)
        lines.pop()
    rows: dict[str, Prediction] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = prediction_from_row(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: line {number}: not valid JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        rows.setdefault(row.key, row)
    return list(rows.values())


def missing(path: Path, keys: Sequence[str]) -> list[str]:
    """Those of `keys`, in their order, that have no row in `path` yet: all of them when there is no such file."""
    present = {row.key for row in read(path)} if path.exists() else set()
    return [key for key in keys if key not in present]


def seal(path: Path, order: Sequence[str]) -> list[Prediction]:
    """Rewrite `path`, whole or not at all, as the rows of the keys in `order`, and return them.

    Rows of other keys (of an earlier model or other settings) are left out. ValueError when a key has no row.
    """
    rows = {row.key: row for row in read(path)}
    if absent := [key for key in order if key not in rows]:
        raise ValueError(f"{path}: {len(absent)} of {len(order)} predictions are missing; first: {absent[0]}")
    sealed = [rows[key] for key in order]
    write_atomic(path, b"".join(map(_line, sealed)))
    return sealed
