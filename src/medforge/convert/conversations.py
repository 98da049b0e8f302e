"""Conversations about images: the LLaVA, LLaVA-Med, Qwen fine-tuning (2U1) and LLaMA-Factory sharegpt family.

A JSON list or JSON lines of rows such as ``{"id", "image": "a.jpg", "conversations": [{"from": "human", "value":
"<image>\\n…"}, {"from": "gpt", "value": "…"}]}``, with the variants that are about: ``conversatons`` (LLaVA-Med's own
spelling), ``messages`` with role/content, content as a list of parts, several images, `[question, answer]` pairs, and
the tags and columns of LLaMA-Factory's dataset_info.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from medforge.convert import boxes, types
from medforge.convert.common import (
    UNSPLIT,
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
    sound,
)
from medforge.files import read_json
from medforge.records import IMAGE_MARK, Sample, Turn, sample_id

NEEDS = (
    "*.json (a list) or *.jsonl with `conversations` or `messages` and `image` or `images` in each row; "
    "splits by file names that hold train, val, dev or test"
)
KEYS = ("conversations", "conversatons", "messages")
INFO = "dataset_info.json"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot"), "assistant"),
    "system": "system",
}
_SPLIT_WORD = re.compile(r"(train|val|valid|validation|validate|dev|test)(ing|set|s)?\d*")
_SPLITS = {"train": "train", "test": "test"}


@dataclass(frozen=True)
class _File:
    """A file of rows, its split, and the names that dataset_info.json gives its columns and tags."""

    path: Path
    split: str
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def found(path: Path) -> str | None:
    """The files with conversations in the folder, or the file itself; None when there is none."""
    names = [file.name for file in ([path] if path.is_file() else _candidates(path)) if _has_rows(file)]
    return f"{', '.join(names)} with conversations" if names else None


def rows(source: Source) -> Iterator[Row]:
    """A sample or a reject for every row. Raises ValueError when there is no such file, or one is broken."""
    for file in _files(source.path):
        lines = _json_lines(file.path) if file.path.suffix == ".jsonl" else json_rows(file.path)
        yield from each_row(file.path.name, lines, partial(_make, source, file))


def _candidates(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jsonl") and f.name != INFO and f.is_file())


def _has_rows(file: Path) -> bool:
    text = head(file)
    return any(f'"{key}"' in text for key in KEYS)


def _files(path: Path) -> list[_File]:
    folder = path if path.is_dir() else path.parent
    info = _dataset_info(folder)
    if path.is_file():
        named = [path]
    elif info:
        named = [folder / name for name in info]
    else:
        named = [file for file in _candidates(folder) if _has_rows(file)]
    if not named:
        raise ValueError(f"{path}: has no conversations; needed: {NEEDS}")
    splits = [split_of(file.name) for file in named]
    if any(splits):
        splits = [split or "train" for split in splits]
    return [
        _File(file, split, info.get(file.name, {}).get("columns", {}), info.get(file.name, {}).get("tags", {}))
        for file, split in zip(named, splits, strict=True)
    ]


def split_of(name: str) -> str:
    """The split that a file's name tells: ``train_2.json``, ``llava_val.jsonl``, ``testset.json``; else UNSPLIT.

    Raises ValueError when it tells two.
    """
    words = [_SPLIT_WORD.fullmatch(word) for word in re.split(r"[^a-z0-9]+", Path(name).stem.lower())]
    splits = {_SPLITS.get(match.group(1), "validation") for match in words if match}
    if len(splits) > 1:
        raise ValueError(f"{name}: the file's name tells the splits {' and '.join(sorted(splits))}; rename it")
    return splits.pop() if splits else UNSPLIT


def _dataset_info(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of LLaMA-Factory's dataset_info.json whose file is in the folder, by file name."""
    path = folder / INFO
    if not path.is_file():
        return {}
    tree = read_json(path)
    if not isinstance(tree, dict) or not all(isinstance(entry, dict) for entry in tree.values()):
        raise ValueError(f"{path}: an object of data set entries is expected")
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in tree.items():
        file = str(entry.get("file_name", ""))
        if not file or not (folder / file).is_file():
            continue
        if (formatting := entry.get("formatting", "alpaca")) != "sharegpt":
            raise ValueError(f"{path}: {name}: formatting is {formatting}; only sharegpt holds conversations")
        for part in ("columns", "tags"):
            if not isinstance(entry.get(part, {}), dict):
                raise ValueError(f"{path}: {name}: {part} is no object")
        entries[file] = entry
    if not entries:
        raise ValueError(f"{path}: none of its entries names a file that is in the folder")
    return entries


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as stream:
        empty = True
        for line in stream:
            if not line.strip():
                continue
            empty = False
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                yield RowError("bad-row", f"is not valid JSON: {error}")
    if empty:
        raise ValueError(f"{path}: is empty; JSON lines are expected")


def _make(source: Source, file: _File, row: Any) -> Pair:
    if not isinstance(row, dict):
        raise RowError("bad-row", "is no object")
    turns, inline = _turns(row, file)
    names = _image_names(row, file) or inline
    if not names and isinstance(row.get("id"), str) and any(IMAGE_MARK in turn.text for turn in turns):
        names = [row["id"] if PurePosixPath(row["id"]).suffix else f"{row['id']}.png"]  # Med-GRIT: the id is the stem
    found_images = [_find(source, name) for name in names]  # all are claimed before one may turn out unreadable
    loaded = [source.images.load(path) for path in found_images]
    refs = tuple(ref for ref, _ in loaded)
    turns, found_boxes = boxes.extract(_with_marks(turns, len(refs)))
    if turns[-1].role != "assistant":
        raise RowError("blank-answer", f"the last turn is the {turns[-1].role}'s, so the sample has no answer")
    key = optional_text(row, "id", "question_id")
    study = optional_text(row, "study_id", "study") or (_study(names[0]) if names else "")
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    questions = [turn.text.replace(IMAGE_MARK, "").strip() for turn in turns if turn.role == "user"]
    given = optional_text(row, "question_type").lower()
    identity = sample_id(source.name, refs, turns, key)
    sample = Sample(
        id=identity,
        images=refs,
        turns=turns,
        answer_type=answer_type_field(row, answers[-1] if answers else ""),
        question_type=given or types.question_type(questions[-1] if questions else ""),
        question_type_from="field" if given else "rule",
        language=optional_text(row, "language", "lang") or types.language(" ".join(questions)),
        study_id=study or identity,
        source=source.name,
        licence=source.data.licence or "unknown",
        split=file.split,
        boxes=found_boxes,
        target_diagnosis=optional_text(row, "target_diagnosis", "target_diag") or None,
    )
    return sound(sample), [data for _, data in loaded]


def _turns(row: dict[str, Any], file: _File) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns, and the images that stand in their content."""
    keys = [file.columns["messages"]] if "messages" in file.columns else list(KEYS)
    key = next((name for name in keys if name in row), None)
    if key is None:
        raise RowError("bad-row", f"field {' or '.join(keys)} is missing")
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise RowError("bad-row", f"field {key} is no list of turns")
    turns: list[Turn] = []
    images: list[str] = []
    if system := optional_text(row, file.columns.get("system", "system")):
        turns.append(Turn("system", system))
    for number, message in enumerate(messages, start=1):
        where = f"field {key}, turn {number}"
        if isinstance(message, list) and len(message) == 2 and all(isinstance(part, str) for part in message):
            turns += [Turn("user", message[0].strip()), Turn("assistant", message[1].strip())]
        elif isinstance(message, dict):
            turns.append(_turn(message, file, where, images))
        else:
            raise RowError("bad-row", f"{where} is neither an object nor a question and its answer")
    return tuple(turns), images


def _turn(message: dict[str, Any], file: _File, where: str, images: list[str]) -> Turn:
    tags = file.tags
    role_key = next((key for key in (tags.get("role_tag"), "from", "role") if key in message), None)
    content_key = next((key for key in (tags.get("content_tag"), "value", "content") if key in message), None)
    if role_key is None or content_key is None:
        raise RowError("bad-row", f"{where} has the keys {sorted(message)}; from and value, or role and content needed")
    own = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system") if f"{role}_tag" in tags}
    role = (own | _ROLES | own).get(str(message[role_key]).strip() if own else str(message[role_key]).strip().lower())
    if role is None:
        raise RowError("bad-role", f"{where}: {role_key} is {message[role_key]!r}")
    content = message[content_key]
    if isinstance(content, str):
        return Turn(role, content.strip())
    if not isinstance(content, list):
        raise RowError("bad-row", f"{where}: {content_key} is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif kind == "image":
            texts.append(IMAGE_MARK)
            images += [part["image"]] if isinstance(part.get("image"), str) else []
        else:
            raise RowError("bad-row", f"{where}: a part of {content_key} is neither a text nor an image")
    return Turn(role, "\n".join(text for text in texts if text))


def _image_names(row: dict[str, Any], file: _File) -> list[str]:
    keys = [file.columns["images"]] if "images" in file.columns else ["image", "images"]
    for key in keys:
        value = row.get(key)
        names = [value] if isinstance(value, str) else value
        if names in (None, [], [""]):
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise RowError("bad-row", f"field {key} is neither a path nor a list of paths")
        return [name.strip() for name in names]
    return []


def _find(source: Source, name: str) -> Path:
    """The image file. An absolute path is rebased: the longest tail of it that is in the source folder."""
    path = name.removeprefix("file://").replace("\\", "/")
    path = re.sub(r"^[A-Za-z]:/", "/", path)
    if not path.startswith("/"):
        return find_image(source.folder, [path, f"images/{path}"])
    parts = PurePosixPath(path).parts[1:]
    if not parts:
        raise RowError("missing-image", f"{name} is no file")
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    try:
        image = find_image(source.folder, [*tails, f"images/{parts[-1]}"])
    except RowError:
        raise RowError(
            "missing-image", f"no part of the end of {name} is in the source folder, nor images/{parts[-1]}"
        ) from None
    source.images.claim(image, path)
    return image


def _study(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _with_marks(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """The turns with a mark for each image: where the text has none at all, before the first user turn."""
    if images == 0 or any(IMAGE_MARK in turn.text for turn in turns):
        return turns
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    marked = Turn("user", f"{IMAGE_MARK}\n" * images + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


FORMAT = Format("", NEEDS, found, rows)
