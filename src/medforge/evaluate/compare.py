"""Two arms side by side, with what chance alone could explain: Wilson's interval for a proportion, and a paired
bootstrap, clustered by image, for a difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medforge.evaluate.metrics import METRICS, OF_HEADS

COMPARED = ("exact_match", "closed_accuracy")
RESAMPLES = 2000
SEED = 0
MIN_N = 30  # below it nothing is called better or worse
MIN_CLUSTERS = 10  # a bootstrap over fewer images tells too little of how other images would do
_Z = 1.959963984540054  # the normal distribution's 97.5% point
_CHUNK = 100
_COUNTS = ("answer_length", "perplexity")
_SHORT = ("exact_match", "soft_match", "token_f1", "closed_accuracy", "unparsed_rate", "box_iou", "box_found")
_SUMMARY = (*_SHORT, "perplexity", "answer_length", "truncated_rate", *OF_HEADS)
_NAME = 2 + max(map(len, _SUMMARY))

Cell = dict[str, Any]


def wilson(value: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a proportion `value` of `n` > 0 trials, within 0–1 (Wilson 1927; Newcombe 1998,
    method 3). It takes the trials as independent: questions of one image are not quite so."""
    assert n > 0 and 0 <= value <= 1, (value, n)
    centre = value + _Z**2 / (2 * n)
    half = _Z * math.sqrt(value * (1 - value) / n + _Z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + _Z**2 / n), (centre + half) / (1 + _Z**2 / n)
    return (0.0 if value == 0 else max(0.0, low)), (1.0 if value == 1 else min(1.0, high))


def clusters(images: Sequence[Sequence[str]]) -> list[int]:
    """The cluster, 0 to the number less one, of each sample: samples that share an image, directly or through other
    samples, are in one."""
    parent: dict[str, str] = {}

    def root(image: str) -> str:
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for group in images:
        for image, following in itertools.pairwise(group):
            parent[root(image)] = root(following)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(group[0]), len(numbers)) for group in images]


def bootstrap(differences: Sequence[float], cluster: Sequence[int]) -> tuple[float, float] | None:
    """The 95% percentile interval of the mean of paired `differences`, from 2,000 seeded resamples of whole clusters
    (Field and Welsh 2007, the cluster bootstrap). None for fewer than two clusters."""
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(differences, dtype=np.float64))
    sizes = np.bincount(index).astype(np.float64)
    if len(sums) < 2:
        return None
    generator = np.random.default_rng(SEED)
    means = []
    for _ in range(0, RESAMPLES, _CHUNK):
        drawn = generator.integers(0, len(sums), (_CHUNK, len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def intervals(
    scored: Mapping[str, Mapping[str, Sequence[float | None]]],
    cluster: Sequence[int],
    parts: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The section `comparison` of results.json: how each pair of arms differs in exact_match and closed_accuracy.

    ``{"method": {…}, "pairs": [{"reference", "candidate", "slices": {slice: {metric: {"difference", "low", "high",
    "n", "clusters", "finding"}}}}]}``; `finding` is better, worse, or not-shown: the interval holds 0, n is below 30,
    or the images are fewer than 10. The candidate is the arm `tuned`, or the last where there is none, and every other
    arm a reference. Slices are not corrected for their number. `scored` has each row's values by arm and metric.
    """
    candidate = "tuned" if "tuned" in scored else list(scored)[-1]
    pairs = []
    for reference in scored:
        if reference == candidate:
            continue
        table: dict[str, dict[str, Cell]] = {}
        for part, where in parts.items():
            table[part] = {}
            for metric in COMPARED:
                old, new = scored[reference][metric], scored[candidate][metric]
                table[part][metric] = _difference(
                    [(cluster[i], old[i], new[i]) for i in where if old[i] is not None and new[i] is not None],
                    METRICS[metric].reason,
                )
        pairs.append({"reference": reference, "candidate": candidate, "slices": table})
    method = {"name": "paired bootstrap by image", "level": 0.95, "resamples": RESAMPLES, "seed": SEED}
    return {"method": {**method, "min_n": MIN_N, "min_clusters": MIN_CLUSTERS}, "pairs": pairs}


def _difference(rows: Sequence[tuple[int, Any, Any]], reason: str) -> Cell:
    if not rows:
        return {"difference": None, "low": None, "high": None, "n": 0, "clusters": 0, "reason": reason}
    cluster = [row[0] for row in rows]
    deltas = [new - old for _, old, new in rows]
    count = len(set(cluster))
    cell: Cell = {"difference": math.fsum(deltas) / len(deltas), "low": None, "high": None}
    cell |= {"n": len(rows), "clusters": count, "finding": "not-shown"}
    interval = bootstrap(deltas, cluster)
    if interval is None:
        return cell | {"reason": "all samples are of one image"}
    cell |= {"low": interval[0], "high": interval[1]}
    if len(rows) >= MIN_N and count >= MIN_CLUSTERS and not interval[0] <= 0 <= interval[1]:
        cell["finding"] = "better" if interval[0] > 0 else "worse"
    return cell


def pair_of(results: Mapping[str, Any], reference: str, candidate: str) -> dict[str, dict[str, Cell]]:
    """The slices of the pair's intervals; ValueError names the pairs that there are."""
    pairs = results["comparison"]["pairs"]
    for pair in pairs:
        if (pair["reference"], pair["candidate"]) == (reference, candidate):
            return dict(pair["slices"])
    known = ", ".join(f"{pair['candidate']} against {pair['reference']}" for pair in pairs) or "no pair"
    raise ValueError(f"{candidate!r} was not compared against {reference!r}; results.json has {known}")


def figure(metric: str, cell: Cell) -> str:
    """A value as text: 0.813, with Wilson's interval where the metric is a proportion; a dash for null."""
    if cell["value"] is None:
        return "–"
    if metric in _COUNTS:
        return f"{cell['value']:.2f}"
    text = f"{cell['value']:.3f}"
    if METRICS[metric].proportion:
        low, high = wilson(cell["value"], cell["n"])
        text += f" ({low:.3f}–{high:.3f})"
    return text


def signed(metric: str, old: Cell, new: Cell) -> str:
    """The difference of two cells with its sign; a dash where either is null."""
    if old["value"] is None or new["value"] is None:
        return "–"
    return f"{new['value'] - old['value']:+.{2 if metric in _COUNTS else 3}f}"


def judged(cell: Cell | None) -> str:
    """The bootstrap interval and its finding as text: ``+0.021 to +0.094, better``; "" where none was computed."""
    if cell is None or cell["low"] is None:
        return ""
    return f"{cell['low']:+.3f} to {cell['high']:+.3f}, {cell['finding'].replace('-', ' ')}"


def count(old: Cell, new: Cell) -> str:
    """n of both cells: one number, or two where they differ (a metric over parsed answers only)."""
    return str(old["n"]) if old["n"] == new["n"] else f"{old['n']} / {new['n']}"


def table(results: Mapping[str, Any], part: str, reference: str, candidate: str) -> list[dict[str, str]]:
    """The rows of one slice's table, as text: metric, better, n, reference, candidate, difference, interval."""
    old, new = results["arms"][reference][part], results["arms"][candidate][part]
    found = pair_of(results, reference, candidate)[part]
    return [
        {
            "metric": name,
            "better": METRICS[name].better,
            "n": count(old[name], new[name]),
            "reference": figure(name, old[name]),
            "candidate": figure(name, new[name]),
            "difference": signed(name, old[name], new[name]),
            "interval": judged(found.get(name)),
        }
        for name in METRICS
    ]


def comparison(results: Mapping[str, Any], reference: str = "base", candidate: str = "tuned") -> str:
    """comparison.md: the two arms overall, then exact_match, closed_accuracy and token_f1 by slice.

    ValueError when the pair was not compared.
    """
    pair_of(results, reference, candidate)
    data, samples = results["dataset"], results["samples"]
    lines = [
        f"# {_cell(candidate)} against {_cell(reference)}",
        "",
        f"{samples['n']} samples of {samples['images']} images, split `{data['split']}` of {_cell(data['source'])}, "
        f"data set `{data['digest'][:16]}`.",
        "",
        "Proportions stand with Wilson's 95% interval. The interval of a difference is a paired bootstrap's over whole "
        f"images ({RESAMPLES} resamples, seed {SEED}). A difference is called better or worse only where the interval "
        f"leaves out 0, n is at least {MIN_N} and the images at least {MIN_CLUSTERS}; slices are not corrected for "
        "their number. A dash is a metric that could not run.",
        "",
        "## Overall",
        "",
        *_markdown(
            ["metric", "n", reference, candidate, "difference", "95% interval"],
            [_overall(row) for row in table(results, "all", reference, candidate)],
        ),
    ]
    for metric in (*COMPARED, "token_f1"):
        rows = [
            [part, *_overall(row)[1:]]
            for part in results["arms"][reference]
            for row in table(results, part, reference, candidate)
            if row["metric"] == metric and row["n"] != "0"
        ]
        if rows:
            header = ["slice", "n", reference, candidate, "difference", "95% interval"]
            lines += ["", f"## {metric} by slice", "", *_markdown(header, rows)]
    nulls = _reasons(results, reference, candidate)
    return "\n".join([*lines, *(["", "## Not measured", "", *nulls] if nulls else [])]) + "\n"


def _overall(row: Mapping[str, str]) -> list[str]:
    return [row[name] for name in ("metric", "n", "reference", "candidate", "difference", "interval")]


def _reasons(results: Mapping[str, Any], *arms: str) -> list[str]:
    return [
        f"- {name} ({_cell(arm)}): {cell['reason']}"
        for arm in arms
        for name, cell in results["arms"][arm]["all"].items()
        if cell["value"] is None
    ]


def _cell(text: str) -> str:
    """Text of the data that must not break a Markdown table, nor be read as HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(map(_cell, row))} |" for row in [header, rule, *rows]]


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """A short table for the terminal: the metrics that ran, one column an arm, over all samples."""
    arms = results["arms"]
    lines = [f"{'':<{_NAME}}{'n':>7}" + "".join(f"{arm:>12}" for arm in arms)]
    for name in _SUMMARY:
        cells = [arm["all"][name] for arm in arms.values()]
        if all(cell["value"] is None for cell in cells):
            continue
        digits = 2 if name in _COUNTS else 3
        shown = "".join(f"{'–' if c['value'] is None else format(c['value'], f'.{digits}f'):>12}" for c in cells)
        lines.append(f"{name:<{_NAME}}{max(cell['n'] for cell in cells):>7}{shown}")
    for pair in results["comparison"]["pairs"]:
        for name, cell in pair["slices"]["all"].items():
            if text := judged(cell):
                lines.append(f"{pair['candidate']} against {pair['reference']}, {name}: {text}")
    return lines
