"""Sources that are made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medforge.config import DataConfig
from medforge.convert import run
from medforge.dataset import Dataset
from medforge.records import Sample
from tests.conftest import png

Make = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Make:
    """A function that writes a source folder: JSON files from values (str is written as it is), images by name."""

    def make(files: dict[str, Any], images: dict[str, int] | None = None, name: str = "source") -> Path:
        folder = tmp_path / name
        for path, value in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), "utf-8")
        for path, seed in (images or {}).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png(seed))
        return folder

    return make


class Converted:
    """A converted data set, with its samples by split."""

    def __init__(self, folder: Path) -> None:
        self.dataset = Dataset.open(folder)
        self.manifest = self.dataset.manifest
        self.samples: list[Sample] = [s for split in self.dataset.splits() for s in self.dataset.samples(split)]
        self.rejects = self.dataset.rejects()
        self.reasons = {reject.id: reject.reason for reject in self.rejects}


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Converted]:
    """A function that converts a folder with the given settings and opens the result."""

    def make(folder: Path | str, seed: int = 0, out: str = "out", **settings: Any) -> Converted:
        run(str(folder), tmp_path / out, DataConfig(**settings), seed)
        return Converted(tmp_path / out)

    return make
