"""What was measured: a row for each framework, setting and precision, the ratio, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.train.medforge_side import NAME
from benchmarks.train.work import DTYPES, Work


@dataclass
class Result:
    """One framework at one setting. `seconds` and `peak_bytes` hold each repeat's figure, `short` and `long`.

    `loss` is the neutral judge's, `logged_loss` the last in the framework's own log. A row with an `error` has no
    throughput.
    """

    framework: str
    setting: str
    dtype: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"short": [], "long": []})
    peak_bytes: list[int] = field(default_factory=list)
    loss: float | None = None
    logged_loss: float | None = None
    error: str | None = None

    def throughput(self, work: Work) -> float | None:
        """Samples a second: those that only the long run trains on, by the time that it takes longer.

        None for a row with an error, or one whose longer run took no longer, which is noise and no speed.
        """
        if self.error or not all(self.seconds.values()):
            return None
        longer = median(self.seconds["long"]) - median(self.seconds["short"])
        return work.trained / longer if longer > 0 else None


def best_peer(results: Sequence[Result], work: Work, dtype: str) -> Result | None:
    """The fastest of the peers' rows at a precision; None when none of them has a throughput."""
    peers = [row for row in results if row.framework != NAME and row.dtype == dtype and row.throughput(work)]
    return max(peers, key=lambda row: row.throughput(work) or 0.0, default=None)


def ratio(row: Result, results: Sequence[Result], work: Work) -> float | None:
    """How many times as fast MedForge is as `row`, at the same precision; None when one of them has no throughput."""
    ours = [r.throughput(work) for r in results if r.framework == NAME and r.dtype == row.dtype]
    theirs = row.throughput(work)
    return ours[0] / theirs if ours and ours[0] and theirs else None


def headline(results: Sequence[Result], work: Work) -> str:
    """The last line: MedForge over the best setting of the best peer in fp32, or why there is no such ratio."""
    best = best_peer(results, work, DTYPES[0])
    if best is None:
        return "train: no ratio, as no peer was measured in float32"
    found = ratio(best, results, work)
    if found is None:
        return "train: no ratio, as medforge was not measured in float32"
    return f"train: ratio {found:.2f} over {best.framework}"


def table(results: Sequence[Result], work: Work) -> str:
    """The rows as text; the ratio is MedForge's throughput over the row's."""
    head = ("framework", "setting", "precision", "samples/s", "peak GiB", "loss", "own loss", "ratio")
    rows = [head]
    for row in results:
        speed, times = row.throughput(work), ratio(row, results, work)
        rows.append(
            (
                *(row.framework, row.setting, row.dtype),
                _number(speed, 2),
                _number(max(row.peak_bytes) / 2**30 if row.peak_bytes else None, 2),
                _number(row.loss, 4),
                _number(row.logged_loss, 4),
                _number(times, 2),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(f"{cell:{'<' if column < 3 else '>'}{widths[column]}}" for column, cell in enumerate(row))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"error: {row.framework} {row.setting} {row.dtype}: {row.error}" for row in results if row.error]
    noisy = [row for row in results if not row.error and row.throughput(work) is None]
    lines += [f"{row.framework} {row.setting} {row.dtype}: the long run took no longer than the short" for row in noisy]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def document(results: Sequence[Result], work: Work, about: dict[str, Any]) -> dict[str, Any]:
    """All of it for a JSON file: `about` (command, machine, versions, …), the work, the rows and the headline."""
    rows = [
        asdict(row) | {"samples_per_second": row.throughput(work), "ratio": ratio(row, results, work)}
        for row in results
    ]
    return {**about, "work": asdict(work), "results": rows, "headline": headline(results, work)}
