"""What is seen of a stage while it runs: a progress bar, progress.jsonl, TensorBoard with curves and answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medforge.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 256  # of a picture in TensorBoard, in pixels


class Board:
    """Writes to the folder `logs`; `memory()` tells the peak memory in bytes."""

    def __init__(self, logs: Path, name: str, steps: int, done: int, memory: Callable[[], int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        logs.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(logs), purge_step=done + 1 if done else None)
        self.stream = (logs / "progress.jsonl").open("a", encoding="utf-8")
        self.steps, self.done, self.memory = steps, done, memory
        self.started, self.first = time.monotonic(), done
        self.progress = Progress(f"training {name}", steps, "step")
        self.progress.advance(done)

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step: a line of progress.jsonl with memory and the seconds that are left, and curves."""
        for name, value in figures.items():
            if name != "step":
                kind, _, rest = name.partition("_")
                self.writer.add_scalar(f"eval/{rest}" if kind == "eval" else f"train/{name}", value, step)
        spent = time.monotonic() - self.started
        left = spent / max(1, step - self.first) * (self.steps - step)
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **figures, "step": step, "steps": self.steps}
        row |= {"seconds_left": round(left, 1), "peak_memory_bytes": self.memory()}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.stream.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self.stream.flush()
        self.writer.flush()
        if step > self.progress.done:
            self.progress.advance(step - self.progress.done)

    def answers(self, step: int, rows: Sequence[tuple[str, str, str, Sequence[Image]]]) -> None:
        """Sample answers of a validation, as (question, reference, answer, images), with their pictures."""
        import numpy as np

        lines = ["| question | reference | answer |", "|---|---|---|"]
        lines += [f"| {_cell(q)} | {_cell(reference)} | {_cell(answer)} |" for q, reference, answer, _ in rows]
        self.writer.add_text("answers", "\n".join(lines), step)
        for number, (_, _, _, images) in enumerate(rows):
            for image in images[:1]:
                small = image.copy()
                small.thumbnail((_SIDE, _SIDE))
                self.writer.add_image(f"answers/{number}", np.asarray(small), step, dataformats="HWC")

    def close(self) -> None:
        """End the bar and the files."""
        self.progress.close()
        self.writer.close()
        self.stream.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
