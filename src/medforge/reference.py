"""What a release's inputs and answers looked like when it was judged, and how far those of today are from it.

`reference.json` of a release holds, for each feature of images and answers, the shares of the judged samples that fell
into each bin or category: {schema_version, features: {name: {kind, edges or categories, shares, n}}}. It names no
sample. A gateway counts what comes in into the same bins, and the population stability index says how far the two
are apart.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.files import read_json
from medforge.metrics.closed import parse_yes_no
from medforge.metrics.text import tokens

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA_VERSION = 1
FILE = "reference.json"
CATEGORIES = {"closed": ("yes", "no", "other"), "language": ("en", "zh", "other")}
SMALLEST_SHARE = 1e-4
_SIDE = 256  # images are looked at in a copy of at most this side
_SENT_SIDE = 2048  # the gateway sends no longer side on, unless it is told to
_BLACK = 8
_BINS, _PER_BIN = 10, 20
_ZH = re.compile(r"[\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")


def image_statistics(image: Image) -> dict[str, float]:
    """Cheap figures of a picture: most are of a grey copy of at most 256 pixels a side.

    brightness: mean, 0–1. contrast: standard deviation, 0–0.5. entropy: of the grey levels, 0–8 bits. black: share of
    almost black pixels. sharpness: log10 of 1 + the variance of the Laplacian of the grey levels (0–255). aspect:
    log2 of width over height. log_pixels: log10 of width times height, taken as if it were reduced to 2048 a side.
    """
    import numpy as np
    from PIL import Image as Pillow

    width, height = image.size
    scale = min(1.0, _SENT_SIDE / max(width, height))
    small = image.convert("L")
    small.thumbnail((_SIDE, _SIDE), Pillow.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)
    shares = np.bincount(grey.astype(np.uint8).ravel(), minlength=256) / grey.size
    present = shares[shares > 0]
    padded = np.pad(grey, 1, mode="edge")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return {
        "brightness": float(grey.mean() / 255),
        "contrast": float(grey.std() / 255),
        "entropy": float(-(present * np.log2(present)).sum()) + 0.0,
        "black": float((grey < _BLACK).mean()),
        "sharpness": float(np.log10(1 + (around - 4 * grey).var())),
        "aspect": math.log2(width / height),
        "log_pixels": math.log10(width * height * scale * scale),
    }


def answer_statistics(text: str) -> dict[str, float | str]:
    """Of an answer: `words` (log2 of 1 + their number; each Chinese character is one), `closed` (whether it says yes,
    no or neither), `language` (en or zh, by the more frequent letters; other without any)."""
    said = parse_yes_no(text)
    chinese, latin = len(_ZH.findall(text)), len(_LATIN.findall(text))
    return {
        "words": math.log2(1 + len(tokens(text))),
        "closed": said if said in ("yes", "no") else "other",
        "language": "other" if not chinese + latin else "zh" if chinese >= latin else "en",
    }


def build(images: Iterable[Image], answers: Iterable[str]) -> dict[str, Any]:
    """The reference of these images and answers. A feature without any observation is left out.

    Numbers fall into up to ten bins with as many observations each, fewer where there are less than 200 of them.
    """
    seen: dict[str, list[Any]] = {}
    of_images: Iterable[Mapping[str, float | str]] = map(image_statistics, images)
    for statistics in itertools.chain(of_images, map(answer_statistics, answers)):
        for name, value in statistics.items():
            seen.setdefault(name, []).append(value)
    features = {name: _categorical(name, seen[name]) if name in CATEGORIES else _numeric(seen[name]) for name in seen}
    return {"schema_version": SCHEMA_VERSION, "features": features}


def _categorical(name: str, values: Sequence[str]) -> dict[str, Any]:
    known = CATEGORIES[name]
    shares = [round(values.count(category) / len(values), 6) for category in known]
    return {"kind": "categories", "categories": list(known), "shares": shares, "n": len(values)}


def _numeric(values: Sequence[float]) -> dict[str, Any]:
    import numpy as np

    bins = min(_BINS, max(2, len(values) // _PER_BIN))
    quantiles = np.quantile(values, [number / bins for number in range(1, bins)])
    # rounded, so that another machine's last digits make no other file
    edges = sorted({round(float(edge), 6) for edge in quantiles})
    if len(edges) == 1:  # mostly one value: what is above it must not fall in with it
        edges.append(round(edges[0] + 1e-6, 6))
    feature: dict[str, Any] = {"kind": "bins", "edges": edges}
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[place(feature, value)] += 1
    return feature | {"shares": [round(count / len(values), 6) for count in counts], "n": len(values)}


def place(feature: Mapping[str, Any], value: float | str) -> int:
    """The number of the bin or category of a feature that a value falls into. A bin holds its lower edge.

    ValueError for a category that the feature does not have, or a number that is none (NaN).
    """
    if feature["kind"] == "categories":
        return int(feature["categories"].index(value))
    if not isinstance(value, int | float) or math.isnan(value):
        raise ValueError("a number is expected")
    rounded = round(value, 6)
    return sum(edge <= rounded for edge in feature["edges"])


def psi(expected: Sequence[float], observed: Sequence[float]) -> float:
    """The population stability index of two lists of shares: the sum over bins of (o - e) ln(o / e), 0 or more.

    Below 0.1 is taken for no shift, above 0.25 for a large one (N. Siddiqi, Credit Risk Scorecards, Wiley 2006). It
    is the symmetrised Kullback-Leibler divergence. An empty bin would make it infinite: shares below 0.0001 count as
    0.0001, and are not normalised again.
    """
    total = 0.0
    for e, o in zip(expected, observed, strict=True):
        e, o = max(e, SMALLEST_SHARE), max(o, SMALLEST_SHARE)
        total += (o - e) * math.log(o / e)
    return total


def load(path: Path) -> dict[str, Any]:
    """The reference in a file, as `build` made it. ValueError names the file and what is wrong with it."""
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("features"), dict):
        raise ValueError(f"{path}: is no reference of a release: it has no features")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version {value.get('schema_version')} is not {SCHEMA_VERSION}; take the release's own "
            "gateway, or publish the release again"
        )
    for name, feature in value["features"].items():
        if problem := _problem(feature):
            raise ValueError(f"{path}: features.{name}: {problem}")
    return value


def _problem(feature: Any) -> str | None:
    if not isinstance(feature, dict) or feature.get("kind") not in ("bins", "categories"):
        return "kind is neither bins nor categories"
    names = feature.get("edges") if feature["kind"] == "bins" else feature.get("categories")
    shares = feature.get("shares")
    if not isinstance(names, list) or not isinstance(shares, list):
        return "edges or categories, and shares, have to be lists"
    if feature["kind"] == "bins":
        if not all(isinstance(edge, int | float) for edge in names) or names != sorted(set(names)):
            return "edges have to be rising numbers"
    elif not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return "categories have to be different names"
    if len(shares) != len(names) + (feature["kind"] == "bins"):
        return "there has to be a share for each bin or category"
    if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-3:
        return "shares have to be numbers from 0 to 1 that sum to 1"
    return None
