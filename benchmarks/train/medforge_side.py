"""MedForge's own run of the benchmark's work, started as a process of its own like the peers'.

python -m benchmarks.train.medforge_side RUN.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.train.work import Run, Work
from medforge.files import read_json, write_json

NAME = "medforge"
STAGE = "benchmark"


def command(run: Run) -> list[str]:
    """The command line of a run; writes the file that it names."""
    path = run.out / "settings.json"
    write_json(path, json.loads(json.dumps(asdict(run), default=str)))
    return [sys.executable, "-m", "benchmarks.train.medforge_side", str(path)]


def train(run: Run) -> None:
    """Train as `run` says, all that makes training fast as it comes out of the box."""
    from medforge.config import LoraConfig, ModelConfig, StageConfig
    from medforge.train.job import Inputs
    from medforge.train.stage import run as run_stage

    work = run.work
    stage = StageConfig(
        name=STAGE,
        tune=["language_attention", "language_mlp"],
        lora=LoraConfig(r=work.lora_r, alpha=work.lora_alpha, dropout=0.0),
        learning_rate=work.learning_rate,
        epochs=work.epochs,
        batch_size=work.optimizer_batch,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=work.max_grad_norm,
    )
    config = ModelConfig(
        base=str(run.model),
        dtype=run.dtype,
        min_pixels=work.min_pixels,
        max_pixels=work.max_pixels,
        max_length=work.max_length,
    )
    inputs = Inputs(run.model, run.data / "medforge", None)
    run_stage(inputs, run.out / "output", run.out / "work", run.out / "logs", stage, config, work.seed)


def adapter(run: Run) -> Path:
    """The folder of the adapter that the run wrote."""
    return run.out / "output" / f"01-{STAGE}"


def logged_loss(run: Run) -> float:
    """The last training loss in the run's own log."""
    curves = read_json(adapter(run) / "stage.json")["curves"]
    return float([row["loss"] for row in curves if "loss" in row][-1])


if __name__ == "__main__":
    values = read_json(Path(sys.argv[1]))
    paths = {name: Path(values[name]) for name in ("model", "data", "out")}
    train(Run(Work(**values["work"]), values["dtype"], **paths))
