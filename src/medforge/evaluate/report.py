"""report.html: one file that a reviewer reads before signing. No script, no outside asset, nothing to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medforge.dataset import Dataset
from medforge.evaluate import compare, plots
from medforge.evaluate.metrics import METRICS, OF_HEADS, is_right, region_iou
from medforge.evaluate.pictures import data_uri, picture
from medforge.evaluate.predictions import Prediction
from medforge.files import write_atomic
from medforge.models.generate import boxed_image
from medforge.records import Sample

_PICTURE_BYTES = 1_300_000  # of base64 over all pictures: the file stays below 2 MB
_LONGEST_TEXT = 1200
_LOCATED = 8  # samples shown with the region head's box
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
    by_id = {sample.id: sample for sample in dataset.samples(str(results["dataset"]["split"]))}
    heads = _heads(results, predictions, pair, dataset, by_id)
    spent = sum(len(case["picture"]["src"]) for case in heads["cases"]) if heads else 0
    cases, left_out = _cases(predictions, pair, dataset, by_id, samples, spent)
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
        heads=heads,
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
    """(metric, reason) of what has no value, overall; with the arms' names where it is not so for all of them."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        for name, cell in results["arms"][arm]["all"].items():
            if cell["value"] is None:
                lacking.setdefault((name, cell["reason"]), []).append(arm)
    return sorted(
        (name if len(which) == len(arms) else f"{name} ({', '.join(which)})", reason)
        for (name, reason), which in lacking.items()
    )


def _plots(
    results: Mapping[str, Any], predictions: Rows, curves: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, str]]:
    made = [
        ("Exact match by question type", plots.accuracy_by_type(results), "The tables below hold the same figures."),
        ("Loss by stage", plots.loss_curves(curves), "Lower is better; validation is the solid mark on a dashed line."),
        ("Length of the answers", plots.answer_lengths(predictions), "Means stand in the overall table."),
    ]
    return _figures(made)


def _figures(made: Sequence[tuple[str, bytes | None, str]]) -> list[dict[str, str]]:
    """Those plots that could be drawn, as the template takes them."""
    return [{"title": title, "note": note, "src": data_uri(png, "png")} for title, png, note in made if png]


def _heads(
    results: Mapping[str, Any],
    predictions: Rows,
    pair: tuple[str, str] | None,
    dataset: Dataset,
    by_id: Mapping[str, Sample],
) -> dict[str, Any] | None:
    """The section on region and match heads: the arms that have any, table, plots and samples; None without heads."""
    headed = {arm: rows for arm, rows in predictions.items() if rows[0].heads}
    if not headed:
        return None
    table = []
    for name in OF_HEADS:
        cells = [results["arms"][arm]["all"][name] for arm in headed]
        figures = [compare.figure(name, cell) for cell in cells]
        numbers = list(dict.fromkeys(str(cell["n"]) for cell in cells))
        table.append({"metric": name, "better": METRICS[name].better, "n": " / ".join(numbers), "figures": figures})
    shown = pair[1] if pair is not None and pair[1] in headed else list(headed)[-1]
    plotted = [
        ("Match scores", plots.match_histograms(headed), "The line is the threshold of recall and false alarms."),
        ("ROC curve of the match head", plots.roc_curves(headed), "The mark is the threshold of 0.5."),
    ]
    cases = _located(predictions, shown, dataset, by_id)
    return {"arms": list(headed), "rows": table, "plots": _figures(plotted), "shown": shown, "cases": cases}


def _located(predictions: Rows, arm: str, dataset: Dataset, by_id: Mapping[str, Sample]) -> list[dict[str, Any]]:
    """Samples whose one box the arm's region head looked for, evenly spaced from the worst IoU to the best."""
    number = list(predictions).index(arm)
    found = [
        (region_iou(rows[number]), rows[number].id, rows)
        for rows in zip(*predictions.values(), strict=True)
        if rows[number].region is not None and rows[number].region_target is not None
    ]
    found.sort(key=lambda case: case[:2])
    if len(found) > _LOCATED:
        found = [found[place * (len(found) - 1) // (_LOCATED - 1)] for place in range(_LOCATED)]
    return [
        {
            "id": name,
            "picture": picture(dataset, by_id[name], rows, 0),
            "iou": f"{overlap:.2f}",
            "question": _clip(rows[number].question),
            "claims": [
                {"name": who, "text": _clip(text), "score": f"{score:.3f}"}
                for who, text, score in (
                    ("Reference", rows[number].reference, rows[number].match_reference),
                    (arm, rows[number].prediction, rows[number].match),
                )
                if score is not None
            ],
        }
        for overlap, name, rows in found
    ]


def _cases(
    predictions: Rows,
    pair: tuple[str, str] | None,
    dataset: Dataset,
    by_id: Mapping[str, Sample],
    limit: int,
    spent: int,
) -> tuple[list[dict[str, Any]], int]:
    """The cases to show, by category, and how many were left out for their pictures' size; `spent` is of others."""
    shown: dict[str, list[dict[str, Any]]] = {}
    left_out = 0
    for title, rows in choose(predictions, pair, limit):
        sample = by_id[rows[0].id]
        drawn = picture(dataset, sample, rows, boxed_image(sample))
        size = len(drawn["src"]) if drawn else 0
        if spent + size > _PICTURE_BYTES:
            left_out += 1
            continue
        spent += size
        answers = [{"arm": row.arm, "text": _clip(row.prediction), "right": is_right(row)} for row in rows]
        case: dict[str, Any] = {"id": rows[0].id, "type": f"{rows[0].question_type}, {rows[0].answer_type}"}
        case |= {"question": _clip(rows[0].question), "reference": _clip(rows[0].reference)}
        case |= {"answers": answers, "picture": drawn}
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
