"""The gauges of drift against the index of a plain count."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from medforge.reference import psi
from serving.gateway.drift import Drift
from serving.gateway.metrics import Metrics

REFERENCE: dict[str, Any] = {
    "schema_version": 1,
    "features": {
        "brightness": {"kind": "bins", "edges": [0.25, 0.5, 0.75], "shares": [0.1, 0.4, 0.4, 0.1], "n": 100},
        "closed": {"kind": "categories", "categories": ["yes", "no", "other"], "shares": [0.3, 0.5, 0.2], "n": 100},
    },
}


def gauge(metrics: Metrics, feature: str) -> float | None:
    return metrics.registry.get_sample_value("medforge_gateway_drift_psi", {"feature": feature})


def samples(metrics: Metrics, feature: str) -> float | None:
    return metrics.registry.get_sample_value("medforge_gateway_drift_samples", {"feature": feature})


def test_the_index_is_that_of_the_latest_observations() -> None:
    metrics = Metrics()
    drift = Drift(REFERENCE, metrics, window=200, enough=50)
    rng = random.Random(0)
    seen = [rng.random() for _ in range(500)]
    for value in seen:
        drift.note_image({"brightness": value, "unknown": 3.0})
    counts = Counter(int(value * 4) for value in seen[-200:])
    expected = psi([0.1, 0.4, 0.4, 0.1], [counts[number] / 200 for number in range(4)])
    assert gauge(metrics, "brightness") == pytest.approx(expected)
    assert samples(metrics, "brightness") == 200


def test_there_is_no_gauge_before_there_are_enough() -> None:
    metrics = Metrics()
    drift = Drift(REFERENCE, metrics, window=200, enough=50)
    for _ in range(49):
        drift.note_answer("Yes.", "answered", "stable")
    assert gauge(metrics, "closed") is None
    assert samples(metrics, "closed") == 49
    assert "drift_psi{" not in metrics.render().decode()
    drift.note_answer("No.", "answered", "stable")
    assert gauge(metrics, "closed") == pytest.approx(psi([0.3, 0.5, 0.2], [0.98, 0.02, 0]))
    assert gauge(metrics, "brightness") is None


def test_answers_that_were_withheld_are_not_counted() -> None:
    metrics = Metrics()
    drift = Drift(REFERENCE, metrics)
    drift.note_answer(None, "abstained", "stable")
    drift.note_answer("yes", "abstained", "stable")
    assert samples(metrics, "closed") == 0


def test_a_candidates_answers_are_no_drift_of_the_stable_release() -> None:
    metrics = Metrics()
    drift = Drift(REFERENCE, metrics)
    drift.note_answer("yes", "answered", "candidate")
    assert samples(metrics, "closed") == 0
    drift.note_answer("yes", "answered", "stable")
    assert samples(metrics, "closed") == 1


def test_without_a_reference_nothing_is_counted() -> None:
    metrics = Metrics()
    drift = Drift(None, metrics)
    drift.note_image({"brightness": 0.5})
    drift.note_answer("yes", "answered", "stable")
    assert "drift_samples{" not in metrics.render().decode()
