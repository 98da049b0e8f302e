"""Drift: how far the latest images and answers are from those that the release was judged on.

For each feature of the release's reference.json the latest observations are counted into its bins; the gauge is the
population stability index of the two (`medforge.reference.psi`), worked out when it is scraped. It is absent until
there are enough observations: with fewer, chance alone would show as a shift. Counts only: no image or answer is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from medforge.reference import answer_statistics, place, psi
from serving.gateway.metrics import Metrics

WINDOW = 1000
ENOUGH = 100


class _Feature:
    """A feature's reference, and the latest observations of it by bin."""

    def __init__(self, reference: Mapping[str, Any], window: int) -> None:
        self.reference = reference
        self._latest: deque[int] = deque(maxlen=window)
        self._counts = [0] * len(reference["shares"])

    def note(self, value: float | str) -> None:
        if len(self._latest) == self._latest.maxlen:
            self._counts[self._latest[0]] -= 1
        number = place(self.reference, value)
        self._latest.append(number)
        self._counts[number] += 1

    def samples(self) -> int:
        return len(self._latest)

    def index(self) -> float:
        return psi(self.reference["shares"], [count / len(self._latest) for count in self._counts])


class Drift:
    """Counts observations against a release's reference; without one it counts nothing. For the event loop."""

    def __init__(
        self, reference: Mapping[str, Any] | None, metrics: Metrics, window: int = WINDOW, enough: int = ENOUGH
    ) -> None:
        self._metrics, self._enough = metrics, enough
        self._features = {
            name: _Feature(feature, window) for name, feature in (reference or {"features": {}})["features"].items()
        }
        for name, feature in self._features.items():
            metrics.drift_samples.labels(name).set_function(feature.samples)

    def note_image(self, statistics: Mapping[str, float]) -> None:
        """Count an image, by what `medforge.reference.image_statistics` says of it."""
        self._note(statistics)

    def note_answer(self, text: str | None, decision: str, track: str) -> None:
        """Count an answer of the stable release, whose reference it is: a candidate's own ways are no drift.

        One that was withheld (`text` None, `decision` abstained) is counted by the metrics of decisions alone, as a
        release's reference knows answers only.
        """
        if text is not None and decision == "answered" and track == "stable":
            self._note(answer_statistics(text))

    def _note(self, statistics: Mapping[str, float | str]) -> None:
        for name, value in statistics.items():
            feature = self._features.get(name)
            if feature is None:  # the release's reference was made without it
                continue
            feature.note(value)
            if feature.samples() == self._enough:
                self._metrics.drift.labels(name).set_function(feature.index)
