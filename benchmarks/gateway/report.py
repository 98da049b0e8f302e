"""What was measured: a row for each contender, what it adds to the upstream's own time, the table and the last line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.gateway.servers import DIRECT, NAME, PLAIN


@dataclass
class Row:
    """One contender; each list holds a figure for each repeat. A row with an `error` has no figures.

    `reads`: the upstream parses the request and decodes the image, as every model's server does before its model.
    `p50_ms`, `p99_ms`: latency over one connection. `per_second`, `crowd_p99_ms`, `cpu_ms` (processor time of the
    server for a request): over all connections. `memory_bytes`: resident after that. `levels`: the same throughput
    over other numbers of connections.
    """

    contender: str
    reads: bool = False
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    per_second: list[float] = field(default_factory=list)
    crowd_p99_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    levels: dict[int, list[float]] = field(default_factory=dict)
    error: str | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        return f"{self.contender}, reading" if self.reads else self.contender

    def middle(self, name: str) -> float | None:
        """The median of a list of figures; None where there is an error or none."""
        figures: list[float] = getattr(self, name)
        return median(figures) if figures and not self.error else None


def find(rows: Sequence[Row], contender: str, reads: bool = False) -> Row | None:
    """The row of a contender before the upstream that answers at once, or before the one that reads."""
    return next((row for row in rows if (row.contender, row.reads) == (contender, reads)), None)


def added(row: Row, rows: Sequence[Row], name: str) -> float | None:
    """How much more a row's latency is than the upstream's own, in milliseconds.

    The percentiles of both are taken apart: the difference of two 99th percentiles, not the 99th of differences.
    """
    direct = find(rows, DIRECT, row.reads)
    ours, theirs = row.middle(name), direct.middle(name) if direct else None
    return None if ours is None or theirs is None or row is direct else ours - theirs


def share(row: Row, rows: Sequence[Row]) -> float | None:
    """A row's throughput as a share of the upstream's own."""
    direct = find(rows, DIRECT, row.reads)
    ours, theirs = row.middle("per_second"), direct.middle("per_second") if direct else None
    return None if ours is None or theirs is None else ours / theirs


def ratio(rows: Sequence[Row], peer: str) -> float | None:
    """How many times a peer's throughput MedForge's gateway has; None where one of them was not measured."""
    ours, theirs = find(rows, NAME), find(rows, peer)
    first, second = ours.middle("per_second") if ours else None, theirs.middle("per_second") if theirs else None
    return first / second if first and second else None


def headline(rows: Sequence[Row]) -> str:
    """The last line: MedForge's throughput over the plain proxy's, or why there is no such ratio."""
    found = ratio(rows, PLAIN)
    if found is not None:
        return f"gateway: ratio {found:.2f} over {PLAIN}"
    missing = [name for name in (NAME, PLAIN) if (row := find(rows, name)) is None or row.middle("per_second") is None]
    return f"gateway: no ratio, as {' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured"


def table(rows: Sequence[Row], connections: int) -> str:
    """The rows as text: latencies over one connection, the rest over `connections`; then throughput by connections."""
    head = (
        "contender", "p50 ms", "p99 ms", "added p50", "added p99", f"requests/s ({connections})", "of direct",
        f"p99 ms ({connections})", "CPU ms", "MiB",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        memory = row.middle("memory_bytes")
        figures: tuple[tuple[float | None, int], ...] = (
            (row.middle("p50_ms"), 2),
            (row.middle("p99_ms"), 2),
            (added(row, rows, "p50_ms"), 2),
            (added(row, rows, "p99_ms"), 2),
            (row.middle("per_second"), 0),
            (share(row, rows), 2),
            (row.middle("crowd_p99_ms"), 1),
            (row.middle("cpu_ms"), 2),
            (memory and memory / 2**20, 0),
        )
        lines.append((row.label, *(_number(value, digits) for value, digits in figures)))
    text = _aligned(lines)
    if found := by_connections(rows, connections):
        counts = sorted({count for figures in found.values() for count in figures})
        text += ["", *_aligned([
            ("requests/s by connections", *map(str, counts)),
            *((label, *(_number(figures.get(count), 0) for count in counts)) for label, figures in found.items()),
        ])]  # fmt: skip
    return "\n".join(text + [f"error: {row.label}: {row.error}" for row in rows if row.error])


def by_connections(rows: Sequence[Row], connections: int) -> dict[str, dict[int, float]]:
    """The median throughput of each contender that was measured over several numbers of connections."""
    found = {}
    for row in rows:
        middle = row.middle("per_second")
        if row.levels and middle is not None:
            found[row.label] = {connections: middle} | {count: median(each) for count, each in row.levels.items()}
    return found


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(line))
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return text


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def document(rows: Sequence[Row], about: dict[str, Any], connections: int) -> dict[str, Any]:
    """All of it for a JSON file: `about` (command, machine, versions, work), the rows with medians, the last line."""
    made = [
        asdict(row)
        | {
            "medians": {name: row.middle(name) for name in _FIGURES},
            "added_p50_ms": added(row, rows, "p50_ms"),
            "added_p99_ms": added(row, rows, "p99_ms"),
            "share_of_direct": share(row, rows),
            "ratio": None if row.reads else ratio(rows, row.contender),
        }
        for row in rows
    ]
    levels = by_connections(rows, connections)
    return {**about, "results": made, "by_connections": levels, "headline": headline(rows)}


_FIGURES = ("p50_ms", "p99_ms", "per_second", "crowd_p99_ms", "cpu_ms", "memory_bytes")
