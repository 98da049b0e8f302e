"""The work that every framework does: the same for all, so that nothing but speed differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Work:
    """One fine-tuning: LoRA on all linear layers of the language model, AdamW, a constant learning rate.

    It is run at two lengths, on `short` and on `long` samples, `epochs` times each. A step takes `optimizer_batch`
    samples. Images have `min_pixels` to `max_pixels`, and no sample reaches `max_length` tokens. The final loss is
    taken on the first `scored` samples. `threads` is what a process may use.
    """

    short: int = 32
    long: int = 128
    epochs: int = 3
    optimizer_batch: int = 32
    learning_rate: float = 1e-4
    lora_r: int = 8
    lora_alpha: int = 16
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    min_pixels: int = 56 * 56
    max_pixels: int = 448 * 448
    max_length: int = 1024
    scored: int = 64
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.short < self.long:
            raise ValueError(f"--samples {self.long}: more than {self.short} are needed, the length of the short run")

    @property
    def trained(self) -> int:
        """Samples that the long run trains on and the short one does not, counted once an epoch."""
        return (self.long - self.short) * self.epochs


QUICK = Work(short=8, long=16, epochs=1, optimizer_batch=8, scored=8)


@dataclass(frozen=True)
class Run:
    """One training run: where its inputs are, and the new folder that all its outputs go to."""

    work: Work
    dtype: Dtype
    model: Path
    data: Path
    out: Path
