"""The predictor's Prometheus metrics, beside KServe's own, whose histograms end at ten seconds."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

# a model's answers take from a blink to two minutes
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All metrics in `registry`: by default the one that KServe's /metrics shows. No question or image is a label."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.queue_length = Gauge(
            "medforge_predictor_queue_length", "Requests that wait for a batch.", registry=registry
        )
        self.queue_seconds = Histogram(
            "medforge_predictor_queue_seconds", "Waiting for a batch.", buckets=SHORT, registry=registry
        )
        self.batch_size = Histogram(
            "medforge_predictor_batch_size", "Requests of a batch.", buckets=SIZES, registry=registry
        )
        self.batch_limit = Gauge(
            "medforge_predictor_batch_limit", "Most requests of a batch; halved when memory ran out.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "medforge_predictor_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "medforge_predictor_request_seconds", "From a request's arrival to its end.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.tokens = Counter("medforge_predictor_tokens", "Tokens in and out.", ("kind",), registry=registry)
        self.requests = Counter("medforge_predictor_requests", "Requests answered to their end.", registry=registry)
        self.failures = Counter("medforge_predictor_failures", "Requests that failed.", ("reason",), registry=registry)
        self.cancelled = Counter("medforge_predictor_cancelled", "Requests whose client went away.", registry=registry)
        self.release = Gauge(
            "medforge_predictor_release_info", "1 for the release that is served.",
            ("digest", "model", "version", "family", "status"), registry=registry,
        )  # fmt: skip

    def watch_memory(self, allocated: Callable[[], float]) -> None:
        """Show the device's memory in use, in bytes, as `allocated` tells it when the metrics are read."""
        gauge = Gauge(
            "medforge_predictor_device_memory_bytes", "Memory that tensors take on the GPU.", registry=self.registry
        )
        gauge.set_function(allocated)
