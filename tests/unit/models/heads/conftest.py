"""Heads, made from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medforge.models.heads import TaskHeads
from tests.unit.models.heads.made import HIDDEN


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def heads() -> TaskHeads:
    return TaskHeads(HIDDEN, region=True, match=True)
