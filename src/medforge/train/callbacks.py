"""What happens beside the training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from medforge.files import write_json
from medforge.progress import Progress

WHOLE = "whole.json"


class MarkWhole(TrainerCallback):
    """Marks a checkpoint when all of it is on the disk: one that a kill cut short has no mark, and is passed over.

    The mark names the files, so that a checkpoint whose deletion a kill cut short is passed over too.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = sorted(path.name for path in folder.iterdir() if path.name != WHOLE)
        write_json(folder / WHOLE, {"step": state.global_step, "files": files})


class ShowProgress(TrainerCallback):
    """Steps as a bar on a terminal, as JSON lines elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = Progress(self.what, state.max_steps, "step")
        self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.advance(state.global_step - self.progress.done)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.close()
