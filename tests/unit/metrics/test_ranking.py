"""The area under the ROC curve against its definition, hand-worked cases and scikit-learn."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medforge.metrics.ranking import auroc, roc

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


def test_a_hand_worked_case_with_a_tie() -> None:
    # of 3 x 2 pairs: 0.9 wins both, 0.6 wins one and ties the other, 0.2 loses both
    assert auroc([0.9, 0.6, 0.2], [0.6, 0.3]) == (2 + 1.5 + 0) / 6
    assert roc([0.9, 0.6, 0.2], [0.6, 0.3]) == [(0, 0), (0, 1 / 3), (1 / 2, 2 / 3), (1, 2 / 3), (1, 1)]


def test_perfect_reversed_and_blind_scores() -> None:
    assert auroc([0.8, 0.9], [0.1, 0.7, 0.2]) == 1.0
    assert auroc([0.1, 0.2], [0.8]) == 0.0
    assert auroc([0.5] * 4, [0.5] * 7) == 0.5


def test_without_one_of_the_classes_there_is_none() -> None:
    assert auroc([], [0.5]) is None
    assert auroc([0.5], []) is None


@given(SCORES, SCORES)
def test_it_is_the_share_of_pairs_and_the_area_under_the_curve(positives: list[float], negatives: list[float]) -> None:
    won = sum((p > n) + 0.5 * (p == n) for p, n in itertools.product(positives, negatives))
    area = auroc(positives, negatives)
    assert area == pytest.approx(won / (len(positives) * len(negatives)))
    corners = roc(positives, negatives)
    trapezia = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(corners))
    assert area == pytest.approx(trapezia)
    assert corners == sorted(corners) and (corners[0], corners[-1]) == ((0, 0), (1, 1))


@given(SCORES, SCORES)
def test_only_the_order_of_the_scores_counts(positives: list[float], negatives: list[float]) -> None:
    grown = auroc([score**3 + 2 for score in positives], [score**3 + 2 for score in negatives])
    assert grown == auroc(positives, negatives) == auroc(positives[::-1], negatives[::-1])
    swapped = auroc(negatives, positives)
    assert swapped is not None and grown == pytest.approx(1 - swapped)


def test_scikit_learn_finds_the_same() -> None:
    metrics = pytest.importorskip("sklearn.metrics")

    @settings(deadline=None)  # its first call imports more of it
    @given(SCORES, SCORES)
    def same(positives: list[float], negatives: list[float]) -> None:
        labels = [1] * len(positives) + [0] * len(negatives)
        assert auroc(positives, negatives) == pytest.approx(metrics.roc_auc_score(labels, positives + negatives))

    same()
