"""What the tests keep as checkpoints, and how they look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge.checkpoints import Checkpoint, Checkpoints  # noqa: E402

FILES = ["exp_avg.safetensors", "manifest.json", "state.json", "weights.safetensors"]


def tensors(step: int, size: int = 40) -> dict[str, dict[str, Any]]:
    """Groups whose values tell the step, so that a mixture of two checkpoints is seen."""
    return {
        "weights": {"a": torch.full((size,), float(step)), "b": torch.full((2, 3), step, dtype=torch.bfloat16)},
        "exp_avg": {"a": torch.arange(size) + step, "step": torch.tensor(float(step))},
    }


def save(kept: Checkpoints, step: int, best: bool = False) -> bool:
    return kept.save(step, tensors(step), {"step": step, "loss": 1 / (1 + step), "order": [3, 1, 2]}, best=best)


def check(found: Checkpoint | None, step: int) -> None:
    """`found` is the checkpoint of `step`, each value as `save` was given it."""
    assert found is not None
    assert found.step == step
    assert found.state == {"step": step, "loss": 1 / (1 + step), "order": [3, 1, 2]}
    for group, expected in tensors(step).items():
        read = found.tensors(group)
        assert set(read) == set(expected)
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    """The steps on the disk; fails if there is anything else."""
    return [int(name.removeprefix("step-")) for name in names(folder)]
