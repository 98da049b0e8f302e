"""The gateway's Prometheus metrics. Labels have few values: no client, question or image is ever one."""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest

# a model's answers take from a blink to two minutes
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SHARES = tuple(number / 20 for number in range(1, 21))


class _Kept:
    """Keeps its children by their labels: `labels` takes a lock and makes strings of them each time."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._kept: dict[tuple[Any, ...], Any] = {}

    def labels(self, *labelvalues: Any, **labelkwargs: Any) -> Any:
        """The child with these labels."""
        if labelkwargs:
            return super().labels(*labelvalues, **labelkwargs)  # type: ignore[misc]
        child = self._kept.get(labelvalues)
        if child is None:
            child = self._kept[labelvalues] = super().labels(*labelvalues)  # type: ignore[misc]
        return child


class Counter(_Kept, prometheus_client.Counter):
    """A counter."""


class Histogram(_Kept, prometheus_client.Histogram):
    """A histogram."""


class Metrics:
    """All metrics, in a registry of their own: two gateways in one process (tests) do not share figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "medforge_gateway_requests", "Requests answered.", ("route", "status", "client"), registry=r
        )
        self.seconds = Histogram(
            "medforge_gateway_request_seconds", "From the first byte in to the last out.", ("route",),
            buckets=SECONDS, registry=r,
        )  # fmt: skip
        self.first_byte = Histogram(
            "medforge_gateway_first_byte_seconds", "To the first byte of an answer.", ("route",),
            buckets=SECONDS, registry=r,
        )  # fmt: skip
        self.in_flight = Gauge("medforge_gateway_in_flight", "Requests that are with an upstream.", registry=r)
        self.queued = Gauge("medforge_gateway_queued", "Requests that wait for a place.", registry=r)
        self.queue_seconds = Histogram(
            "medforge_gateway_queue_seconds", "Waiting for a place.", buckets=SHORT, registry=r
        )
        self.refused = Counter(
            "medforge_gateway_refused",
            "Requests refused before an upstream was asked: rate, quota, queue, deadline, draining, body.",
            ("reason",),
            registry=r,
        )
        self.errors = Counter(
            "medforge_gateway_errors",
            "Requests that were refused or failed, by the error's code.",
            ("code",),
            registry=r,
        )
        self.upstream_seconds = Histogram(
            "medforge_gateway_upstream_seconds", "An attempt at an upstream, to the end.", ("track", "outcome"),
            buckets=SECONDS, registry=r,
        )  # fmt: skip
        self.upstream_retries = Counter(
            "medforge_gateway_upstream_retries", "Attempts after the first.", ("track",), registry=r
        )
        self.upstream_ready = Gauge("medforge_gateway_upstream_ready", "1 while it is ready.", ("track",), registry=r)
        self.breaker_open = Gauge(
            "medforge_gateway_breaker_open", "1 while an upstream's circuit is open.", ("track",), registry=r
        )
        self.routed = Counter(
            "medforge_gateway_routed", "Requests by track: the canary's split.", ("track",), registry=r
        )
        self.routing = Gauge(
            "medforge_gateway_routing_info", "1 for the SHA-256 of the routing.json that was read.", ("digest",),
            registry=r,
        )  # fmt: skip
        self.routing_weight = Gauge(
            "medforge_gateway_routing_weight", "Share of callers who are given the candidate.", registry=r
        )
        self.routing_refused = Counter(
            "medforge_gateway_routing_refused", "Files routing.json that were not taken.", registry=r
        )
        self.tokens = Counter("medforge_gateway_tokens", "Tokens as the upstream counts them.", ("kind",), registry=r)
        self.decisions = Counter(
            "medforge_gateway_decisions", "Outcomes of /v1/diagnose.", ("task", "decision", "track"), registry=r
        )
        self.abstentions = Counter(
            "medforge_gateway_abstentions", "Abstentions by reason.", ("reason", "track"), registry=r
        )
        self.match_score = Histogram(
            "medforge_gateway_match_score", "Scores of region and text.", ("track",), buckets=SHARES, registry=r
        )
        self.confidence = Histogram(
            "medforge_gateway_confidence", "Confidence of answers.", ("track",), buckets=SHARES, registry=r
        )
        self.images = Counter(
            "medforge_gateway_images", "Images by format and outcome.", ("format", "outcome"), registry=r
        )
        self.drift = Gauge(
            "medforge_gateway_drift_psi",
            "Population stability index of what came lately against the release's reference.",
            ("feature",),
            registry=r,
        )
        self.drift_samples = Gauge(
            "medforge_gateway_drift_samples", "Observations that the index rests on.", ("feature",), registry=r
        )
        self.jobs = Gauge("medforge_gateway_job_items", "Items of jobs that wait or run.", ("status",), registry=r)
        self.feedback = Counter("medforge_gateway_feedback", "Readers' verdicts.", ("verdict",), registry=r)
        self.audit_rows = Counter("medforge_gateway_audit_rows", "Rows of the audit log.", registry=r)
        self.release = Gauge(
            "medforge_gateway_release_info", "1 for what is served.", ("track", "digest", "model"), registry=r
        )

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
