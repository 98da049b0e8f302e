"""What the readers share: the source, its images, and how a row becomes a sample or a reject.

Rows are counted from 1, and a reject is named ``<file>#<row>``: with the file's name only, so that the same source
gives the same rejects wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medforge.config import DataConfig
from medforge.convert import types
from medforge.dataset import Reject, decode_image
from medforge.files import read_json, sha256_bytes
from medforge.progress import track
from medforge.records import IMAGE_MARK, ImageRef, Sample, Turn, problems, sample_id

UNSPLIT = ""  # the split of a sample whose source does not tell one; `splits.assign` deals it

Pair = tuple[Sample, list[bytes]]
Row = Pair | Reject

_HEAD_BYTES = 1 << 16
_STAND_IN = ImageRef("", 1, 1)
_SPECIAL = re.compile(r"<\|[a-z_]+(?::\d+)?\|>")
_REASONS = {"empty-answer": "blank-answer", "empty-question": "blank-question"}


class RowError(Exception):
    """A row that cannot become a sample: `reason` is a stable name, `detail` names the field."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ImageFiles:
    """The images of a source. Each is decoded once, however often it is asked for; bytes are handed on unchanged.

    While `asleep`, no image is opened and a stand-in is given: for the rows of other shards, of which a reader needs
    no more than what they claim.
    """

    def __init__(self) -> None:
        self.asleep = False
        self._refs: dict[str, ImageRef | str] = {}
        self._claims: dict[Path, str] = {}

    def load(self, path: Path) -> tuple[ImageRef, bytes]:
        """The image file at `path`. Raises RowError unreadable-image."""
        if self.asleep:
            return _STAND_IN, b""
        data = path.read_bytes()
        return self._ref(str(path), data, path.name), data

    def of_bytes(self, data: bytes) -> ImageRef:
        """The image in `data`. Raises RowError unreadable-image."""
        return _STAND_IN if self.asleep else self._ref(sha256_bytes(data), data, "the embedded image")

    def _ref(self, key: str, data: bytes, name: str) -> ImageRef:
        if key not in self._refs:
            try:
                picture = decode_image(data)
                self._refs[key] = ImageRef(sha256_bytes(data), picture.width, picture.height)
            except ValueError as error:
                self._refs[key] = str(error)
        known = self._refs[key]
        if isinstance(known, str):
            raise RowError("unreadable-image", f"{name}: {known}")
        return known

    def claim(self, path: Path, name: str) -> None:
        """Note that the absolute path `name` was found at `path`; RowError when another one was found there before."""
        first = self._claims.setdefault(path, name)
        if first != name:
            raise RowError("ambiguous-image", f"{name} and {first} would both be {path.name} of this source")


@dataclass(frozen=True)
class Source:
    """What is converted: a folder or a JSON file, the name it goes by, and the settings."""

    path: Path
    name: str
    data: DataConfig
    images: ImageFiles = field(default_factory=ImageFiles)

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Format:
    """A source format: its licence (empty when the user has to tell it), what it needs, and its reader.

    `found` says what it recognises in a folder or file, or None; `rows` yields a sample or a reject for every row, and
    reads no further than the row that it yields (a shard lets the images of others sleep, row by row).
    """

    licence: str
    needs: str
    found: Callable[[Path], str | None]
    rows: Callable[[Source], Iterator[Row]]


def each_row(file: str, rows: Iterable[Any], make: Callable[[Any], Pair]) -> Iterator[Row]:
    """What `make` makes of every row of `file`, or a Reject where it raised RowError."""
    for number, row in enumerate(track(rows, f"reading {file}", unit="row"), start=1):
        try:
            if isinstance(row, RowError):
                raise row
            yield make(row)
        except RowError as error:
            yield Reject(f"{file}#{number}", "convert", error.reason, f"{file} row {number}: {error.detail}")


def json_rows(path: Path) -> list[Any]:
    """The rows of a JSON file. Raises ValueError when it is missing, empty, broken or no list."""
    rows = read_json(path)
    if not isinstance(rows, list):
        what = f"an object with the keys {', '.join(list(rows)[:6])}" if isinstance(rows, dict) else repr(rows)[:60]
        raise ValueError(f"{path}: holds {what}; a list of rows is expected")
    return rows


def head(path: Path) -> str:
    """The beginning of a file as text, to recognise its format without reading all of it."""
    with path.open("rb") as stream:
        return stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace")


def text_field(row: Any, name: str, blank: str | None = None) -> str:
    """The text of a field, numbers as text. RowError bad-row when it is missing or no text, else `blank`."""
    if not isinstance(row, dict):
        raise RowError("bad-row", f"is {_kind(row)}; an object is expected")
    if name not in row:
        raise RowError("bad-row", f"field {name} is missing")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(blank if blank and value is None else "bad-row", f"field {name} is {_kind(value)}, not text")
    text = str(value).strip()
    if not text:
        raise RowError(blank or "bad-row", f"field {name} is blank")
    return text


def optional_text(row: dict[str, Any], *names: str) -> str:
    """The first of these fields that holds text or a number, stripped; empty when none does."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), f"of type {type(value).__name__}")


def find_image(folder: Path, names: Iterable[str]) -> Path:
    """The first of these relative paths that is a file below `folder`. Raises RowError missing-image."""
    tried = []
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise RowError("missing-image", f"{name} leads out of the source folder")
        if (folder / pure).is_file():
            return folder / pure
        tried.append(name)
    raise RowError("missing-image", f"there is no file {' or '.join(tried)} in the source folder")


def answer_type_field(row: dict[str, Any], answer: str) -> str:
    """The field `answer_type` in any case and spacing, or what the rule says where it is missing or unknown."""
    value = optional_text(row, "answer_type").lower()
    return value if value in ("open", "closed") else types.answer_type(answer)


def question_sample(
    source: str,
    licence: str,
    split: str,
    image: tuple[ImageRef, bytes],
    question: str,
    answer: str,
    answer_type: str,
    question_type: str | None,
    language: str,
    study_id: str,
    key: str,
) -> Pair:
    """One question about one image. `question_type` None lets the rule decide."""
    turns = (Turn("user", f"{IMAGE_MARK}\n{question}"), Turn("assistant", answer))
    refuse_special(question, answer)
    sample = Sample(
        id=sample_id(source, (image[0],), turns, key),
        images=(image[0],),
        turns=turns,
        answer_type=answer_type,
        question_type=question_type or types.question_type(question),
        question_type_from="field" if question_type else "rule",
        language=language,
        study_id=study_id,
        source=source,
        licence=licence,
        split=split,
    )
    return sound(sample), [image[1]]


def refuse_special(*texts: str) -> None:
    """RowError special-token when a text holds a control token such as <|im_end|>, which would end a turn early."""
    for text in texts:
        if match := _SPECIAL.search(text):
            raise RowError("special-token", f"the text holds the control token {match.group(0)}")


def sound(sample: Sample) -> Sample:
    """The sample itself; RowError with the first breach of the contract."""
    for reason, detail in problems(sample if sample.split else replace(sample, split="train")):
        raise RowError(_REASONS.get(reason, reason), detail)
    return sample
