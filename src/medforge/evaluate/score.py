"""Predictions to results.json: every metric, for every arm and every slice of the same samples.

{"schema_version": 1,
 "dataset": {"digest", "source", "licence", "split", "generated"},
 "leakage": what the data set's validation.json says that splits share, or null where it was not validated,
 "about": what the caller says of the arms (model digests and the like),
 "samples": {"n", "images", "question_type_from": {"field": n, "rule": n}},
 "arms": {arm: {slice: {metric: {"value", "n"[, "reason"]}}}},
 "paired": {"n", "ids_sha256"}: all arms answered these same samples, in this order,
 "comparison": see `medforge.evaluate.compare.intervals`}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medforge.dataset import Dataset
from medforge.evaluate import compare
from medforge.evaluate.metrics import METRICS, total, values
from medforge.evaluate.predictions import Prediction, read
from medforge.files import read_json, sha256_json, write_json
from medforge.progress import Progress
from medforge.records import TYPE_ORIGINS

SCHEMA_VERSION = 1

Arms = Mapping[str, Sequence[Prediction]]

_SAME = ("question", "reference", "answer_type", "question_type", "question_type_from", "language", "boxes", "images")


def run(predictions: Mapping[str, Path], dataset: Path, out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Score the predictions files, by arm, of samples of one split of `dataset`, and write results.json into `out`.

    Returns what results.json holds. Raises ValueError when a file is broken, holds another arm's rows or none, when
    the arms do not answer the same samples, or when the samples are not those of one split.
    """
    arms = {arm: read_arm(arm, path) for arm, path in predictions.items()}
    results = score(arms)
    opened = Dataset.open(dataset)
    first = next(iter(arms.values()))
    report = dataset / "validation.json"
    whole = {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "digest": opened.digest,
            "source": opened.manifest["source"],
            "licence": opened.manifest["licence"],
            "split": _split_of(opened, first),
            "generated": "generated" in opened.manifest["source"].lower(),
        },
        "leakage": read_json(report).get("leakage") if report.is_file() else None,
        "about": about,
        **results,
    }
    write_json(out / "results.json", whole)
    return whole


def read_arm(arm: str, path: Path) -> list[Prediction]:
    """The predictions of one arm, sorted by sample id. ValueError when the file has none, another arm's, or an id
    twice (which other settings leave behind: `predictions.seal` drops them)."""
    rows = sorted(read(path), key=lambda row: row.id)
    if not rows:
        raise ValueError(f"{path}: has no predictions; run `medforge evaluate predict` first")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row.arm != arm:
            raise ValueError(f"{path}: sample {row.id}: field 'arm' is {row.arm!r}, but the file is given as {arm!r}")
        if following is not None and following.id == row.id:
            raise ValueError(f"{path}: sample {row.id} stands twice, under two keys; predict into a new file")
    return rows


def score(arms: Arms) -> dict[str, Any]:
    """The sections samples, arms, paired and comparison of results.json, for rows in the same order in each arm."""
    check_paired(arms)
    rows = next(iter(arms.values()))
    parts = slices(rows)
    scored: dict[str, dict[str, list[Any]]] = {}
    with Progress("scoring", len(arms) * len(METRICS), "metric") as progress:
        for arm, predictions in arms.items():
            scored[arm] = {}
            for name, metric in METRICS.items():
                scored[arm][name] = values(metric, predictions)
                progress.advance()
    return {
        "samples": {
            "n": len(rows),
            "images": len({image for row in rows for image in row.images}),
            "question_type_from": {
                origin: sum(row.question_type_from == origin for row in rows) for origin in TYPE_ORIGINS
            },
        },
        "arms": {
            arm: {
                part: {
                    name: total(metric, [predictions[i] for i in where], [scored[arm][name][i] for i in where])
                    for name, metric in METRICS.items()
                }
                for part, where in parts.items()
            }
            for arm, predictions in arms.items()
        },
        "paired": {"n": len(rows), "ids_sha256": sha256_json([row.id for row in rows])},
        "comparison": compare.intervals(scored, compare.clusters([row.images or (row.id,) for row in rows]), parts),
    }


def slices(rows: Sequence[Prediction]) -> dict[str, list[int]]:
    """The indexes of the rows of each slice: all, then by answer_type, question_type and, where there are several,
    language."""
    found = {"all": list(range(len(rows)))}
    for field in ("answer_type", "question_type", "language"):
        present = sorted({getattr(row, field) for row in rows})
        if field == "language" and len(present) < 2:
            continue
        for value in present:
            found[f"{field}={value}"] = [i for i, row in enumerate(rows) if getattr(row, field) == value]
    return found


def check_paired(arms: Arms) -> None:
    """Raise ValueError, naming the first difference, unless all arms answer the same samples in the same order."""
    if not arms:
        raise ValueError("no predictions are given; at least one arm is needed")
    (name, rows), *others = arms.items()
    for other, theirs in others:
        ids, their_ids = [row.id for row in rows], [row.id for row in theirs]
        if ids != their_ids:
            alone = sorted(set(ids) ^ set(their_ids))
            detail = f"sample {alone[0]} is in one only ({len(alone)} such)" if alone else "their order differs"
            raise ValueError(f"arms {name!r} and {other!r} do not answer the same samples: {detail}")
        for mine, their in zip(rows, theirs, strict=True):
            for field in _SAME:
                a, b = getattr(mine, field), getattr(their, field)
                if a != b:
                    raise ValueError(f"sample {mine.id}: field {field!r} is {a!r} in {name!r} but {b!r} in {other!r}")


def _split_of(dataset: Dataset, rows: Sequence[Prediction]) -> str:
    """The split that holds every row. The test split is tried first: an exact repeat has one id in two splits."""
    ids = {row.id for row in rows}
    absent: list[str] = []
    for split in reversed(dataset.splits()):
        missing = ids - {sample.id for sample in dataset.samples(split)}
        if not missing:
            return split
        if not absent or len(missing) < len(absent):
            absent = sorted(missing)
    where = f"sample {absent[0]} ({len(absent)} of {len(ids)} such)" if absent else "any sample"
    raise ValueError(f"{dataset.folder}: no split holds {where} of the predictions; they are of another data set")
