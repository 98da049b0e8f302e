"""/v1/chat/completions and /v1/models through a running gateway."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.gateway.settings import Settings
from tests.conftest import png
from tests.unit.gateway.chatting import PATH, body, data_uri
from tests.unit.gateway.conftest import Gateway, Serve, make_key, until
from tests.unit.gateway.fake import RELEASE, Fake


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "grey").save(stream, "JPEG")
    return stream.getvalue()


def audit_rows(gateway: Gateway) -> list[dict[str, Any]]:
    folder = gateway.parts.settings.data_dir / "audit"
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_the_bytes_go_on_and_come_back_as_they_are(gateway: Gateway, fake: Fake) -> None:
    sent = json.dumps(body(data_uri(png())), indent=3).encode()  # a layout of its own
    answer = gateway.client.post(PATH, content=sent)
    assert answer.status_code == 200
    assert fake.bodies == [sent]
    assert answer.json()["choices"][0]["message"]["content"] == "no"
    headers = answer.headers
    assert headers["x-medforge-release"] == RELEASE
    assert headers["x-medforge-track"] == "stable"
    assert headers["x-medforge-notice"] == "not for diagnostic use without review"
    assert fake.headers[0]["x-request-id"] == headers["x-request-id"]
    assert "authorization" not in fake.headers[0]  # the caller's key stays here
    row = audit_rows(gateway)[-1]
    assert row["inputs"] == hashlib.sha256(sent).hexdigest()
    assert row["outputs"] == hashlib.sha256(answer.content).hexdigest()
    assert (row["status"], row["release"], row["route"]) == (200, RELEASE, PATH)
    assert gateway.metric("medforge_gateway_tokens_total", kind="prompt") == 10
    assert gateway.metric("medforge_gateway_tokens_total", kind="completion") == 1


def test_a_stream_comes_as_it_is_written(gateway: Gateway, fake: Fake) -> None:
    fake.text, fake.token_seconds = "one two three four", 0.15
    asked = body(data_uri(jpeg(), "jpeg"), stream=True, stream_options={"include_usage": True})
    times, pieces = [], []
    with gateway.client.stream("POST", PATH, json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-medforge-release"] == RELEASE
        for piece in answer.iter_raw():
            times.append(time.monotonic())
            pieces.append(piece)
    assert times[-1] - times[0] > 0.3  # it was not kept back
    events = [line[6:] for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    texts = [choice["delta"].get("content", "") for one in events[:-1] for choice in json.loads(one)["choices"]]
    assert "".join(texts) == fake.text
    assert audit_rows(gateway)[-1]["outputs"] == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert gateway.metric("medforge_gateway_tokens_total", kind="completion") == 4


def test_another_models_name_is_replaced(gateway: Gateway, fake: Fake) -> None:
    for name in ("gpt-4o", None):
        asked = body(model=name) if name else {k: v for k, v in body().items() if k != "model"}
        assert gateway.client.post(PATH, json=asked | {"x_extra": [1, {"y": "é"}]}).status_code == 200
        assert fake.requests[-1] == asked | {"model": "medforge", "x_extra": [1, {"y": "é"}]}


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://169.254.169.254/latest/meta-data", "image-url-refused"),
        ("https://169.254.169.254/", "image-url-refused"),
        ("file:///etc/passwd", "image-url-refused"),
        ("HTTPS://images.example/x.png", "image-url-refused"),
        ("", "image-url-refused"),
        ("//images.example/x.png", "image-url-refused"),
        ("data:text/html;base64,PGI+", "image-unsupported"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "image-unsupported"),
        ("data:image/png,abc", "image-unsupported"),
        ("data:image/png;base64", "image-unsupported"),
        ("data:image/png;base64,%%%", "image-invalid"),
        ("data:image/png;base64,", "image-invalid"),
        ("data:image/png;base64," + base64.b64encode(jpeg()).decode(), "image-invalid"),
        ("data:image/jpeg;base64," + base64.b64encode(jpeg()[:10]).decode(), "image-invalid"),
    ],
)
def test_an_image_that_may_not_go_on_is_refused(gateway: Gateway, fake: Fake, url: str, code: str) -> None:
    answer = gateway.client.post(PATH, json=body(url))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert answer.json()["error"]["param"] == "messages.0.content.0.image_url.url"
    assert fake.requests == []


def test_limits_of_images(serve: Serve, settings: Settings, fake: Fake) -> None:
    few = settings.model_copy(update={"max_images": 2, "max_pixels": 64 * 48, "max_image_bytes": 20_000})
    with serve(few) as gateway:
        image = data_uri(png())  # 64 × 48
        assert gateway.client.post(PATH, json=body(image, image)).status_code == 200
        for urls, status, code in (
            ((image,) * 3, 400, "images-too-many"),
            ((data_uri(png(width=65)),), 413, "image-too-large"),
            ((data_uri(png(width=200, height=200)),), 413, "image-too-large"),
        ):
            answer = gateway.client.post(PATH, json=body(*urls))
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff", b"{}", b'{"messages": []}', b'{"messages": {}}',
     b'{"messages": [{"role": "user", "content": 3}]}', b'{"messages": [{"content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}', b"[" * 100_000,
     b'{"messages": [{"role": "u", "content": "x"}], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
)  # fmt: skip
def test_what_is_no_request_is_refused(gateway: Gateway, fake: Fake, sent: bytes) -> None:
    answer = gateway.client.post(PATH, content=sent)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"code", "type", "message", "param", "request_id"}
    assert fake.requests == []


def test_an_upstreams_refusal_is_passed_on(gateway: Gateway, fake: Fake) -> None:
    fake.statuses.append(400)
    answer = gateway.client.post(PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "scripted failure")
    assert audit_rows(gateway)[-1]["status"] == 400


def test_garbage_of_an_upstream_is_502(gateway: Gateway, fake: Fake) -> None:
    for garbage in (b"<html>oops</html>", b"", b"\xff"):
        fake.garbage = garbage
        answer = gateway.client.post(PATH, json=body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream-garbage")
        assert b"oops" not in answer.content


def test_a_stream_that_breaks_off_says_so_and_never_looks_whole(gateway: Gateway, fake: Fake) -> None:
    fake.text, fake.hang_up_after = "one two three", 2
    got = b""
    with (
        pytest.raises(httpx.RemoteProtocolError),
        gateway.client.stream("POST", PATH, json=body(stream=True)) as answer,
    ):
        for piece in answer.iter_raw():
            got += piece
    last = json.loads(got.rstrip().split(b"\n")[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "upstream-error"
    assert b"[DONE]" not in got
    until(lambda: audit_rows(gateway)[-1]["status"] == 502)


def test_a_client_that_hangs_up_cancels_the_upstreams_work(gateway: Gateway, fake: Fake) -> None:
    fake.text, fake.token_seconds = "a " * 500, 0.02
    with gateway.client.stream("POST", PATH, json=body(stream=True)) as answer:
        next(answer.iter_raw())
    until(lambda: fake.cancelled == 1)
    fake.token_seconds, fake.first_byte_seconds = 0, 5
    with pytest.raises(httpx.ReadTimeout):  # before the first byte, too
        gateway.client.post(PATH, json=body(), timeout=0.3)
    until(lambda: fake.cancelled == 2)
    until(lambda: fake.open == 0)
    until(lambda: [row["status"] for row in audit_rows(gateway)] == [499, 499])
    until(lambda: gateway.metric("medforge_gateway_in_flight") == 0)


def test_a_client_that_hangs_up_in_the_queue_is_never_asked_for(serve: Serve, settings: Settings, fake: Fake) -> None:
    fake.first_byte_seconds = 1.0
    with serve(settings.model_copy(update={"concurrency": 1})) as gateway:
        first = threading.Thread(target=lambda: gateway.client.post(PATH, json=body()))
        first.start()
        until(lambda: fake.open == 1)
        with pytest.raises(httpx.ReadTimeout):
            gateway.client.post(PATH, json=body(), timeout=0.2)
        first.join()
        time.sleep(0.2)
        assert len(fake.requests) == 1


def test_an_answer_without_a_row_of_audit_is_not_given(gateway: Gateway, fake: Fake, monkeypatch: Any) -> None:
    async def fail(_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(gateway.parts.audit, "write", fail)
    answer = gateway.client.post(PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit-unavailable")
    got = b""
    with pytest.raises(httpx.RemoteProtocolError), gateway.client.stream("POST", PATH, json=body(stream=True)) as cut:
        for piece in cut.iter_raw():
            got += piece
    assert b"[DONE]" not in got


def test_overload_gives_nothing_but_answers_and_refusals(serve: Serve, settings: Settings, fake: Fake) -> None:
    fake.first_byte_seconds = 0.05
    small = settings.model_copy(update={"concurrency": 4, "queue": 8, "queue_seconds": 0.5})
    image = data_uri(png(width=256, height=256))
    sent = json.dumps(body(image)).encode()
    statuses: list[int] = []
    with serve(small) as gateway:
        headers = dict(gateway.client.headers)

        def ask() -> None:
            with httpx.Client(base_url=gateway.url, headers=headers, timeout=30, trust_env=False) as client:
                for _ in range(4):
                    answer = client.post(PATH, content=sent)
                    statuses.append(answer.status_code)
                    assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == 160
        assert set(statuses) <= {200, 503}
        assert statuses.count(200) >= 12
        assert statuses.count(503) >= 1
        assert fake.most_open <= 4
        until(lambda: gateway.metric("medforge_gateway_in_flight") == 0)
        assert gateway.metric("medforge_gateway_queued") == 0
        assert gateway.client.post(PATH, content=sent).status_code == 200


def test_the_rate_of_a_client_is_told_and_kept(serve: Serve, settings: Settings, fake: Fake) -> None:
    with serve(settings) as gateway:
        text = make_key(settings, "slow", rate="2/hour")
        headers = {"authorization": f"Bearer {text}"}
        answers = [gateway.client.post(PATH, json=body(), headers=headers) for _ in range(3)]
        assert [one.status_code for one in answers] == [200, 200, 429]
        assert [one.headers.get("x-ratelimit-remaining") for one in answers] == ["1", "0", None]
        assert int(answers[2].headers["retry-after"]) >= 1
        assert len(fake.requests) == 2


def test_who_may_chat(serve: Serve, settings: Settings, fake: Fake) -> None:
    with serve(settings) as gateway:
        text = make_key(settings, "other", scopes=("diagnose",))
        for header, status in ((f"Bearer {text}", 403), ("Bearer mf_wrong", 401), ("", 401)):
            answer = gateway.client.post(PATH, json=body(), headers={"authorization": header})
            assert answer.status_code == status
        assert fake.requests == []


def test_the_callers_own_deadline(gateway: Gateway, fake: Fake) -> None:
    fake.first_byte_seconds = 3
    began = time.monotonic()
    answer = gateway.client.post(PATH, json=body(), headers={"x-request-timeout": "0.3"})
    assert answer.status_code == 504
    assert time.monotonic() - began < 2
    assert float(fake.headers[0]["x-request-timeout"]) <= 0.3
    for wrong in ("0", "-1", "soon", "nan"):
        answer = gateway.client.post(PATH, json=body(), headers={"x-request-timeout": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")


def test_the_candidate_gives_way_to_stable(serve: Serve, settings: Settings, fake: Fake) -> None:
    other = Fake(release="c" * 64)
    try:
        with serve(settings.model_copy(update={"candidate": other.url, "candidate_weight": 1.0})) as gateway:
            answer = gateway.client.post(PATH, json=body())
            assert answer.headers["x-medforge-track"] == "candidate"
            assert answer.headers["x-medforge-release"] == "c" * 64
            other.statuses.append(500)
            answer = gateway.client.post(PATH, json=body())
            assert (answer.status_code, answer.headers["x-medforge-track"]) == (200, "stable")
            assert answer.headers["x-medforge-release"] == RELEASE
            other.stop()
            answer = gateway.client.post(PATH, json=body())
            assert (answer.status_code, answer.headers["x-medforge-track"]) == (200, "stable")
    finally:
        other.close()


def test_models(gateway: Gateway) -> None:
    answer = gateway.client.get("/v1/models")
    assert answer.json() == {
        "object": "list",
        "data": [{"id": "medforge", "object": "model", "created": 0, "owned_by": "medforge"}],
    }
    assert gateway.client.get("/v1/models", headers={"authorization": ""}).status_code == 401


def test_only_post(gateway: Gateway) -> None:
    answer = gateway.client.get(PATH)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
