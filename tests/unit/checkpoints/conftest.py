"""Checkpoints in a folder, and what they tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from medforge.checkpoints import Checkpoints


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, log: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "run", log=log.append)
