"""Statistics by hand, bins against numpy's, the index against the divergence that it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medforge.files import write_json
from medforge.reference import answer_statistics, build, image_statistics, load, place, psi


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def test_a_flat_image() -> None:
    assert image_statistics(grey(np.full((100, 200), 51))) == {
        "brightness": pytest.approx(0.2),
        "contrast": 0.0,
        "entropy": 0.0,
        "black": 0.0,
        "sharpness": 0.0,
        "aspect": 1.0,
        "log_pixels": pytest.approx(math.log10(20_000)),
    }


def test_half_black_half_white() -> None:
    values = np.zeros((100, 100))
    values[:, 50:] = 255
    found = image_statistics(grey(values))
    assert found["brightness"] == found["contrast"] == found["black"] == 0.5
    assert found["entropy"] == 1.0
    # the Laplacian is +255 and -255 in the two columns beside the edge, 0 elsewhere: variance 2/100 * 255²
    assert found["sharpness"] == pytest.approx(math.log10(1 + 0.02 * 255**2))
    assert found["aspect"] == 0.0


def test_colour_is_looked_at_in_grey_and_size_up_to_what_is_sent() -> None:
    picture = grey(np.random.default_rng(0).integers(0, 256, (90, 70)))
    assert image_statistics(picture.convert("RGB")) == image_statistics(picture)
    large = image_statistics(Image.new("L", (4096, 1024)))
    assert large["log_pixels"] == pytest.approx(math.log10(2048 * 512))
    assert image_statistics(Image.new("L", (1, 1)))["log_pixels"] == 0.0
    assert all(math.isfinite(value) for value in image_statistics(Image.new("L", (5000, 1))).values())


def test_blurring_lowers_sharpness() -> None:
    from PIL import ImageFilter

    sharp = grey(np.random.default_rng(0).integers(0, 256, (128, 128)))
    blurred = sharp.filter(ImageFilter.GaussianBlur(2))
    assert image_statistics(blurred)["sharpness"] < image_statistics(sharp)["sharpness"] - 1


@pytest.mark.parametrize(
    ("text", "words", "closed", "language"),
    [
        ("Yes", 1, "yes", "en"),
        ("No, there is none.", 4, "no", "en"),
        ("pleural effusion", 2, "other", "en"),
        ("是", 1, "yes", "zh"),
        ("左肺", 2, "other", "zh"),
        ("", 0, "other", "other"),
        ("12.5", 1, "other", "other"),
    ],
)
def test_answers(text: str, words: int, closed: str, language: str) -> None:
    assert answer_statistics(text) == {"words": math.log2(1 + words), "closed": closed, "language": language}


def pictures(count: int, seed: int = 0, brightness: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [grey(rng.integers(brightness, 100 + brightness + rng.integers(0, 56), (40, 50))) for _ in range(count)]


def test_a_reference_has_even_bins_and_tells_nothing_of_a_sample() -> None:
    made = build(pictures(200), ["yes"] * 30 + ["no"] * 60 + ["左肺"] * 10)
    assert made["features"]["closed"] == {
        "kind": "categories",
        "categories": ["yes", "no", "other"],
        "shares": [0.3, 0.6, 0.1],
        "n": 100,
    }
    assert made["features"]["language"]["shares"] == [0.9, 0.1, 0.0]
    brightness = made["features"]["brightness"]
    assert brightness["n"] == 200 and len(brightness["edges"]) == 9
    assert brightness["shares"] == pytest.approx([0.1] * 10, abs=0.005)
    assert made == build(pictures(200), ["yes"] * 30 + ["no"] * 60 + ["左肺"] * 10)
    json.dumps(made, allow_nan=False)


def test_few_observations_make_few_bins_and_none_makes_no_feature() -> None:
    assert len(build(pictures(45), [])["features"]["entropy"]["shares"]) <= 3
    assert set(build([], ["yes"])["features"]) == {"words", "closed", "language"}
    assert build([], [])["features"] == {}


def test_a_constant_feature_sees_a_shift_to_either_side() -> None:
    feature = build(pictures(60), [])["features"]["aspect"]
    value = math.log2(50 / 40)
    assert feature["shares"][place(feature, value)] == 1.0
    for other in (value - 0.1, value + 0.1):
        assert feature["shares"][place(feature, other)] == 0.0


@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 6)), min_size=1, max_size=9, unique=True), st.floats(-6, 6))
def test_bins_are_numpys(edges: list[float], value: float) -> None:
    feature = {"kind": "bins", "edges": sorted(edges), "shares": []}
    assert place(feature, value) == np.digitize(round(value, 6), sorted(edges))


def test_values_that_fit_nowhere() -> None:
    feature = build([], ["yes"])["features"]
    with pytest.raises(ValueError, match="not in"):
        place(feature["closed"], "perhaps")
    with pytest.raises(ValueError, match="number"):
        place(feature["words"], math.nan)


def test_the_index_by_hand() -> None:
    # 0.1 ln 1.2 + (-0.1) ln 0.8
    assert psi([0.5, 0.5], [0.6, 0.4]) == pytest.approx(0.0405465, abs=1e-6)
    assert psi([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]) == 0.0
    # an empty bin counts as 0.0001: (1 - 0.5) ln 2 + (0.0001 - 0.5) ln 0.0002
    assert psi([0.5, 0.5], [1.0, 0.0]) == pytest.approx(0.5 * math.log(2) + 0.4999 * math.log(5000))
    with pytest.raises(ValueError, match="zip"):
        psi([1.0], [0.5, 0.5])


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=2, max_size=10))
def test_the_index_is_the_symmetric_divergence(counts: list[tuple[int, int]]) -> None:
    e, o = (np.asarray(column) / sum(column) for column in zip(*counts, strict=True))
    divergence = float((e * np.log(e / o)).sum() + (o * np.log(o / e)).sum())
    if min(e.min(), o.min()) >= 1e-4:
        assert psi(list(e), list(o)) == pytest.approx(divergence, abs=1e-9)
    assert psi(list(e), list(o)) >= -1e-12
    assert psi(list(o), list(e)) == pytest.approx(psi(list(e), list(o)))


def test_a_shift_shows_and_chance_does_not() -> None:
    feature = build(pictures(400), [])["features"]["brightness"]

    def shares(images: list[Image.Image]) -> list[float]:
        placed = [place(feature, image_statistics(image)["brightness"]) for image in images]
        return [placed.count(number) / len(placed) for number in range(len(feature["shares"]))]

    assert psi(feature["shares"], shares(pictures(400, seed=1))) < 0.1
    assert psi(feature["shares"], shares(pictures(400, seed=1, brightness=40))) > 0.25


def test_a_reference_is_read_back(tmp_path: Path) -> None:
    made = build(pictures(30), ["yes", "no"])
    write_json(tmp_path / "reference.json", made)
    assert load(tmp_path / "reference.json") == made


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "no reference"),
        ({"schema_version": 2, "features": {}}, "schema_version"),
        ({"schema_version": 1, "features": {"a": 1}}, "features.a: kind"),
        ({"schema_version": 1, "features": {"a": {"kind": "bins", "edges": [2, 1], "shares": [1, 0, 0]}}}, "rising"),
        ({"schema_version": 1, "features": {"a": {"kind": "bins", "edges": [1, 2], "shares": [1, 0]}}}, "each bin"),
        ({"schema_version": 1, "features": {"a": {"kind": "bins", "edges": [1], "shares": [1, 1]}}}, "sum to 1"),
        ({"schema_version": 1, "features": {"a": {"kind": "categories", "categories": "ab", "shares": []}}}, "lists"),
        (
            {"schema_version": 1, "features": {"a": {"kind": "categories", "categories": ["x", "x"], "shares": []}}},
            "different",
        ),
    ],
)
def test_what_is_no_reference_is_told(value: Any, problem: str, tmp_path: Path) -> None:
    write_json(tmp_path / "reference.json", value)
    with pytest.raises(ValueError, match=problem) as told:
        load(tmp_path / "reference.json")
    assert "reference.json" in str(told.value)
