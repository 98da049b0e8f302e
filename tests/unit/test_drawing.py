"""The drawn scenes, looked at by their pixels alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from medforge.drawing import FIGURES, GRID, MAX_SPOTS, STYLES, Scene, Spot, draw, random_scene

SCENES = [random_scene(np.random.default_rng(seed)) for seed in range(120)]


def areas(mask: np.ndarray) -> list[np.ndarray]:
    """The connected areas of a mask (four neighbours), each as the mask's own shape, by flooding from a pixel."""
    left, found = mask.copy(), []
    while left.any():
        area = np.zeros_like(mask)
        area[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = area.copy()
            grown[1:] |= area[:-1]
            grown[:-1] |= area[1:]
            grown[:, 1:] |= area[:, :-1]
            grown[:, :-1] |= area[:, 1:]
            grown &= mask
            if (grown == area).all():
                break
            area = grown
        found.append(area)
        left &= ~area
    return found


def difference(scene: Scene, size: int) -> np.ndarray:
    """Where the picture differs from the same scene without its spots; the noise is the same in both."""
    return draw(scene, size) != draw(replace(scene, spots=()), size)


def test_a_seed_gives_the_same_pixels() -> None:
    scene = SCENES[0]
    assert draw(scene, 96).tobytes() == draw(scene, 96).tobytes()
    assert draw(scene, 96).tobytes() != draw(replace(scene, seed=scene.seed + 1), 96).tobytes()
    assert random_scene(np.random.default_rng(5)) == random_scene(np.random.default_rng(5))
    assert random_scene(np.random.default_rng(5)) != random_scene(np.random.default_rng(6))


@pytest.mark.parametrize("size", [56, 96, 130])
def test_a_picture_is_grey_bytes(size: int) -> None:
    image = draw(SCENES[0], size)
    assert (image.shape, image.dtype) == ((size, size), np.uint8)


def test_every_kind_of_scene_is_drawn() -> None:
    assert {scene.style for scene in SCENES} == set(range(STYLES))
    assert {scene.figure for scene in SCENES} == set(range(FIGURES))
    assert {len(scene.spots) for scene in SCENES} == set(range(MAX_SPOTS + 1))
    assert {scene.spots[0].cell for scene in SCENES if len(scene.spots) == 1} == {
        (row, column) for row in range(GRID) for column in range(GRID)
    }


def are_apart(scene: Scene, size: int) -> bool:
    """Whether at least a pixel of the ground lies between any two spots."""
    return all(
        np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius + 1.5 / size
        for one, other in combinations(scene.spots, 2)
    )


@pytest.mark.parametrize("number", range(0, 120, 3))
def test_spots_are_bright_areas_in_their_boxes(number: int) -> None:
    scene, size = SCENES[number], 96
    image, changed = draw(scene, size), difference(scene, size)
    boxes = np.zeros_like(changed)
    for spot in scene.spots:
        x1, y1, x2, y2 = spot.xyxy
        rows, columns = (slice(int(low * size), int(np.ceil(high * size))) for low, high in ((y1, y2), (x1, x2)))
        boxes[rows, columns] = True
        assert image[rows, columns][changed[rows, columns]].mean() > 200
    assert not (changed & ~boxes).any()
    assert are_apart(scene, size)  # else they would be counted as one
    # a spot's edge may look like the ground by chance; such crumbs are no spots
    found = [area for area in areas(changed) if area.sum() > 20]
    assert len(found) == len(scene.spots)
    for area in found:
        y, x = np.nonzero(area)
        extent = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / size
        fits = [np.abs(np.array(spot.xyxy) - extent).max() for spot in scene.spots]
        assert min(fits) <= 2.0 / size
        centre = (extent[:2] + extent[2:]) / 2
        assert scene.spots[int(np.argmin(fits))].cell == (int(centre[1] * GRID), int(centre[0] * GRID))


def test_spots_stand_in_different_cells_and_inside_the_picture() -> None:
    for scene in SCENES:
        cells = [spot.cell for spot in scene.spots]
        assert len(set(cells)) == len(cells)
        assert cells == sorted(cells)
        for spot in scene.spots:
            x1, y1, x2, y2 = spot.xyxy
            assert 0 < x1 < x2 < 1
            assert 0 < y1 < y2 < 1


@pytest.mark.parametrize(
    ("x", "y", "cell"),
    [(0.0, 0.0, (0, 0)), (0.34, 0.1, (0, 1)), (0.5, 0.5, (1, 1)), (0.99, 0.4, (1, 2)), (1.0, 1.0, (2, 2))],
)
def test_a_cell_is_row_and_column(x: float, y: float, cell: tuple[int, int]) -> None:
    assert Spot(x, y, 0.1).cell == cell


def test_styles_and_figures_look_different() -> None:
    """By far more than the noise, so that there is something to learn."""
    pictures = {
        (style, figure): draw(Scene(style, figure, (), 7), 96).astype(int)
        for style in range(STYLES)
        for figure in range(FIGURES)
    }
    keys = list(pictures)
    for number, one in enumerate(keys):
        for other in keys[number + 1 :]:
            assert (np.abs(pictures[one] - pictures[other]) > 40).mean() > 0.02
