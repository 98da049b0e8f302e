"""The report's plots as PNG bytes. The same figures give the same bytes: no date, no software's name, a fixed font."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medforge.evaluate.compare import wilson
from medforge.evaluate.metrics import METRICS, THRESHOLD, match_scores
from medforge.evaluate.predictions import Prediction
from medforge.metrics.ranking import auroc, roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; hatches and dashes repeat the difference.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_HATCHES = ("", "//", "..", "xx")
_DASHES = ("-", "--", "-.", ":")
_WIDTH, _DPI = 7.0, 110
_MOST_BARS = 14
_MOST_BINS = 32


def _figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _plain(text: str) -> str:
    """Data is no mathematics: a dollar sign would start matplotlib's formula reader."""
    return text.replace("$", r"\$")


def accuracy_by_type(results: Mapping[str, Any], metric: str = "exact_match") -> bytes | None:
    """Bars of a proportion by question type with Wilson intervals, one an arm; the 14 largest types at most.

    None when no question type has the metric.
    """
    arms = results["arms"]
    first = next(iter(arms.values()))
    parts = [p for p in first if p.startswith("question_type=") and first[p][metric]["value"] is not None]
    parts = sorted(parts, key=lambda part: (-first[part][metric]["n"], part))[:_MOST_BARS]
    if not parts:
        return None
    assert METRICS[metric].proportion, metric
    figure, (axes,) = _figure(1.2 + 0.22 * (len(arms) + 0.6) * len(parts))
    height = 0.8 / len(arms)
    for number, (arm, table) in enumerate(arms.items()):
        cells = [table[part][metric] for part in parts]
        shown = [(i, cell) for i, cell in enumerate(cells) if cell["value"] is not None]
        places = [i + number * height for i, _ in shown]
        heights = [cell["value"] for _, cell in shown]
        bounds = [wilson(cell["value"], cell["n"]) for _, cell in shown]
        spread = [[v - low for v, (low, _) in zip(heights, bounds, strict=True)]]
        spread.append([high - v for v, (_, high) in zip(heights, bounds, strict=True)])
        axes.barh(
            places,
            heights,
            height,
            label=_plain(arm),
            xerr=spread,
            color=_COLOURS[number % 4],
            hatch=_HATCHES[number % 4],
            edgecolor="white",
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        )
    labels = [f"{part.partition('=')[2]} (n={first[part][metric]['n']})" for part in parts]
    axes.set_yticks([i + height * (len(arms) - 1) / 2 for i in range(len(parts))], [_plain(text) for text in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(metric.replace("_", " "))
    figure.legend(loc="outside upper right", ncols=len(arms), fontsize="small")
    return _png(figure)


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """Training and validation loss over steps, one panel a stage. None when there is no point to draw."""
    drawn = {
        stage: [(label, [(row["step"], row[key]) for row in rows if key in row]) for key, label in _LOSSES]
        for stage, rows in curves.items()
    }
    drawn = {stage: lines for stage, lines in drawn.items() if any(points for _, points in lines)}
    if not drawn:
        return None
    figure, panels = _figure(2.8, len(drawn))
    for axes, (stage, lines) in zip(panels, drawn.items(), strict=True):
        for number, (label, points) in enumerate(lines):
            if points:
                marker = "o" if number or len(points) == 1 else ""
                x, y = zip(*points, strict=True)
                axes.plot(x, y, _DASHES[number], marker=marker, ms=4, color=_COLOURS[number], label=label)
        axes.set_title(_plain(stage), fontsize="medium")
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("loss (nats a token)")
    return _png(figure)


_LOSSES = (("loss", "training"), ("eval_loss", "validation"))


def answer_lengths(predictions: Mapping[str, Sequence[Prediction]]) -> bytes:
    """How many generated tokens the answers have, one step line an arm."""
    longest = max(row.generated_tokens for rows in predictions.values() for row in rows)
    width = longest // _MOST_BINS + 1  # whole tokens: other widths would hold unlike numbers of lengths
    edges = [start - 0.5 for start in range(0, longest + width + 1, width)]
    figure, (axes,) = _figure(2.4)
    for number, (arm, rows) in enumerate(predictions.items()):
        lengths = [row.generated_tokens for row in rows]
        colour, dash = _COLOURS[number % 4], _DASHES[number % 4]
        axes.hist(lengths, edges, histtype="step", label=_plain(arm), color=colour, linestyle=dash, linewidth=1.6)
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("answers")
    axes.legend(fontsize="small")
    return _png(figure)


def match_histograms(predictions: Mapping[str, Sequence[Prediction]]) -> bytes | None:
    """How the match head scores reference answers and certainly wrong ones, one panel an arm. None without scores."""
    judged = {arm: match_scores(rows) for arm, rows in predictions.items()}
    judged = {arm: scores for arm, scores in judged.items() if any(scores)}
    if not judged:
        return None
    figure, panels = _figure(2.8, len(judged))
    edges = [step / 20 for step in range(21)]
    for axes, (arm, scores) in zip(panels, judged.items(), strict=True):
        for number, (label, values) in enumerate(zip(("reference answer", "wrong answer"), scores, strict=True)):
            axes.hist(values, edges, histtype="step", label=label, color=_COLOURS[number], linestyle=_DASHES[number])
        axes.axvline(THRESHOLD, color="#777777", linewidth=0.8)
        axes.set_title(_plain(arm), fontsize="medium")
        axes.set_xlabel("probability that the claim fits")
    panels[0].set_ylabel("claims")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize="small")
    return _png(figure)


def roc_curves(predictions: Mapping[str, Sequence[Prediction]]) -> bytes | None:
    """The match head's ROC curve, one an arm, a mark at the threshold. None where no arm has both kinds of claim."""
    judged = {arm: match_scores(rows) for arm, rows in predictions.items()}
    judged = {arm: scores for arm, scores in judged.items() if all(scores)}
    if not judged:
        return None
    figure, (axes,) = _figure(3.6)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for number, (arm, (right, wrong)) in enumerate(judged.items()):
        colour, dash = _COLOURS[number % 4], _DASHES[number % 4]
        x, y = zip(*roc(right, wrong), strict=True)
        axes.plot(x, y, dash, color=colour, label=f"{_plain(arm)} (area {auroc(right, wrong):.3f})")
        alarms, recall = (sum(score >= THRESHOLD for score in scores) / len(scores) for scores in (wrong, right))
        axes.plot([alarms], [recall], "o", color=colour, ms=5)
    axes.set_aspect("equal")
    axes.set_xlabel("false alarms: wrong answers that pass")
    axes.set_ylabel("recall: reference answers that pass")
    axes.legend(fontsize="small", loc="lower right")
    return _png(figure)
