"""Progress of long loops: a bar on a terminal, one JSON line every few seconds elsewhere (logs, pods)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

LINE_SECONDS = 5.0


class Progress:
    """Counts `done` of `total` and shows it on stderr. Use as a context manager, or through `track`."""

    def __init__(self, what: str, total: int | None = None, unit: str = "it") -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._started = self._printed = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", leave=False)

    def advance(self, count: int = 1) -> None:
        """Count `count` more; the bar or the line follows."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = round(self._printed - self._started, 1)
        row = {"progress": self.what, "done": self.done, "total": self.total, "unit": self.unit, "seconds": seconds}
        print(json.dumps(row), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, or print the last line if one was printed before."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed != self._started:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """`items`, with progress shown while they are taken. `total` defaults to their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
