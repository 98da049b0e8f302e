"""The script of `helm test`, against a gateway's answers."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serving.gateway.api import DiagnoseRequest
from tests.unit.chart.rendering import CHART


@contextmanager
def gateway(ready: int, answer: dict[str, Any], asked: list[dict[str, Any]]) -> Iterator[str]:
    """A server that answers as a gateway does; notes the questions."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(ready, {"ready": ready == 200})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append({"path": self.path, "key": self.headers["authorization"], "body": json.loads(body)})
            self._answer(200, answer)

        def _answer(self, status: int, document: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(url: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """The script, as its pod runs it, but for the pauses."""
    script = (
        "import runpy, time; time.sleep = lambda _: None; "
        f"runpy.run_path({str(CHART / 'files' / 'ask.py')!r}, run_name='__main__')"
    )
    environment = os.environ | {"MEDFORGE_URL": url, "MEDFORGE_API_KEY": key}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def test_it_asks_a_question_that_the_gateway_takes() -> None:
    asked: list[dict[str, Any]] = []
    with gateway(200, {"decision": "abstained"}, asked) as url:
        ended = run(url, "mf_key")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [(one["path"], one["key"]) for one in asked] == [("/v1/diagnose", "Bearer mf_key")]
    taken = DiagnoseRequest.model_validate(asked[0]["body"])
    assert taken.question == "What is shown?"
    assert base64.b64decode(asked[0]["body"]["images"][0]["data"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ready", "answer", "key", "status"),
    [(503, {}, "", 1), (200, {}, "", 0), (200, {"decision": "answered"}, "k", 0), (200, {"error": {}}, "k", 1)],
)
def test_it_fails_when_the_gateway_does(ready: int, answer: dict[str, Any], key: str, status: int) -> None:
    asked: list[dict[str, Any]] = []
    with gateway(ready, answer, asked) as url:
        ended = run(url, key)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert len(asked) == (ready == 200 and key != "")
    assert ("no question was asked" in ended.stdout) == (ready == 200 and not key)


def test_it_fails_where_nobody_answers() -> None:
    assert run("http://127.0.0.1:9").returncode == 1
