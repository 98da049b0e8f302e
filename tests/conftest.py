"""Fixtures for all tests."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medforge.files import sha256_bytes
from medforge.records import ImageRef, Sample, Turn, sample_id

# Two threads in each of two test processes wait for each other on two cores; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def png(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    """A PNG of noise; the same seed gives the same bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def make_sample() -> Callable[..., tuple[Sample, list[bytes]]]:
    """A function that makes a sound sample and its image bytes; keyword arguments replace fields."""

    def make(number: int = 0, image: int | None = None, **changes: object) -> tuple[Sample, list[bytes]]:
        data = png(number if image is None else image)
        ref = ImageRef(sha256_bytes(data), 64, 48)
        turns = (Turn("user", f"<image>\nIs finding {number} seen?"), Turn("assistant", "yes" if number % 2 else "no"))
        values: dict[str, object] = {
            "id": sample_id("unit", (ref,), turns),
            "images": (ref,),
            "turns": turns,
            "answer_type": "closed",
            "question_type": "presence",
            "language": "en",
            "study_id": f"study-{number if image is None else image}",
            "source": "unit",
            "licence": "CC0-1.0",
            "split": "train",
        }
        return Sample(**(values | changes)), [data]  # type: ignore[arg-type]

    return make


@pytest.fixture
def shared_data() -> Path:
    """The folder with the real data sets; skips where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} is missing")
    return SHARED_DATA
