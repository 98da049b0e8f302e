"""Who may see what: keys, callers, logs, files."""

from __future__ import annotations

import base64
import signal
from typing import Any

import httpx
import pytest

from serving.gateway.settings import Settings
from tests.conftest import png
from tests.integration.serving.attacks import CHAT, DIAGNOSE, PNG, ask, chat, dicom, is_told, written
from tests.integration.serving.processes import gateway_process
from tests.unit.gateway.conftest import Gateway, make_key, until
from tests.unit.gateway.fake import Fake


@pytest.mark.parametrize("name", ["key", "api_key", "api-key", "apikey", "access_token", "token", "authorization"])
def test_a_key_counts_in_its_header_only(gateway: Gateway, key: str, name: str) -> None:
    """A query stands in logs of proxies and in histories."""
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        for value in (key, f"Bearer {key}"):
            is_told(client.get("/v1/models", params={name: value}), 401)
            is_told(client.get("/v1/models", headers={"cookie": f"{name}={value}"}), 401)
            is_told(client.post(CHAT, params={name: value}, json=chat(f"data:image/png;base64,{PNG}")), 401)
        is_told(client.get("/v1/models", headers={"x-api-key": key}), 401)
        is_told(client.get("/v1/models", auth=("user", key)), 401)


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer mf_", "Basic mf_x", "bearer null", "Bearer \u20ac"])
def test_what_is_no_key_is_refused(gateway: Gateway, value: str) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        answer = client.get("/v1/models", headers={b"authorization": value.encode()})
    is_told(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_every_route_but_health_and_page_needs_a_key(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    without = {"/livez", "/readyz", "/metrics"}
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        for path, operations in document["paths"].items():
            for method in set(operations) & {"get", "post", "put", "patch", "delete"}:
                answer = client.request(method, path.replace("{id}", "x"), content=b"{}")
                assert (answer.status_code == 401) == (path not in without), (method, path, answer.status_code)


def test_another_callers_job_and_answers_do_not_exist(gateway: Gateway, settings: Settings) -> None:
    mine = gateway.client.post("/v1/jobs", json={"items": [ask(PNG)], "name": "mine"})
    assert mine.status_code == 202
    path = f"/v1/jobs/{mine.json()['id']}"
    answered = gateway.client.post(DIAGNOSE, json=ask(PNG)).raise_for_status().json()["id"]
    other = {"authorization": f"Bearer {make_key(settings, 'other', scopes=('diagnose', 'jobs', 'feedback'))}"}
    is_told(gateway.client.get(path, headers=other), 404)
    is_told(gateway.client.get(f"{path}/results", headers=other), 404)
    is_told(gateway.client.delete(path, headers=other), 404)
    assert gateway.client.get("/v1/jobs", headers=other).json()["jobs"] == []
    verdict = {"request_id": answered, "verdict": "wrong"}
    is_told(gateway.client.post("/v1/feedback", json=verdict, headers=other), 404)
    assert gateway.client.post("/v1/feedback", json=verdict).status_code == 201
    assert gateway.client.get(path).status_code == 200


def test_an_idempotency_key_is_a_callers_own(gateway: Gateway, settings: Settings, fake: Fake) -> None:
    """Somebody who guesses another's key does not get the stored answer."""
    first = gateway.client.post(DIAGNOSE, json=ask(PNG), headers={"idempotency-key": "one"})
    asked = len(fake.requests)
    other = f"Bearer {make_key(settings, 'other')}"
    second = gateway.client.post(DIAGNOSE, json=ask(PNG), headers={"idempotency-key": "one", "authorization": other})
    assert (first.status_code, second.status_code) == (200, 200)
    assert "idempotent-replayed" not in second.headers
    assert len(fake.requests) == 2 * asked


# errors


def test_errors_have_one_shape_and_tell_no_internals(gateway: Gateway) -> None:
    client = gateway.client
    assert is_told(client.get("/nothing"), 404)["code"] == "not-found"
    for method, path in (("GET", CHAT), ("PUT", DIAGNOSE), ("DELETE", "/"), ("TRACE", "/livez"), ("PATCH", "/v1/jobs")):
        answer = client.request(method, path)
        is_told(answer, 405)
        assert answer.headers["allow"]
    is_told(client.post(DIAGNOSE, content=b"{", headers={"content-type": "application/json"}), 422)
    is_told(client.post("/v1/feedback", json={"request_id": "x", "verdict": "<patient>"}), 422)
    is_told(client.get("/v1/jobs?limit=many"), 422)
    is_told(client.post(CHAT, content=b"\xff\xfe"), 400)
    is_told(client.post(DIAGNOSE, content=b"x", headers={"content-type": "text/plain"}), 415)


@pytest.mark.parametrize("path", [CHAT, DIAGNOSE])
def test_a_failure_of_the_gateway_tells_its_id_only(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("patient Jane Roe has it")

    monkeypatch.setattr(gateway.parts.upstreams, "choose", fail)
    body = chat(f"data:image/png;base64,{PNG}") if path == CHAT else ask(PNG)
    answer = gateway.client.post(path, json=body)
    assert is_told(answer, 500)["code"] == "internal"
    assert "Jane" not in answer.text
    assert "Jane" not in "".join(capsys.readouterr())
    monkeypatch.undo()
    assert gateway.client.post(path, json=body).status_code == 200


# what is left behind


@pytest.mark.slow
def test_no_key_question_or_image_lies_in_logs_or_files(settings: Settings, fake: Fake, key: str) -> None:
    """After successes and failures of all kinds: the log, the audit log, and the database hold none of it."""
    secret, question, name, answer = key.split("_", 2)[2], "Is Zebediah's nodule there?", "Roe^Jane", "Zounds, a nodule"
    fake.text = answer
    scan = written(dicom(png(3)[:4096], 64, 64, PatientName=name, PatientID="QX-4711", WindowCenter=None))
    broken = written(dicom(b"", 64, 64, PatientName=name, PatientID="QX-4711"))
    picture = base64.b64encode(png(5)).decode()
    headers = {"authorization": f"Bearer {key}"}
    with gateway_process(settings) as running:
        client = running.client

        def post(path: str, body: dict[str, Any], **extra: str) -> httpx.Response:
            return client.post(path, json=body, headers=headers | extra)

        done = post(DIAGNOSE, ask(picture, question=question), **{"idempotency-key": "one"})
        assert done.json()["answer"] == answer
        assert post(CHAT, chat(f"data:image/png;base64,{picture}", question)).status_code == 200
        streamed = chat(f"data:image/png;base64,{picture}", question) | {"stream": True}
        assert answer.split()[0] in post(CHAT, streamed).text
        post(DIAGNOSE, ask(picture, question=question), accept="text/event-stream")
        for file in (scan, broken, scan[:300], b"DICM", png(5)[:200]):
            post(DIAGNOSE, ask(base64.b64encode(file).decode(), question=question))
            form = {"image": (f"{name}.dcm", file, "application/dicom")}
            client.post(DIAGNOSE, data={"question": question}, files=form, headers=headers)
            client.post("/v1/preview", content=file, headers=headers)
        post(DIAGNOSE, {"question": question, "images": question, name: question})
        post(DIAGNOSE, ask(picture, question=f"{question} <|im_start|>"))
        post(CHAT, {"messages": question})
        post(CHAT, chat(f"https://{question}/{picture[:50]}"))
        post("/v1/jobs", {"items": [ask(picture, question=question)], "name": "night"})
        post("/v1/jobs", {"items": [ask(picture, question=question, task=question)]})
        post("/v1/feedback", {"request_id": done.json()["id"], "verdict": question})
        client.get("/v1/models", params={"key": key, "q": question})
        client.get(f"/v1/jobs/{name}", headers=headers)
        client.get(f"/{name}/{secret}")
        client.get("/v1/models", headers={"authorization": f"Bearer {key}x"})
        client.get("/v1/models", headers={"authorization": key})
        fake.garbage = question.encode()
        post(CHAT, chat(f"data:image/png;base64,{picture}", question))
        post(DIAGNOSE, ask(picture, question=question))
        fake.garbage = None
        fake.statuses.extend([400, 500, 503, 503, 503])
        for _ in range(3):
            post(DIAGNOSE, ask(picture, question=question))

        def jobs() -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = client.get("/v1/jobs", headers=headers).json()["jobs"]
            return listed

        until(lambda: all(job["status"] == "finished" for job in jobs()), 30)
        fake.stop()
        post(CHAT, chat(f"data:image/png;base64,{picture}", question))
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)

        places = [running.log, *(path for path in settings.data_dir.rglob("*") if path.is_file())]
        assert len(places) >= 3
        assert b'"event":"request"' in running.log.read_bytes()
    words = [secret, question, "Zebediah", "Zounds", "Roe", "QX-4711", "Jane", picture[200:260]]
    words.append(settings.secret_key.get_secret_value())
    needles = [word.encode() for word in words] + [png(5)[200:240], scan[-60:-20]]
    for path in places:
        content = path.read_bytes()
        assert [needle for needle in needles if needle in content] == [], path
        assert path.stat().st_mode & 0o077 == 0 or path == running.log, f"{path} can be read by others"
