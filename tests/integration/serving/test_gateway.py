"""The gateway as a process of its own, and OpenAI's client against it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.gateway.settings import PREFIX, Settings
from tests.conftest import png
from tests.unit.gateway.chatting import PATH, body, data_uri
from tests.unit.gateway.conftest import SECRET, Gateway, until
from tests.unit.gateway.fake import RELEASE, Fake

ROOT = Path(__file__).resolve().parents[3]


def environment(**values: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return kept | {"PYTHONPATH": str(ROOT)} | {PREFIX + name: value for name, value in values.items()}


class Process:
    """A running gateway: its address and what it said."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen, self.lines = popen, list[dict[str, Any]]()
        threading.Thread(target=self._read, daemon=True).start()

        def listening() -> bool:
            assert popen.poll() is None, self.lines
            return any(line["event"] == "listening" for line in self.lines)

        until(listening, 60)
        self.url = f"http://127.0.0.1:{next(line['port'] for line in self.lines if line['event'] == 'listening')}"

    def _read(self) -> None:
        assert self.popen.stdout
        for line in self.popen.stdout:
            self.lines.append(json.loads(line))  # every line is JSON


@contextmanager
def running(folder: Path, fake: Fake, **values: str) -> Iterator[Process]:
    default = {"STABLE": fake.url, "PORT": "0", "DATA_DIR": str(folder / "gateway"), "SECRET_KEY": SECRET}
    popen = subprocess.Popen(
        [sys.executable, "-m", "serving.gateway"], stdout=subprocess.PIPE, text=True, cwd=folder,
        env=environment(**(default | values)),
    )  # fmt: skip
    try:
        yield Process(popen)
    finally:
        popen.kill()
        popen.wait(10)


@pytest.fixture
def client(key: str) -> Iterator[httpx.Client]:
    with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False) as made:
        yield made


def test_openais_client_works_unchanged(gateway: Gateway, fake: Fake, key: str) -> None:
    openai = pytest.importorskip("openai")
    fake.text = "no effusion is seen"
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        messages: Any = body(data_uri(png()))["messages"]
        answer = client.chat.completions.create(model="medforge", messages=messages, max_tokens=16)
        assert answer.choices[0].message.content == fake.text
        assert answer.usage.completion_tokens == 4
        raw = client.chat.completions.with_raw_response.create(model="medforge", messages=messages)
        assert raw.headers["x-medforge-release"] == RELEASE
        stream = client.chat.completions.create(
            model="medforge", messages=messages, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        chunks = list(stream)
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(texts) == fake.text
        assert chunks[-1].usage.total_tokens == 14
        assert [model.id for model in client.models.list()] == ["medforge"]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="m", messages=body("https://x.example/a.png")["messages"])
        assert refused.value.code == "image-url-refused"
        fake.hang_up_after = 2
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(model="medforge", messages=messages, stream=True))
    stranger = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="mf_wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_help_lists_every_setting() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "serving.gateway", "--help"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    for name, field in Settings.model_fields.items():
        assert PREFIX + name.upper() in ended.stdout
        if field.description:
            assert field.description in ended.stdout
    assert "change-this" not in ended.stdout


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ENVIRONMENT": "production"}, f"{PREFIX}SECRET_KEY"),
        ({"ENVIRONMENT": "production", "SECRET_KEY": "hunter2"}, f"{PREFIX}SECRET_KEY"),
        ({"ENVIRONMENT": "production", "SECRET_KEY": "x" * 32, "AUTHENTICATION": "false"}, f"{PREFIX}AUTHENTICATION"),
        ({"CONCURENCY": "3"}, f"{PREFIX}CONCURENCY"),
        ({"CONCURRENCY": "many"}, f"{PREFIX}CONCURRENCY"),
    ],
)
def test_it_refuses_to_begin_in_one_line(tmp_path: Path, values: dict[str, str], told: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "serving.gateway"], capture_output=True, text=True, timeout=60, check=False,
        env=environment(**values), cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 1
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert "hunter2" not in ended.stderr + ended.stdout


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"DATABASE": "sqlite:///{folder}"}, "database: {folder} is a folder; name a file"),
        ({"DATABASE": "sqlite:///{folder}/text"}, "text cannot be used: file is not a database; "),
        ({"DATABASE": "sqlite:///{folder}/text/gateway.db"}, "database: {folder}/text: File exists; name a file in"),
        ({"DATABASE": "postgresql://somebody:hunter2@127.0.0.1:1/medforge"}, "Connection refused"),
        ({"DATABASE": "gateway.db"}, "database: is no SQLAlchemy URL"),
        ({"DATA_DIR": "{folder}/text"}, "data_dir: {folder}/text: File exists; name a folder"),
        ({"REFERENCE": "{folder}/nowhere.json"}, "{folder}/nowhere.json"),
        ({"REFERENCE": "{folder}/text"}, "{folder}/text"),
        ({"PORT": "{taken}"}, "address already in use"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value[-24:],
)
def test_what_it_cannot_begin_with_is_told_in_one_line(tmp_path: Path, values: dict[str, str], told: str) -> None:
    (tmp_path / "text").write_text("of another program " * 50)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"folder": tmp_path, "taken": taken.getsockname()[1]}
        given = {"PORT": "0", "DATA_DIR": str(tmp_path / "gateway"), "SECRET_KEY": SECRET} | values
        ended = subprocess.run(
            [sys.executable, "-m", "serving.gateway"], capture_output=True, text=True, timeout=60, check=False,
            env=environment(STABLE="http://127.0.0.1:1/v1", **{k: v.format_map(names) for k, v in given.items()}),
            cwd=tmp_path,
        )  # fmt: skip
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    (line,) = [one["message"] for one in lines if told.format_map(names) in one.get("message", "")]
    assert "\n" not in line
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "hunter2" not in ended.stdout + ended.stderr


def test_sigterm_lets_what_is_open_finish(tmp_path: Path, fake: Fake, key: str, client: httpx.Client) -> None:
    fake.text, fake.token_seconds = "one two three four five", 0.5
    with running(tmp_path, fake) as process:
        outcome: list[httpx.Response] = []

        def ask() -> None:
            headers = {"authorization": f"Bearer {key}"}
            outcome.append(httpx.post(process.url + PATH, json=body(stream=True), headers=headers, trust_env=False))

        assert client.get(f"{process.url}/readyz").status_code == 200
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: fake.open == 1)
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: client.get(f"{process.url}/readyz").status_code == 503, 2)
        refused = client.post(process.url + PATH, json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert "retry-after" in refused.headers
        asking.join(20)
        assert outcome[0].status_code == 200
        assert outcome[0].text.endswith("data: [DONE]\n\n")
        assert process.popen.wait(10) == 0
        assert len(fake.requests) == 1


def test_draining_has_an_end(tmp_path: Path, fake: Fake, key: str) -> None:
    fake.first_byte_seconds = 60
    with running(tmp_path, fake, DRAIN_SECONDS="1") as process:

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                httpx.post(process.url + PATH, json=body(), headers={"authorization": f"Bearer {key}"}, trust_env=False,
                           timeout=30).raise_for_status()  # fmt: skip

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: fake.open == 1)
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(15) == 0
        assert time.monotonic() - began < 10
        asking.join(10)
        until(lambda: fake.open == 0)


def test_a_kill_loses_no_row_of_the_audit_log(tmp_path: Path, fake: Fake, client: httpx.Client) -> None:
    from medforge.audit import verify

    with running(tmp_path, fake) as process:
        for _ in range(5):
            assert client.post(process.url + PATH, json=body()).status_code == 200
        process.popen.kill()
        process.popen.wait(10)
    with running(tmp_path, fake) as process:
        assert client.post(process.url + PATH, json=body()).status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(15) == 0
    assert verify(tmp_path / "gateway" / "audit")[0] == 6


def test_its_log_holds_nothing_of_a_patient(tmp_path: Path, fake: Fake, client: httpx.Client) -> None:
    fake.text = "SECRET-ANSWER"
    with running(tmp_path, fake, LOG_LEVEL="DEBUG") as process:
        asked = body(data_uri(png()))
        asked["messages"][0]["content"][-1]["text"] = "SECRET-QUESTION"
        assert client.post(f"{process.url}{PATH}?q=SECRET-QUERY", json=asked).status_code == 200
        client.get(f"{process.url}/SECRET-PATH")
        client.post(process.url + PATH, content=b'{"messages": "SECRET-GARBAGE"}')
        until(lambda: sum(line["event"] == "request" for line in process.lines) == 3)
        assert "SECRET" not in json.dumps(process.lines)
        for path in (tmp_path / "gateway").rglob("*"):
            if path.is_file():
                assert b"SECRET" not in path.read_bytes(), path


def test_ten_times_the_load_and_a_predictor_that_dies_under_it(
    tmp_path: Path, fake: Fake, key: str, client: httpx.Client
) -> None:
    """Answers and refusals only; memory bounded by the places, not by those who ask; all is well again afterwards."""
    psutil = pytest.importorskip("psutil")
    fake.first_byte_seconds = 0.05
    sent = json.dumps(body(data_uri(png(width=400, height=400)))).encode()  # about 640 KB
    values = {
        "CONCURRENCY": "4",
        "QUEUE": "8",
        "QUEUE_SECONDS": "1",
        "RATE": "1000000/minute",
        "BREAKER_SECONDS": "0.5",
    }
    seen: list[tuple[int, bool]] = []
    dying = threading.Event()
    stop = threading.Event()
    with running(tmp_path, fake, **values, QUOTA="1000000/day") as process:

        def ask() -> None:
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=process.url, headers=headers, timeout=30, trust_env=False) as own:
                while not stop.is_set():
                    before = dying.is_set()
                    answer = own.post(PATH, content=sent)
                    seen.append((answer.status_code, before or dying.is_set()))
                    assert answer.status_code == 200 or "error" in answer.json()

        assert client.post(process.url + PATH, content=sent).status_code == 200
        memory = psutil.Process(process.popen.pid).memory_info
        at_first, most = memory().rss, 0
        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        enough, end = 2 * 350e6 / len(sent), time.monotonic() + 60  # requests that show that memory is bounded
        for tenth in itertools.count():
            if tenth == 20:
                dying.set()
                fake.stop()
            if tenth == 35:
                fake.start()
            most = max(most, memory().rss)
            time.sleep(0.1)
            if tenth >= 60 and (len(seen) > enough or time.monotonic() > end):
                break
        stop.set()
        for thread in threads:
            thread.join(30)
        assert {status for status, after in seen if not after} <= {200, 429, 503}
        assert {status for status, _ in seen} <= {200, 429, 502, 503}
        assert sum(status == 200 for status, _ in seen) > 20
        assert any(status == 503 for status, _ in seen)
        # 40 bodies, a few copies of each on its way, and what the allocator keeps of them; several thousand were sent
        assert most - at_first < 350e6, f"{(most - at_first) / 1e6:.0f} MB more"
        assert len(seen) > enough, f"only {len(seen)} requests in a minute: too few to show that memory is bounded"

        def well() -> bool:
            return client.post(process.url + PATH, content=sent).status_code == 200

        until(well)
        text = client.get(f"{process.url}/metrics").text
        assert "medforge_gateway_in_flight 0.0" in text
        assert "medforge_gateway_queued 0.0" in text
