"""Drawn scenes: a ground in one of three styles, a figure on it, and spots. They are nothing medical.

The tiny model learns to see on them under neutral names; the phantom data set asks about them in the words of
radiology. The drawing is numpy alone, so that a seed gives the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STYLES = 3
FIGURES = 4
GRID = 3  # spots stand in the cells of a 3 x 3 grid, so that a place has a name
MAX_SPOTS = 3


@dataclass(frozen=True)
class Spot:
    """A round spot: centre and radius as shares of the image's width."""

    x: float
    y: float
    radius: float

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the grid cell that holds the centre."""
        return min(int(self.y * GRID), GRID - 1), min(int(self.x * GRID), GRID - 1)

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """The spot's bounding box, 0–1, to four decimals."""
        x1, y1, x2, y2 = (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)
        return round(x1, 4), round(y1, 4), round(x2, 4), round(y2, 4)


@dataclass(frozen=True)
class Scene:
    """What is drawn; `seed` gives the noise."""

    style: int
    figure: int
    spots: tuple[Spot, ...]
    seed: int


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with 0 to MAX_SPOTS spots in different cells; one spot is the commonest."""
    count = int(rng.choice(MAX_SPOTS + 1, p=[0.25, 0.45, 0.15, 0.15]))
    cells = sorted(int(cell) for cell in rng.choice(GRID * GRID, size=count, replace=False))
    spots = [_random_spot(rng, cell) for cell in cells]
    while not _are_apart(spots):  # two that touch would be counted as one
        spots = [_random_spot(rng, cell) for cell in cells]
    style, figure, seed = int(rng.integers(STYLES)), int(rng.integers(FIGURES)), int(rng.integers(2**31))
    return Scene(style, figure, tuple(spots), seed)


def _random_spot(rng: np.random.Generator, cell: int) -> Spot:
    radius = float(rng.uniform(0.08, 0.115))
    # the outer cells' spots are drawn towards the middle, so that all of them lie on the body
    x, y = (0.5 + 0.24 * (index - 1) + float(rng.uniform(-0.05, 0.05)) for index in (cell % GRID, cell // GRID))
    return Spot(round(x, 4), round(y, 4), round(radius, 4))


def _are_apart(spots: list[Spot]) -> bool:
    """Whether a gap of at least a fiftieth of the width is between any two spots."""
    pairs = ((a, b) for number, a in enumerate(spots) for b in spots[:number])
    return all(np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 0.02 for a, b in pairs)


def draw(scene: Scene, size: int) -> np.ndarray:
    """The scene as uint8 grey of [size, size]."""
    rng = np.random.default_rng(scene.seed)
    axis = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = _ellipse(x, y, 0.5, 0.5, 0.46, 0.44)
    rim = inside & ~_ellipse(x, y, 0.5, 0.5, 0.42, 0.40)
    if scene.style == 0:  # dark ground, grey body, bright rim
        image = np.where(inside, 95.0, 8.0)
        image[rim] = 235
        noise, dark_figure, spot = 9.0, 55.0, 230.0
    elif scene.style == 1:  # bright body under a slow shading, thin dark rim
        image = np.where(inside, 150 + 50 * (x - y), 4.0)
        image[rim] = 40
        noise, dark_figure, spot = 5.0, -55.0, 245.0
    else:  # light ground with stripes, no rim
        image = 150 + 60 * np.abs(x - 0.5) + 14 * np.sin(2 * np.pi * (7 * y + 0.6 * np.sin(np.pi * x)))
        noise, dark_figure, spot = 7.0, -80.0, 252.0
    image[_figure(scene.figure, x, y)] += dark_figure
    for item in scene.spots:
        image[_ellipse(x, y, item.x, item.y, item.radius, item.radius)] = spot
    image = image + rng.normal(0.0, noise, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _figure(figure: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if figure == 0:  # two tall lobes
        return _ellipse(x, y, 0.31, 0.5, 0.12, 0.28) | _ellipse(x, y, 0.69, 0.5, 0.12, 0.28)
    if figure == 1:  # one large wedge on the left
        return _ellipse(x, y, 0.38, 0.46, 0.26, 0.22) & (y < 0.75 - 0.35 * x)
    if figure == 2:  # two halves with a gap
        return _ellipse(x, y, 0.5, 0.5, 0.36, 0.36) & (np.abs(x - 0.5) > 0.03)
    return _ellipse(x, y, 0.3, 0.64, 0.07, 0.11) | _ellipse(x, y, 0.7, 0.64, 0.07, 0.11)  # two small beans


def _ellipse(x: np.ndarray, y: np.ndarray, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1.0
