"""A tiny model, its encoder, and three questions, with and without boxes and claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge.models.encode import Encoder
from medforge.models.load import load_model
from medforge.models.rows import Item
from medforge.train.features import Features
from tests.unit.models.passes import PIXELS, Case, adapted, case, stock
from tests.unit.train.trainee.made import QUESTIONS, claim, tagged


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(base, *PIXELS)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return adapted(load_model(base, "float32").cpu(), "qwen3-vl")


@pytest.fixture(scope="module")
def features(model: Any) -> Features:
    from medforge.models.tower import Tower

    return Features(Tower(stock(model)), None, None)


@pytest.fixture(scope="module")
def asked(encoder: Encoder) -> list[Case]:
    return [case(encoder, (image,), question, answer) for image, question, answer in QUESTIONS]


@pytest.fixture(scope="module")
def multi(encoder: Encoder, asked: list[Case]) -> list[Item]:
    """Three questions, of which two have a box, and three claims, of which one fits."""
    claims = [("no", True), ("lung", False), ("lower lobe", False)]
    return tagged(asked, (0, 2)) + [claim(encoder, number, *one) for number, one in enumerate(claims)]
