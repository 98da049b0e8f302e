"""report.html: one file that a reviewer reads before signing. No script, no outside asset, nothing to install."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medforge.dataset import Dataset
from medforge.evaluate import compare, plots
from medforge.evaluate.metrics import METRICS, is_right
from medforge.evaluate.predictions import XYXY, Prediction
from medforge.files import write_atomic
from medforge.records import Sample

THUMBNAIL = 224  # pixels of the longer side
_PICTURE_BYTES = 1_300_000  # of base64 over all cases: the file stays below 2 MB
_LONGEST_TEXT = 1200
_MOST_BOXES = 12
_PAIR_CATEGORIES = (
    ("mended", "Mended: {old} wrong, {new} right"),
    ("broken", "Broken: {old} right, {new} wrong"),
    ("both-wrong", "Wrong in both"),
    ("both-right", "Right in both"),
)

Rows = Mapping[str, Sequence[Prediction]]


def write(
    results: Mapping[str, Any],
    predictions: Rows,
    dataset: Dataset,
    out: Path,
    verdict: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    about: Mapping[str, Any] | None = None,
    samples: int = 24,
) -> Path:
    """Write report.html, and comparison.md where two arms were compared, into `out`; the report's path is returned.

    `results` is what `score.run` returned and `predictions` the rows of each arm. verdict: the gate's verdict.json.
    curves: ``{stage: [{"step", "loss"} or {"step", "eval_loss"}]}``. about: what is told of the run; the
    results' own `about` where it is None. samples: how many cases are shown at most; fewer when their pictures would
    make the file too large, which the report says.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    arms = list(predictions)
    pair = _pair(results, arms)
    environment = Environment(
        loader=PackageLoader("medforge.evaluate", ""),
        autoescape=True,  # answers are a model's output, questions and types a data set's: none is trusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cases, left_out = _cases(predictions, pair, dataset, str(results["dataset"]["split"]), samples)
    html = environment.get_template("report.html").render(
        results=results,
        arms=arms,
        pair=pair,
        about=_flat(results["about"] if about is None else about),
        leaks=_leaks(results),
        verdict=verdict,
        overall=_tables(results, arms, pair, ["all"])[0],
        parts=_tables(results, arms, pair, [p for p in results["arms"][arms[0]] if p != "all"]),
        reasons=_reasons(results, arms),
        plots=_plots(results, predictions, curves or {}),
        cases=cases,
        left_out=left_out,
        method=results["comparison"]["method"],
    )
    write_atomic(out / "report.html", html)
    if pair is not None:
        write_atomic(out / "comparison.md", compare.comparison(results, *pair))
    return out / "report.html"


def _pair(results: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str] | None:
    """The two arms that the report sets side by side: base and candidate where they were compared, else the first
    pair; None for a single arm."""
    pairs = [(pair["reference"], pair["candidate"]) for pair in results["comparison"]["pairs"]]
    assert all(arm in arms for pair in pairs for arm in pair), (pairs, arms)
    return next((pair for pair in pairs if pair[0] == "base"), pairs[0] if pairs else None)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, text) pairs, for a table of two columns."""
    pairs: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            pairs += _flat(item, f"{prefix}{name}.")
        elif isinstance(item, list | tuple):
            shown = ", ".join(str(part) for part in item[:20])
            pairs.append((f"{prefix}{name}", shown + (f", … ({len(item)} in all)" if len(item) > 20 else "")))
        else:
            pairs.append((f"{prefix}{name}", "–" if item is None else str(item)))
    return pairs


def _leaks(results: Mapping[str, Any]) -> list[str]:
    """For each other split that shares images or studies with the scored one, a sentence that says so."""
    split = results["dataset"]["split"]
    return [
        f"{row['shared_images']} images and {row['shared_studies']} studies stand in both "
        f"{' and '.join(row['splits'])}: {row['advice']}."
        for row in results["leakage"] or []
        if split in row["splits"] and (row["shared_images"] or row["shared_studies"])
    ]


def _tables(
    results: Mapping[str, Any], arms: Sequence[str], pair: tuple[str, str] | None, parts: Sequence[str]
) -> list[dict[str, Any]]:
    """For each slice its metrics as text: a cell an arm, n, and where there is a pair the difference and interval."""
    tables = []
    for part in parts:
        compared = {row["metric"]: row for row in compare.table(results, part, *pair)} if pair else {}
        rows = []
        for name, metric in METRICS.items():
            cells = [results["arms"][arm][part][name] for arm in arms]
            if part != "all" and all(cell["value"] is None for cell in cells):
                continue
            numbers = list(dict.fromkeys(str(cell["n"]) for cell in cells))
            row = {"metric": name, "better": metric.better, "n": " / ".join(numbers)}
            figures = [compare.figure(name, cell) for cell in cells]
            rows.append(row | {"figures": figures, **_compared(compared.get(name))})
        tables.append({"slice": part, "n": results["arms"][arms[0]][part]["answer_length"]["n"], "rows": rows})
    return tables


def _compared(row: Mapping[str, str] | None) -> dict[str, str]:
    return {name: row[name] if row else "" for name in ("difference", "interval")}


def _reasons(results: Mapping[str, Any], arms: Sequence[str]) -> list[tuple[str, str]]:
    """(metric, reason) of what has no value for some arm, overall."""
    found = {
        (name, cell["reason"])
        for arm in arms
        for name, cell in results["arms"][arm]["all"].items()
        if cell["value"] is None
    }
    return sorted(found)


def _plots(
    results: Mapping[str, Any], predictions: Rows, curves: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, str]]:
    made = [
        ("Exact match by question type", plots.accuracy_by_type(results), "The tables below hold the same figures."),
        ("Loss by stage", plots.loss_curves(curves), "Lower is better; validation is the solid mark on a dashed line."),
        ("Length of the answers", plots.answer_lengths(predictions), "Means stand in the overall table."),
    ]
    return [{"title": title, "note": note, "src": _data_uri(png, "png")} for title, png, note in made if png]


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _cases(
    predictions: Rows, pair: tuple[str, str] | None, dataset: Dataset, split: str, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The cases to show, by category, and how many were left out for their pictures' size."""
    by_id = {sample.id: sample for sample in dataset.samples(split)}
    shown: dict[str, list[dict[str, Any]]] = {}
    spent = left_out = 0
    for title, rows in choose(predictions, pair, limit):
        picture = _picture(dataset, by_id[rows[0].id], rows)
        size = len(picture["src"]) if picture else 0
        if spent + size > _PICTURE_BYTES:
            left_out += 1
            continue
        spent += size
        answers = [{"arm": row.arm, "text": _clip(row.prediction), "right": is_right(row)} for row in rows]
        case: dict[str, Any] = {"id": rows[0].id, "type": f"{rows[0].question_type}, {rows[0].answer_type}"}
        case |= {"question": _clip(rows[0].question), "reference": _clip(rows[0].reference)}
        case |= {"answers": answers, "picture": picture}
        shown.setdefault(title, []).append(case)
    return [{"title": title, "cases": cases} for title, cases in shown.items()], left_out


def choose(predictions: Rows, pair: tuple[str, str] | None, limit: int) -> list[tuple[str, list[Prediction]]]:
    """Up to `limit` cases as (category, the rows of all arms), the categories in their order.

    The categories get equal shares; what one has too few for goes to the others, in order. Within one, cases go by
    sample id, which is a content hash: an arbitrary choice, and the same each time.
    """
    arms = list(predictions)
    old, new = pair or (arms[0], arms[0])
    titles = [title.format(old=old, new=new) for _, title in _PAIR_CATEGORIES] if pair else ["Wrong", "Right"]
    found: dict[str, list[list[Prediction]]] = {title: [] for title in titles}
    for rows in zip(*predictions.values(), strict=True):
        was, now = is_right(rows[arms.index(old)]), is_right(rows[arms.index(new)])
        number = {(False, True): 0, (True, False): 1, (False, False): 2, (True, True): 3}[was, now]
        found[titles[number if pair else number - 2]].append(list(rows))
    counts = dict.fromkeys(titles, 0)
    while sum(counts.values()) < limit:
        open_titles = [title for title in titles if counts[title] < len(found[title])]
        if not open_titles:
            break
        for title in open_titles[: limit - sum(counts.values())]:
            counts[title] += 1
    return [
        (title, rows)
        for title, cases in found.items()
        for rows in sorted(cases, key=lambda rows: rows[0].id)[: counts[title]]
    ]


def _clip(text: str) -> str:
    rest = len(text) - _LONGEST_TEXT
    return text if rest <= 0 else f"{text[:_LONGEST_TEXT]}… ({rest} more characters)"


def _picture(dataset: Dataset, sample: Sample, rows: Sequence[Prediction]) -> dict[str, Any] | None:
    """The first image as a JPEG thumbnail, with the boxes as rectangles in its pixels; None without an image."""
    if not sample.images:
        return None
    image = dataset.images(sample)[0]
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    drawn = [("reference", 0, rows[0].boxes)]
    drawn += [(row.arm, number, row.predicted_boxes) for number, row in enumerate(rows, 1)]
    boxes = [
        {"who": who, "style": min(number, 3), **_rectangle(box, *image.size)}
        for who, number, found in drawn
        for box in found[:_MOST_BOXES]
    ]
    names = list(dict.fromkeys(box["who"] for box in boxes))
    more = len(sample.images) - 1
    return {
        "src": _data_uri(stream.getvalue(), "jpeg"),
        "width": image.width,
        "height": image.height,
        "boxes": boxes,
        "legend": [(name, next(box["style"] for box in boxes if box["who"] == name)) for name in names],
        "more": f"first of {more + 1} images" if more else "",
    }


def _rectangle(box: XYXY, width: int, height: int) -> dict[str, float]:
    """A box in the thumbnail's pixels, cut at its edges; an inverted one is turned round so that it shows."""
    x1, x2 = sorted(min(1.0, max(0.0, x)) * width for x in box[::2])
    y1, y2 = sorted(min(1.0, max(0.0, y)) * height for y in box[1::2])
    return {"x": round(x1, 1), "y": round(y1, 1), "width": round(x2 - x1, 1), "height": round(y2 - y1, 1)}
