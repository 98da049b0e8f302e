"""What the terminal shows of a run, and what the log keeps."""

from __future__ import annotations

import io
from pathlib import Path

from pipelines.console import Console

PROGRESS = '    {"progress": "training", "done": 3, "total": 9, "unit": "step", "seconds": 5.2}\n'
RUN = "  a line of the run\n"
NOISE = "    [KFP Executor 2026-11-21 03:50:08,640 INFO]: Looking for component\n" + "-" * 80 + '\n    "inputs": {\n'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(tmp_path: Path, text: str, terminal: io.StringIO) -> tuple[str, str]:
    console = Console(tmp_path / "log.txt", terminal)
    with console.only_steps():
        for start in range(0, len(text), 7):  # a pipe breaks lines anywhere
            console.write(text[start : start + 7])
    console.write(RUN)
    console.close()
    return terminal.getvalue(), (tmp_path / "log.txt").read_text()


def test_the_log_has_everything_the_terminal_what_is_ours(tmp_path: Path) -> None:
    text = NOISE + "    train: running\n" + PROGRESS + "    | a | b |\n"
    shown, log = show(tmp_path, text, io.StringIO())
    assert log == text + RUN
    assert shown == "    train: running\n    training: 3/9 step, 5 s\n    | a | b |\n" + RUN


def test_progress_is_written_over_on_a_terminal(tmp_path: Path) -> None:
    shown, _ = show(tmp_path, PROGRESS + PROGRESS.replace("3", "6", 1), Terminal())
    assert shown == "\r\033[K    training: 3/9 step, 5 s\r\033[K    training: 6/9 step, 5 s\r\033[K" + RUN


def test_a_broken_progress_line_is_shown_as_it_is(tmp_path: Path) -> None:
    shown, _ = show(tmp_path, '    {"progress": "tr\n', io.StringIO())
    assert shown == '    {"progress": "tr\n' + RUN


def test_steps_side_by_side_are_shown_whatever_their_indentation(tmp_path: Path) -> None:
    shown, _ = show(
        tmp_path, "train-0: running\n            train-1: running\n        [KFP Executor] x\n", io.StringIO()
    )
    assert shown == "    train-0: running\n    train-1: running\n" + RUN
