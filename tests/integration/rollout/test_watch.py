"""A real Prometheus with a rule that fires: the canary is rolled back, by its alert's name; and when nobody knows."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medforge.rollout.watch import CanaryError, Patience, Prometheus
from tests.integration.rollout.cluster import NAMESPACE
from tests.integration.rollout.conftest import Site
from tests.unit.gateway.conftest import until

SELECTOR = '{track="candidate"}'
RULES = {
    "groups": [
        {
            "name": "canary",
            "interval": "1s",
            "rules": [
                {
                    "alert": "MedForgeCanaryErrors",
                    "expr": f"max by (namespace, service) (test_canary_errors{SELECTOR}) > 0.05",
                    "labels": {"severity": "critical", "rollback": "true"},
                    "annotations": {"summary": "errors of the canary in {{ $labels.namespace }}"},
                }
            ],
        }
    ]
}


class Scraped:
    """What a gateway would tell: requests of the candidate, a few more at each scrape, and its share of errors."""

    def __init__(self) -> None:
        self.errors, self.requests, self.step = 0.0, 0, 10
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.requests += told.step
                text = (
                    "# TYPE medforge_gateway_routed_total counter\n"
                    f"medforge_gateway_routed_total{SELECTOR} {told.requests}\n"
                    f"# TYPE test_canary_errors gauge\ntest_canary_errors{SELECTOR} {told.errors}\n"
                )
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    made = Scraped()
    yield made
    made.close()


@pytest.fixture
def prometheus(scraped: Scraped, tmp_path: Path) -> Iterator[tuple[Prometheus, subprocess.Popen[bytes]]]:
    """A Prometheus with the rule, that scrapes every second; and its process."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    labels = {"namespace": NAMESPACE, "service": "medforge-gateway"}  # as the chart's ServiceMonitor gives them
    job = {"job_name": "gateway", "static_configs": [{"targets": [scraped.target], "labels": labels}]}
    times = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    rules, config = tmp_path / "rules.yml", tmp_path / "prometheus.yml"
    rules.write_text(json.dumps(RULES))
    config.write_text(json.dumps({"global": times, "rule_files": [str(rules)], "scrape_configs": [job]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = {"config.file": config, "storage.tsdb.path": tmp_path / "tsdb", "web.listen-address": address}
    command = [program, *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        client = Prometheus(f"http://{address}")

        def is_evaluated() -> bool:
            assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
            try:
                return [rule["health"] for rule in client.rules()] == ["ok"] and client.number("up") == 1
            except ValueError:
                return False

        until(is_evaluated, 60)
        yield client, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def canary(site: Site) -> str:
    """A canary that some callers are given; time is the clock's, and looks are real."""
    old, new = site.publish(0.7), site.publish(0.8)
    site.cluster.install(old, site.bucket)
    site.rollout().deploy(new, 0.1)
    return new


def test_a_canary_is_watched_promoted_and_the_next_rolled_back(
    site: Site, canary: str, scraped: Scraped, prometheus: tuple[Prometheus, subprocess.Popen[bytes]]
) -> None:
    client, process = prometheus
    site.clock.then = lambda: time.sleep(0.2)
    short = Patience(seconds=3, most_seconds=30, least_requests=20, tries=3, every=0.2)

    seen = site.rollout(settle_seconds=0).watch(client, short)
    assert seen["requests"] >= 20 and seen["seconds"] >= 3
    assert site.rollout(settle_seconds=0).promote() == canary

    bad = site.publish(0.9)
    site.rollout().deploy(bad, 0.5)
    scraped.errors = 0.5
    with pytest.raises(CanaryError, match=f"alert MedForgeCanaryErrors: errors of the canary in {NAMESPACE}"):
        site.rollout(settle_seconds=0).watch(client, Patience(60, 60, 20, 3, 0.2))
    assert site.cluster.release("medforge-canary") is None
    assert (site.cluster.routing["candidate"], site.cluster.routing["weight"]) == (None, 0)
    assert site.cluster.release("medforge-stable") == canary  # only the canary goes
    with pytest.raises(CanaryError, match="was rolled back: alert MedForgeCanaryErrors"):
        site.rollout(settle_seconds=0).watch(client, short)  # a step that is tried again says the same
    last = site.rollout().status()["log"][-1]
    assert (last["event"], last["release"]) == ("rolled-back", bad)
    assert "MedForgeCanaryErrors" in last["detail"]["reason"]

    scraped.errors = 0.0
    until(lambda: not client.alerts(), 20)
    third = site.publish(0.95)
    site.rollout().deploy(third, 0.5)
    process.kill()
    process.wait()
    with pytest.raises(CanaryError, match=r"what the canary does is not known: .*/rules does not answer"):
        site.rollout(settle_seconds=0).watch(client, Patience(60, 60, 20, 3, 0.1))
    assert site.cluster.release("medforge-canary") is None
