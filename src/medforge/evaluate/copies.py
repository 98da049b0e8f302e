"""Answers that outlive their pod: copies of a predictions file in the object store, made while it grows.

A copy is a checkpoint (medforge.checkpoints): sent in the background, whole or absent, checked against its manifest
when it is read. It belongs to one `identity`, the digest of all that decides the answers, and is not taken for another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medforge.checkpoints import Checkpoints
from medforge.files import write_atomic

SECONDS_BETWEEN = 60.0
_FINISHED_SECONDS = 60.0  # how long the last upload may hold up the end


class Copies:
    """The copies of the predictions file `out`, by way of the folder `work`."""

    def __init__(self, out: Path, work: Path, url: str, identity: str) -> None:
        """Nothing is read or written yet; `url` is ``s3://bucket/prefix``."""
        self._out, self._identity = out, identity
        self._kept = Checkpoints(work, keep=1, url=url)
        self._rows = 0  # in `out`, since the start of this process
        self._copied, self._last = 0, time.monotonic()

    def restore(self) -> None:
        """Put the newest copy at `out` where the file is not there. ValueError if the store cannot be asked."""
        if self._out.exists():
            return
        found = self._kept.latest(lambda state: bool(state.get("identity") == self._identity))
        if found:
            write_atomic(self._out, found.state["rows"])
            print(f"{self._out.name}: going on after {found.step} answers of an attempt before", flush=True)

    def note(self, rows: int) -> None:
        """`out` holds `rows` answers now: it is copied if the last copy is old."""
        self._rows = rows
        if time.monotonic() - self._last >= SECONDS_BETWEEN:
            self._copy()

    def close(self) -> None:
        """Copy what is not copied yet, and wait for the upload."""
        if self._rows > self._copied:
            self._copy()
        self._kept.close(_FINISHED_SECONDS)

    def _copy(self) -> None:
        self._kept.save(self._rows, {}, {"identity": self._identity, "rows": self._out.read_text(encoding="utf-8")})
        self._copied, self._last = self._rows, time.monotonic()


@contextmanager
def copies(out: Path, work: Path | None, url: str, identity: str) -> Iterator[Copies | None]:
    """The copies of `out` below `url`, restored and at the end closed; None without a url."""
    if not url or work is None:
        yield None
        return
    kept = Copies(out, work, url, identity)
    kept.restore()
    try:
        yield kept
    finally:
        kept.close()
