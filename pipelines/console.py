"""What a run prints: the steps' own lines on the terminal, everything in the run's log."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# kfp indents what a step prints, and prints much of its own; these lines are the step's. Steps that run side by side
# make kfp indent by any number of spaces (each puts its own `print` over the other's)
_OF_A_STEP = re.compile(r" *(\{\"progress\"|[a-z0-9-]+: (running|reused)|\| )")


class Console(io.TextIOBase):
    """A stand-in for stdout: each line goes to the log, lines of the steps to the terminal as well.

    The steps run in processes of their own whose output arrives here through a pipe, so their progress comes as JSON
    lines; a terminal sees it as one line that is written over.
    """

    def __init__(self, log: Path, terminal: TextIO) -> None:
        self._log = log.open("a", encoding="utf-8")
        self._terminal = terminal
        self._line = ""
        self._open = False  # a progress line stands on the terminal, without its end
        self._only_steps = False

    @contextmanager
    def only_steps(self) -> Iterator[None]:
        """While the block runs, the terminal sees the steps' own lines only; the log has everything."""
        self._only_steps = True
        try:
            yield
        finally:
            self._only_steps = False

    def writable(self) -> bool:
        """It is written to."""
        return True

    def write(self, text: str) -> int:
        """Take text; whole lines are shown."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.write(line + "\n")
            self._show(line)
        self._log.flush()
        return len(text)

    def _show(self, line: str) -> None:
        if not line.strip():
            return
        if self._only_steps:
            if not _OF_A_STEP.match(line):
                return
            line = f"    {line.lstrip()}"
        progress = _progress(line.strip())
        if progress and self._terminal.isatty():
            self._terminal.write(f"\r\033[K    {progress}")
            self._open = True
        else:
            self._terminal.write(("\r\033[K" if self._open else "") + (f"    {progress}" if progress else line) + "\n")
            self._open = False
        self._terminal.flush()

    def close(self) -> None:
        """Write out what is left and close the log."""
        if not self._log.closed:
            if self._line:
                self.write("\n")
            self._log.close()
        super().close()


def _progress(line: str) -> str | None:
    """A progress line of a step in words, or None if it is none."""
    if not line.startswith('{"progress"'):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    total = f"/{row['total']}" if row["total"] else ""
    return f"{row['progress']}: {row['done']}{total} {row['unit']}, {row['seconds']:.0f} s"
