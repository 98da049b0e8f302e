"""Tiny models of all families with heads, ready to generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medforge.models.encode import Encoder
from medforge.models.load import load_model
from serving.predictor.generation import Generation

PIXELS = (56 * 56, 112 * 112)


def load_tiny(folder: Path) -> Generation:
    """The model of a folder with random heads, and its encoder."""
    import torch

    from medforge.models.heads import TaskHeads

    torch.manual_seed(1)
    model = load_model(folder, "float32", device="cpu").eval()
    heads = TaskHeads(model.config.get_text_config().hidden_size, region=True, match=True).eval()
    for parameter in heads.parameters():
        if parameter.ndim > 1:  # else all boxes and scores are nearly the same
            torch.nn.init.normal_(parameter, std=0.3)
    return Generation(model, Encoder(folder, *PIXELS), heads)


@pytest.fixture(scope="package")
def generations(tiny_models: dict[str, Path]) -> dict[str, Generation]:
    """One for each family, by its name. Not to be changed."""
    return {family: load_tiny(folder) for family, folder in tiny_models.items()}


@pytest.fixture
def generation(base: Path) -> Generation:
    """A Qwen3-VL of the test's own."""
    return load_tiny(base)


@pytest.fixture
def passes(generation: Generation) -> Callable[[], int]:
    """Counts the forward passes of `generation`."""
    count: list[None] = []

    def note(*_: Any) -> None:
        count.append(None)

    generation.model.register_forward_hook(note)
    return lambda: len(count)
