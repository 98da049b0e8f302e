"""One predictor behind the gateway: where it is, whether it is ready, its circuit, and the metrics of its track."""

from __future__ import annotations

import asyncio

from serving.gateway import api
from serving.gateway.answers import Capabilities
from serving.gateway.balance import Track
from serving.gateway.breaker import Breaker
from serving.gateway.logs import logger
from serving.gateway.metrics import Metrics
from serving.gateway.routing import Place
from serving.gateway.settings import Settings

_UNKNOWN = Capabilities("")


class Upstream:
    """One predictor: its base URL, circuit, and what it serves by what it last said of itself."""

    def __init__(self, name: Track, place: Place, settings: Settings, metrics: Metrics) -> None:
        self.name, self.place, self.base, self._metrics = name, place, place.url, metrics
        self.chat = f"{place.url}/chat/completions"
        self._digest = place.release
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        self.capabilities = _UNKNOWN
        self.release = self._serves(_UNKNOWN)
        self.problem: str | None = "has not been asked yet"
        self.looked = asyncio.Event()
        self.in_use = False  # it is what its track's metrics tell of

    def begin(self) -> None:
        """From now on the metrics of its track are its own."""
        self.in_use = True
        self._metrics.routed.labels(self.name)  # a series that begins at 0: what comes first counts
        self._show_release(True)
        self._show()

    def retire(self) -> None:
        """No new request will come; those in flight end here."""
        self._show_release(False)
        if self.in_use:
            self._metrics.upstream_ready.remove(self.name)
            self._metrics.breaker_open.remove(self.name)
        self.in_use = False

    @property
    def ready(self) -> bool:
        """Whether it answered when it was last asked, as the release that it should be."""
        return self.problem is None

    def _serves(self, about: Capabilities) -> api.Release:
        return api.Release(
            digest=about.release or self._digest or None, model=about.model, version=about.version, track=self.name
        )

    def heard(self, capabilities: Capabilities | None, problem: str | None) -> None:
        """Take down what a look at it gave."""
        if capabilities is not None and self._digest and capabilities.release not in (None, self._digest):
            problem = f"serves release {capabilities.release}, not {self._digest}, which it should"
        if problem != self.problem:
            logger().log(20 if problem is None else 30, "upstream", track=self.name, ready=problem is None, why=problem)
        if capabilities is not None and capabilities != self.capabilities:
            self._show_release(False)
            self.capabilities, self.release = capabilities, self._serves(capabilities)
            self._show_release(True)
        self.problem = problem
        self._show()
        self.looked.set()

    def _show_release(self, shown: bool) -> None:
        if self.in_use and self.capabilities.model:
            labels = (self.name, self.release.digest or "unknown", self.capabilities.model)
            if shown:
                self._metrics.release.labels(*labels).set(1)
            else:
                self._metrics.release.remove(*labels)

    def succeeded(self) -> None:
        """An answer is whole, or its head came to a trial."""
        was_closed = self.breaker.state == "closed"
        self.breaker.success()
        if not was_closed:
            self._show()

    def failed(self) -> None:
        """A request failed by its fault."""
        self.breaker.failure()
        self._show()

    def _show(self) -> None:
        if self.in_use:
            self._metrics.upstream_ready.labels(self.name).set(self.ready)
            self._metrics.breaker_open.labels(self.name).set(self.breaker.state != "closed")
