"""What the terminal shows of a run, and what the log keeps."""

from __future__ import annotations

import io
from pathlib import Path

from pipelines.console import Console

PROGRESS = '    {"progress": "training", "done": 3, "total": 9, "unit": "step", "seconds": 5.2}\n'
NOISE = "    [KFP Executor 2026-11-21 03:50:08,640 INFO]: Looking for component\n" + "-" * 80 + '\n    "inputs": {\n'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(tmp_path: Path, text: str, terminal: io.StringIO) -> tuple[str, str]:
    console = Console(tmp_path / "log.txt", terminal)
    for start in range(0, len(text), 7):  # a pipe breaks lines anywhere
        console.write(text[start : start + 7])
    console.close()
    return terminal.getvalue(), (tmp_path / "log.txt").read_text()


def test_the_log_has_everything_the_terminal_what_is_ours(tmp_path: Path) -> None:
    text = "run small\n" + NOISE + "    train: running\n" + PROGRESS + "| a | b |\n"
    shown, log = show(tmp_path, text, io.StringIO())
    assert log == text
    assert shown == "run small\n    train: running\n    training: 3/9 step, 5 s\n| a | b |\n"


def test_progress_is_written_over_on_a_terminal(tmp_path: Path) -> None:
    shown, _ = show(tmp_path, PROGRESS + PROGRESS.replace("3", "6", 1) + "done\n", Terminal())
    assert shown == "\r\033[K    training: 3/9 step, 5 s\r\033[K    training: 6/9 step, 5 s\r\033[Kdone\n"


def test_a_broken_progress_line_is_shown_as_it_is(tmp_path: Path) -> None:
    shown, _ = show(tmp_path, '    {"progress": "tr\n', io.StringIO())
    assert shown == '    {"progress": "tr\n'
