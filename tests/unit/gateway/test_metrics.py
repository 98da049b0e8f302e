"""Counters and histograms that keep their children count what prometheus_client's own do."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from serving.gateway import metrics


def test_children_are_kept_and_count_as_the_librarys() -> None:
    texts = []
    for counter, histogram in (
        (metrics.Counter, metrics.Histogram),
        (prometheus_client.Counter, prometheus_client.Histogram),
    ):
        registry = CollectorRegistry()
        requests = counter("requests", "Requests.", ("route", "status"), registry=registry)
        seconds = histogram("seconds", "Seconds.", ("route",), buckets=(1, 2), registry=registry)
        for route, status in (("a", "200"), ("a", "503"), ("b", "200"), ("a", "200")):
            requests.labels(route, status).inc()
            requests.labels(status=status, route=route).inc()
            seconds.labels(route).observe(1.5)
        texts.append([line for line in generate_latest(registry).decode().splitlines() if "_created" not in line])
    ours, theirs = texts
    assert ours == theirs and 'requests_total{route="a",status="200"} 4.0' in ours
    kept = metrics.Counter("kept", "Kept.", ("route",), registry=None)
    assert kept.labels("a") is kept.labels("a") is not kept.labels("b")
