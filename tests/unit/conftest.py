"""Small models and data sets, built once a session. Tests copy what they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from medforge.config import DataConfig, ModelConfig, PhantomConfig, StageConfig, TinyConfig
from medforge.convert import run as convert
from medforge.models.families import FAMILIES
from tests.unit.models.examples import SIZE


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained tiny model of each family, by the family's name."""
    from medforge.models.tiny import build

    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        build(folder / family, family, TinyConfig(steps=0))
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def base(tiny_models: dict[str, Path]) -> Path:
    """The untrained tiny Qwen3-VL."""
    return tiny_models["qwen3-vl"]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 phantoms."""
    folder = tmp_path_factory.mktemp("phantoms") / "dataset"
    convert("phantom", folder, DataConfig(source="phantom", phantom=PhantomConfig(images=24, size=SIZE)))
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path, phantoms: Path) -> Path:
    """A stack of two trained adapters, 01-see and 02-say, that overlap in the vision merger."""
    from medforge.train.stage import Inputs, run

    folder = tmp_path_factory.mktemp("adapters")
    see = StageConfig(
        name="see", tune=["vision_merger"], steps=3, batch_size=4, learning_rate=4e-3, validation_samples=4
    )
    say = see.model_copy(update={"name": "say", "tune": ["vision_merger", "language_attention"]})
    first, second = folder / "first", folder / "second"
    run(Inputs(base, phantoms, None), first, folder / "work1", folder / "logs1", see, ModelConfig(), 0)
    run(Inputs(base, phantoms, first), second, folder / "work2", folder / "logs2", say, ModelConfig(), 0)
    return second
