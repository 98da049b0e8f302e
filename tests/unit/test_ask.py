"""`medforge ask` against a scripted gateway: what is sent, what is printed, what a mistake says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from medforge.cli import main
from tests.conftest import png

ANSWER: dict[str, Any] = {
    "id": "r-1",
    "decision": "answered",
    "reason": None,
    "reason_text": None,
    "answer": "an X-ray",
    "finding": None,
    "regions": [{"label": "spot", "image": 0, "box": [0.1, 0.2, 0.3, 0.4], "pixels": [6, 9, 19, 19], "source": "head"}],
    "match": {"value": 0.914, "threshold": 0.5, "source": "head"},
    "confidence": {"value": 0.87, "threshold": 0.0, "source": "tokens"},
    "release": {"digest": "ab" * 32, "model": "medforge", "version": "eyes 1", "track": "stable"},
    "disclaimer": "Not for diagnostic use.",
}


class Scripted(HTTPServer):
    """Answers with `status` and `body`, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body = 200, json.dumps(ANSWER).encode()
        self.asked: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Scripted)
        data = self.rfile.read(int(self.headers["content-length"]))
        message = BytesParser(policy=HTTP).parsebytes(
            b"Content-Type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + data
        )
        fields: dict[str, list[bytes]] = {}
        for part in message.iter_parts():
            name, value = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
            assert isinstance(name, str) and isinstance(value, bytes)
            fields.setdefault(name, []).append(value)
        server.asked = {"path": self.path, "key": self.headers["authorization"], "fields": fields}
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def gateway() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "scan.png").write_bytes(png())
    return tmp_path / "scan.png"


def ask(gateway: Scripted, *words: str) -> int:
    return main(["ask", *words, "--url", f"http://127.0.0.1:{gateway.server_port}/"])


def test_a_question_and_its_answer(gateway: Scripted, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, str(image), "What is this?", "--key", "mf_1_2") == 0
    assert gateway.asked["path"] == "/v1/diagnose"
    assert gateway.asked["key"] == "Bearer mf_1_2"
    assert gateway.asked["fields"] == {
        "task": [b"ask"],
        "language": [b"en"],
        "question": [b"What is this?"],
        "image": [png()],
    }
    assert capsys.readouterr().out.splitlines() == [
        "an X-ray",
        "region:     image 0, pixels [6, 9, 19, 19] spot",
        "match:      0.91 (at least 0.50)",
        "confidence: 0.87 (at least 0.00)",
        "release:    abababababab eyes 1",
        "Not for diagnostic use.",
    ]


def test_a_finding_on_two_images(gateway: Scripted, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(image),
        str(image),
        "effusion",
        "--finding",
        "--language",
        "zh",
        "--frame",
        "3",
        "--key",
        "k",
        "--json",
    ]
    assert ask(gateway, *words) == 0
    fields = gateway.asked["fields"]
    assert (fields["task"], fields["finding"], fields["frame"]) == ([b"finding"], [b"effusion"], [b"3"])
    assert len(fields["image"]) == 2 and "question" not in fields
    assert json.loads(capsys.readouterr().out) == ANSWER


def test_an_abstention_is_said(gateway: Scripted, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ANSWER | {"decision": "abstained", "reason": "low-match", "reason_text": "They do not fit.", "answer": None}
    gateway.body = json.dumps(told).encode()
    assert ask(gateway, str(image), "What?", "--key", "k") == 0
    assert capsys.readouterr().out.startswith("abstained: They do not fit.\n")


def test_the_key_of_make_serve_is_found(
    gateway: Scripted, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEDFORGE_API_KEY", raising=False)
    assert ask(gateway, str(image), "What?", "--root", str(tmp_path)) == 1
    assert "no API key: give --key, set MEDFORGE_API_KEY" in capsys.readouterr().err
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "key").write_text("mf_9_9\n")
    assert ask(gateway, str(image), "What?", "--root", str(tmp_path)) == 0
    assert gateway.asked["key"] == "Bearer mf_9_9"


def test_mistakes_are_told_in_one_line(gateway: Scripted, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, str(image.with_name("none.png")), "What?", "--key", "k") == 1
    assert capsys.readouterr().err == f"medforge ask: {image.with_name('none.png')}: no such file\n"
    gateway.status = 401
    gateway.body = json.dumps({"error": {"code": "bad-key", "message": "unknown key", "request_id": "r-2"}}).encode()
    assert ask(gateway, str(image), "What?", "--key", "k") == 1
    assert capsys.readouterr().err == "medforge ask: 401 bad-key: unknown key (request r-2)\n"
    gateway.status, gateway.body = 200, b"<html>"
    assert ask(gateway, str(image), "What?", "--key", "k") == 1
    assert "with something that is no JSON" in capsys.readouterr().err
    assert main(["ask", str(image), "What?", "--key", "k", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer (" in capsys.readouterr().err
    assert ask(gateway, str(image), "x", "--finding", "--locate", "--key", "k") == 1
    assert "exclude each other" in capsys.readouterr().err
