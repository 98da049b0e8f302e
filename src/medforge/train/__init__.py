"""Fine-tuning in stages: each adds one adapter to the stack."""

from medforge.train.job import Inputs
from medforge.train.stage import run

__all__ = ["Inputs", "run"]
