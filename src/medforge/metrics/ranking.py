"""How well scores tell two classes apart, whatever the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """The area under the ROC curve, 0–1: the share of (positive, negative) pairs in which the positive scores higher,
    a tie counting half. None where a class is empty.

    The rank statistic U / (n₁ n₂) of Mann and Whitney 1947, by mid-ranks (Hanley and McNeil 1982, Radiology 143:29).
    """
    if not positives or not negatives:
        return None
    below = twice_won = 0  # negatives below the present score; 2 U, which is a whole number
    for hits, misses in _by_score(positives, negatives):
        twice_won += hits * (2 * below + misses)
        below += misses
    return twice_won / (2 * len(positives) * len(negatives))


def roc(positives: Sequence[float], negatives: Sequence[float]) -> list[tuple[float, float]]:
    """The ROC curve's corners as (false positive rate, true positive rate), from (0, 0) to (1, 1): one for each score
    that occurs, the highest first, as a threshold that it still passes. Neither class may be empty (Fawcett 2006,
    Pattern Recognition Letters 27:861, algorithm 1)."""
    assert positives and negatives
    corners = [(0.0, 0.0)]
    passed = alarms = 0
    for hits, misses in reversed(_by_score(positives, negatives)):
        passed, alarms = passed + hits, alarms + misses
        corners.append((alarms / len(negatives), passed / len(positives)))
    return corners


def _by_score(positives: Sequence[float], negatives: Sequence[float]) -> list[tuple[int, int]]:
    """How many positives and how many negatives have each score that occurs, by ascending score."""
    rows = sorted([(score, True) for score in positives] + [(score, False) for score in negatives])
    found = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        flags = [flag for _, flag in group]
        found.append((sum(flags), len(flags) - sum(flags)))
    return found
