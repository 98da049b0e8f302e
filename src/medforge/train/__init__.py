"""Fine-tuning in stages: each adds one LoRA adapter to the stack."""

from medforge.train.stage import run

__all__ = ["run"]
