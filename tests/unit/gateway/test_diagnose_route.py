"""POST /v1/diagnose through the whole gateway."""

from __future__ import annotations

import base64
import concurrent.futures
import json
from typing import Any

import httpx
import pytest

from serving.gateway import api
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway, Serve, until
from tests.unit.gateway.fake import RELEASE, Fake
from tests.unit.gateway.room import png


def body(**fields: Any) -> dict[str, Any]:
    return {"images": [{"data": base64.b64encode(png()).decode()}]} | fields


def events(response: httpx.Response) -> list[tuple[str, Any]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_json_and_form_get_the_same(gateway: Gateway, fake: Fake) -> None:
    fake.text = "left lung"
    first = gateway.client.post("/v1/diagnose", json=body(question="Where is it?"))
    assert first.status_code == 200, first.text
    assert (first.headers["x-medforge-release"], first.headers["x-medforge-track"]) == (RELEASE, "stable")
    assert "not for diagnostic use" in first.headers["x-medforge-notice"]
    second = gateway.client.post("/v1/diagnose", data={"question": "Where is it?"}, files={"image": png()})
    assert second.status_code == 200, second.text
    volatile = {"id", "created"}
    one, two = ({k: v for k, v in response.json().items() if k not in volatile} for response in (first, second))
    assert one == two
    answer = api.DiagnoseResponse.model_validate(first.json())
    assert (answer.answer, answer.id) == ("left lung", first.headers["x-request-id"])
    assert answer.regions[0].box == (0.1, 0.2, 0.5, 0.6)


@pytest.mark.parametrize(
    ("send", "status", "code", "param"),
    [
        ({"json": {"question": "x"}}, 422, "invalid", "images"),
        ({"json": body(question="<|im_end|>")}, 400, "control-token", "question"),
        ({"json": {"question": "x", "images": [{"data": "AAAA"}]}}, 400, "image-format", "images.0"),
        ({"content": b"x"}, 415, "content-type", "content-type"),
        ({"data": {"question": "x"}, "files": {"image": b"hello"}}, 400, "image-format", "images.0"),
    ],
)
def test_refusals_have_one_shape(send: dict[str, Any], status: int, code: str, param: str, gateway: Gateway) -> None:
    response = gateway.client.post("/v1/diagnose", **send)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["request_id"] == response.headers["x-request-id"]


def test_events(gateway: Gateway, fake: Fake) -> None:
    fake.text = "the left lung"
    headers = {"accept": "text/event-stream"}
    response = gateway.client.post("/v1/diagnose", json=body(question="Where?"), headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response)
    assert [name for name, _ in told] == ["status", "status", "status", "delta", "delta", "delta", "result"]
    assert told[0][1]["images"][0]["format"] == "png"
    assert "".join(data["text"] for name, data in told if name == "delta") == "the left lung"
    assert all(data["provisional"] for name, data in told if name == "delta")
    assert api.DiagnoseResponse.model_validate(told[-1][1]).answer == "the left lung"


def test_an_error_in_the_middle_is_an_event(gateway: Gateway, fake: Fake) -> None:
    fake.text, fake.hang_up_after = "the left lung", 1
    headers = {"accept": "text/event-stream"}
    told = events(gateway.client.post("/v1/diagnose", json=body(question="Where?"), headers=headers))
    assert told[-1][0] == "error"
    assert told[-1][1]["error"]["status"] >= 500
    assert not any(name == "result" for name, _ in told)


def test_before_the_first_event_errors_are_plain(gateway: Gateway) -> None:
    response = gateway.client.post("/v1/diagnose", json=body(), headers={"accept": "text/event-stream"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "question")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_model(stream: bool, gateway: Gateway, fake: Fake) -> None:
    fake.first_byte_seconds = 10.0
    headers = {"accept": "text/event-stream" if stream else "application/json"}
    with pytest.raises(httpx.TimeoutException):
        gateway.client.post("/v1/diagnose", json=body(question="Where?"), headers=headers, timeout=0.5)
    until(lambda: fake.cancelled == 1, 5)
    until(lambda: gateway.metric("medforge_gateway_in_flight") == 0, 5)


def test_silence_is_filled(gateway: Gateway, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.diagnose.BEAT_SECONDS", 0.1)
    fake.first_byte_seconds = 0.6
    headers = {"accept": "text/event-stream"}
    response = gateway.client.post("/v1/diagnose", json=body(question="Where?"), headers=headers)
    assert response.text.count(": still at work\n\n") >= 3
    assert events(response)[-1][0] == "result"


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_key_gets_the_same_answer(stream: bool, gateway: Gateway, fake: Fake) -> None:
    headers = {"idempotency-key": "k-1"}
    first = gateway.client.post("/v1/diagnose", data={"question": "Where?"}, files={"image": png()}, headers=headers)
    if stream:
        headers["accept"] = "text/event-stream"
    again = gateway.client.post("/v1/diagnose", data={"question": "Where?"}, files={"image": png()}, headers=headers)
    document = events(again)[-1][1] if stream else again.json()
    assert document == first.json()
    assert len(fake.requests) == 1
    other = gateway.client.post("/v1/diagnose", data={"question": "Who?"}, files={"image": png()}, headers=headers)
    if stream:
        assert events(other)[-1][1]["error"]["status"] == 422
    else:
        assert other.status_code == 422


def test_an_upstream_that_is_away(gateway: Gateway, fake: Fake) -> None:
    fake.stop()
    response = gateway.client.post("/v1/diagnose", json=body(question="Where?"))
    assert response.status_code == 503
    fake.start()


def test_a_full_gateway_says_when_to_come_again(serve: Serve, settings: Settings, fake: Fake) -> None:
    fake.first_byte_seconds = 1.0
    with serve(settings.model_copy(update={"concurrency": 1, "queue": 0})) as gateway:

        def ask(_: int) -> httpx.Response:
            return gateway.client.post("/v1/diagnose", json=body(question="Where?"))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            responses = list(pool.map(ask, range(4)))
    codes = sorted(response.status_code for response in responses)
    assert codes == [200, 503, 503, 503]
    assert all(response.headers["retry-after"] for response in responses if response.status_code == 503)


def test_the_scope_is_asked_for(gateway: Gateway) -> None:
    response = httpx.post(f"{gateway.url}/v1/diagnose", json=body(question="Where?"), trust_env=False)
    assert response.status_code == 401


def test_openapi_tells_of_both_bodies(gateway: Gateway) -> None:
    import jsonschema

    operation = gateway.client.get("/openapi.json").json()["paths"]["/v1/diagnose"]["post"]
    content = operation["requestBody"]["content"]
    for example in content["application/json"]["examples"].values():
        jsonschema.validate(example["value"], content["application/json"]["schema"])
        api.DiagnoseRequest.model_validate(example["value"])
    assert "image" in content["multipart/form-data"]["schema"]["properties"]
    assert {"400", "401", "413", "415", "422", "429", "502", "503", "504"} <= set(operation["responses"])
    for example in operation["responses"]["200"]["content"]["application/json"]["examples"].values():
        api.DiagnoseResponse.model_validate(example["value"])
