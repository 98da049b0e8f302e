"""The peers: where they come from, and the benchmark's work in their own settings.

Each runs as it comes out of the box (`DEFAULT` leaves every setting alone that does not define the work), and without
activation checkpointing in batches of 1 and of 4. Which of these is a peer's best is left to the measurement: the
report takes the fastest row. Tried once each on a busy machine (processor seconds for 32 samples in fp32 on one
thread; a repeat differed by 6 %), batches of 1 and 4 lay within that noise and larger ones were no better:

| | default | 1 | 4 | 8 | 32 |
|---|---|---|---|---|---|
| LLaMA-Factory | 96 | 47 | 50 | 54 | 69 |
| ms-swift | 55 | 46 | 46 | 49 | 66 |

LLaMA-Factory's neat_packing took 57, a data loader's worker 44 as without it. ms-swift refuses packing and
padding-free batches without FlashAttention, which has no CPU version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import Environment
from benchmarks.train.work import LANGUAGE_LAYERS, Run
from medforge.files import read_json, write_json

DEFAULT = "default"
LAUNCH = Path(__file__).with_name("launch.py")
# the same torch for all; the peers alone would pull another one in
TORCH = ("torch==2.13.0",)


@dataclass(frozen=True)
class Peer:
    """A framework from PyPI. `settings` are by name what a setting changes or adds to `options`, its work."""

    name: str
    environment: Environment
    packages: tuple[str, ...]
    options: Callable[[Run], dict[str, Any]]
    settings: dict[str, dict[str, Any]]

    def command(self, python: Path, run: Run, setting: str) -> list[str]:
        """The command line of a run; writes the settings that it names."""
        path = run.out / "settings.json"
        write_json(path, self.options(run) | self.accumulation(run, setting))
        return [str(python), str(LAUNCH), self.name, str(path)]

    def accumulation(self, run: Run, setting: str) -> dict[str, Any]:
        """The setting, with as many batches to an optimizer step as the work asks for."""
        chosen = self.settings[setting]
        batch = min(chosen["per_device_train_batch_size"], run.work.optimizer_batch)
        steps = run.work.optimizer_batch // batch
        return chosen | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}


def _llamafactory(run: Run) -> dict[str, Any]:
    work = run.work
    return {
        "model_name_or_path": str(run.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": ",".join(LANGUAGE_LAYERS),
        "lora_rank": work.lora_r,
        "lora_alpha": work.lora_alpha,
        "lora_dropout": 0.0,
        "dataset": "benchmark",
        "dataset_dir": str(run.data),
        "media_dir": str(run.data),
        "overwrite_cache": True,
        "template": "qwen2_vl",
        "default_system": "",  # the others send no system prompt either
        "cutoff_len": work.max_length,
        "image_min_pixels": work.min_pixels,
        "image_max_pixels": work.max_pixels,
        "output_dir": str(run.out / "output"),
        "num_train_epochs": work.epochs,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": work.adam_beta2,
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "use_cpu": True,
        "bf16": run.dtype == "bfloat16",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def _ms_swift(run: Run) -> dict[str, Any]:
    work = run.work
    return {
        "model": str(run.model),
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "system": "",
        "check_model": False,  # asks the hub
        "tuner_type": "lora",
        "target_modules": list(LANGUAGE_LAYERS),
        "lora_rank": work.lora_r,
        "lora_alpha": work.lora_alpha,
        "lora_dropout": 0.0,
        "torch_dtype": run.dtype,
        "dataset": [str(run.data / "ms-swift.jsonl")],
        "max_length": work.max_length,
        "max_pixels": work.max_pixels,
        "output_dir": str(run.out / "output"),
        "add_version": False,
        "num_train_epochs": work.epochs,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "adam_beta2": work.adam_beta2,
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "data_seed": work.seed,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_only_model": True,
        "save_total_limit": 1,
        "report_to": "none",
    }


_NO_CHECKPOINTING = {"gradient_checkpointing": False, "vit_gradient_checkpointing": False}

PEERS = (
    Peer(
        "llamafactory",
        Environment("llamafactory", ("llamafactory==0.9.5",), TORCH),
        ("llamafactory", "torch", "transformers", "peft", "accelerate"),
        _llamafactory,
        {
            DEFAULT: {"per_device_train_batch_size": 8},
            "batch-1": {"per_device_train_batch_size": 1, "disable_gradient_checkpointing": True},
            "batch-4": {"per_device_train_batch_size": 4, "disable_gradient_checkpointing": True},
        },
    ),
    Peer(
        "ms-swift",
        Environment("ms-swift", ("ms-swift==4.6.0", "qwen-vl-utils==0.0.14", "torchvision==0.28.0"), TORCH),
        ("ms_swift", "torch", "transformers", "peft", "accelerate"),
        _ms_swift,
        {
            DEFAULT: {"per_device_train_batch_size": 1},
            "batch-1": {"per_device_train_batch_size": 1} | _NO_CHECKPOINTING,
            "batch-4": {"per_device_train_batch_size": 4} | _NO_CHECKPOINTING,
        },
    ),
)


def adapter(run: Run) -> Path:
    """The folder of the adapter that a peer wrote last. ValueError when it wrote none."""
    found = sorted((run.out / "output").rglob("adapter_config.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise ValueError(f"{run.out}: the run ended without an adapter")
    return found[-1].parent


def logged_loss(run: Run) -> float:
    """The last training loss in a peer's own log. ValueError when there is none."""
    history = read_json(adapter(run) / "trainer_state.json")["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    if not losses:
        raise ValueError(f"{run.out}: the run logged no loss")
    return float(losses[-1])
