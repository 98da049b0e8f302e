"""Metrics of predicted boxes against reference boxes, both (x1, y1, x2, y2) as shares of the image, 0–1."""

from __future__ import annotations

import math
from collections.abc import Sequence

XYXY = tuple[float, float, float, float]

FOUND = 0.5


def iou(one: XYXY, other: XYXY) -> float:
    """Intersection over union of two boxes, 0–1; an inverted or empty box has 0 (Jaccard; PASCAL VOC, Everingham et
    al. 2010, section 4.2)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0 or not (_area(one) > 0 and _area(other) > 0):
        return 0.0
    shared = width * height
    union = _area(one) + _area(other) - shared
    return min(1.0, shared / union) if union > 0 else 0.0  # rounding of tiny boxes can pass 1, or leave no area


def _area(box: XYXY) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def matched(predicted: Sequence[XYXY], reference: Sequence[XYXY]) -> list[float]:
    """The IoUs of the pairs in the one-to-one matching with the largest total IoU: min(len) of them."""
    few, many = sorted((list(predicted), list(reference)), key=len)
    overlaps = [[iou(a, b) for b in many] for a in few]
    return [overlaps[row][column] for row, column in enumerate(_assign(overlaps))]


def _assign(gain: list[list[float]]) -> list[int]:
    """For each row the column that maximises the total gain, each column used once; needs no more rows than columns.

    The Hungarian algorithm by shortest augmenting paths over potentials, O(rows² · columns) (Kuhn 1955; Jonker and
    Volgenant 1987). Index 0 of the columns is a virtual start.
    """
    rows, columns = len(gain), len(gain[0]) if gain else 0
    row_price, column_price = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner = [0] * (columns + 1)  # the row, from 1, that holds a column; 0 is nobody
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        slack, came_from, seen = [math.inf] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
        while owner[column]:
            seen[column] = True
            current, step, following = owner[column], math.inf, 0
            for candidate in range(1, columns + 1):
                if seen[candidate]:
                    continue
                cost = -gain[current - 1][candidate - 1] - row_price[current] - column_price[candidate]
                if cost < slack[candidate]:
                    slack[candidate], came_from[candidate] = cost, column
                if slack[candidate] < step:
                    step, following = slack[candidate], candidate
            for candidate in range(columns + 1):
                if seen[candidate]:
                    row_price[owner[candidate]] += step
                    column_price[candidate] -= step
                else:
                    slack[candidate] -= step
            column = following
        while column:
            owner[column] = owner[came_from[column]]
            column = came_from[column]
    chosen = [0] * rows
    for column in range(1, columns + 1):
        if owner[column]:
            chosen[owner[column] - 1] = column - 1
    return chosen


def box_iou(predicted: Sequence[XYXY], reference: Sequence[XYXY]) -> float:
    """Mean IoU of one sample over a one-to-one matching, 0–1: a missing box counts as 0, and so does a surplus one,
    else naming many boxes would pay. The sum of matched IoUs is divided by the larger count."""
    return math.fsum(matched(predicted, reference)) / max(len(predicted), len(reference))


def box_found(predicted: Sequence[XYXY], reference: Sequence[XYXY]) -> float:
    """Share of boxes that are matched with IoU of at least 0.5; missing and surplus boxes count as not found."""
    found = sum(overlap >= FOUND for overlap in matched(predicted, reference))
    return found / max(len(predicted), len(reference))
