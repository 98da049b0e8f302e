"""Jobs over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest

from serving.gateway import api, worker
from tests.unit.gateway.conftest import Gateway, Serve, make_key, until
from tests.unit.gateway.fake import Fake
from tests.unit.gateway.keeping import png


def body(*questions: str, **more: Any) -> dict[str, Any]:
    return {"items": [{"question": question, "images": [{"data": png()}]} for question in questions], **more}


def done(gateway: Gateway, job: str) -> dict[str, Any]:
    until(lambda: gateway.client.get(f"/v1/jobs/{job}").json()["status"] == "finished", 20)
    status: dict[str, Any] = gateway.client.get(f"/v1/jobs/{job}").json()
    return status


def test_a_job_over_http(gateway: Gateway, fake: Fake) -> None:
    fake.text = "no nodule"
    sent = gateway.client.post("/v1/jobs", json=body("Is there a nodule?", "Is it normal?", name="night"))
    assert sent.status_code == 202, sent.text
    assert sent.json()["name"] == "night" and sent.json()["items"] == 2
    assert sent.headers["location"] == f"/v1/jobs/{sent.json()['id']}"
    status = done(gateway, sent.json()["id"])
    assert (status["done"], status["failed"]) == (2, 0)
    results = gateway.client.get(f"{sent.headers['location']}/results").json()
    assert [item["result"]["answer"] for item in results["items"]] == ["no nodule"] * 2
    assert results["next"] is None
    assert [job["id"] for job in gateway.client.get("/v1/jobs").json()["jobs"]] == [sent.json()["id"]]
    # a reader may judge a job's answers
    identity = results["items"][1]["result"]["id"]
    verdict = gateway.client.post("/v1/feedback", json={"request_id": identity, "verdict": "correct"})
    assert verdict.status_code == 201, verdict.text


def test_a_bad_image_fails_its_item_alone_and_at_once(gateway: Gateway) -> None:
    job = body("one?", "two?", "three?")
    job["items"][1]["images"] = [{"data": base64.b64encode(b"no image").decode()}]
    job["items"][2]["images"] = [{"data": "%%%"}]
    sent = gateway.client.post("/v1/jobs", json=job)
    assert sent.status_code == 202
    assert (sent.json()["failed"], sent.json()["status"]) == (2, "waiting")
    done(gateway, sent.json()["id"])
    items = gateway.client.get(f"/v1/jobs/{sent.json()['id']}/results").json()["items"]
    assert items[0]["result"]["decision"] in ("answered", "abstained")
    assert items[1]["error"]["code"] == "image-format" and items[1]["error"]["param"].startswith("items.1.images.0")
    assert items[2]["error"]["code"] == "image-base64" and items[2]["error"]["param"].startswith("items.2.images.0")


def test_a_job_of_bad_images_alone_has_ended(gateway: Gateway) -> None:
    job = {"items": [{"question": "one?", "images": [{"data": "AAAA"}]}]}
    sent = gateway.client.post("/v1/jobs", json=job).json()
    assert (sent["status"], sent["failed"]) == ("finished", 1)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"items": []}, "items"),
        ({}, "items"),
        ({"items": [{"images": [{"data": "AAAA"}]}]}, "items.0"),
        ({"items": [{"question": "a?", "images": []}]}, "items.0.images"),
        ({"items": [{"question": "a?", "images": [{"data": "AAAA"}]}], "nmae": "x"}, "nmae"),
        ({"items": [{"question": "a?", "images": [{"data": "AAAA"}]}], "name": "a\0b"}, "name"),
    ],
)
def test_a_wrong_document_refuses_the_whole_job(wrong: dict[str, Any], param: str, gateway: Gateway) -> None:
    told = gateway.client.post("/v1/jobs", json=wrong)
    assert told.status_code == 422
    assert told.json()["error"]["param"] == param
    assert gateway.client.get("/v1/jobs").json() == {"jobs": [], "next": None}


def test_too_many_items(serve: Serve, settings: Any) -> None:
    with serve(settings.model_copy(update={"job_items": 2})) as gateway:
        told = gateway.client.post("/v1/jobs", json=body("a?", "b?", "c?"))
        assert (told.status_code, told.json()["error"]["param"]) == (422, "items")


def test_a_job_that_is_sent_twice_is_made_once(gateway: Gateway) -> None:
    headers = {"idempotency-key": "night-1"}
    first = gateway.client.post("/v1/jobs", json=body("a?"), headers=headers)
    again = gateway.client.post("/v1/jobs", json=body("a?"), headers=headers)
    assert again.json() == first.json() and again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    other = gateway.client.post("/v1/jobs", json=body("b?"), headers=headers)
    assert (other.status_code, other.json()["error"]["param"]) == (422, "idempotency-key")
    assert len(gateway.client.get("/v1/jobs").json()["jobs"]) == 1


def test_a_job_is_in_the_audit_log_and_is_not_made_without_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps(body("a?")).encode()
    job = gateway.client.post("/v1/jobs", content=content).json()["id"]
    done(gateway, job)
    gateway.client.get(f"/v1/jobs/{job}/results")
    gateway.client.delete(f"/v1/jobs/{job}")
    rows = [json.loads(line) for line in gateway.parts.audit.path.read_text().splitlines()]
    assert [(row["route"], row["status"], row["client"]) for row in rows] == [
        ("/v1/jobs", 202, "system"),
        ("/v1/diagnose", 200, "batch"),
        ("/v1/jobs/{id}/results", 200, "system"),
        ("/v1/jobs/{id}", 200, "system"),
    ]
    assert rows[0]["inputs"] == hashlib.sha256(content).hexdigest()

    async def fail(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gateway.parts.audit, "write", fail)
    told = gateway.client.post("/v1/jobs", json=body("b?"))
    assert (told.status_code, told.json()["error"]["code"]) == (503, "audit-unavailable")
    assert len(gateway.client.get("/v1/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize("path", ["job-%00", "%ff", "job-x%20y", "x" * 41, "..%2f..%2fetc"])
def test_what_is_no_id_is_refused(path: str, gateway: Gateway) -> None:
    for method, rest in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        assert gateway.client.request(method, f"/v1/jobs/{path}{rest}").status_code in (404, 422)
    assert gateway.client.get(f"/v1/jobs?before={path}").status_code == 422


def test_others_jobs_are_not_there(gateway: Gateway) -> None:
    job = gateway.client.post("/v1/jobs", json=body("a?")).json()["id"]
    plain = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'other', scopes=('jobs',))}"}
    admin = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'admin')}"}
    for method, path in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
        told = gateway.client.request(method, f"/v1/jobs/{job}{path}", headers=plain)
        assert (told.status_code, told.json()["error"]["code"]) == (404, "job-unknown")
    assert gateway.client.get(f"/v1/jobs/{job}", headers=admin).status_code == 200
    assert gateway.client.get("/v1/jobs", headers=admin).json()["jobs"] == []
    without = {"authorization": f"Bearer {make_key(gateway.parts.settings, 'asker', scopes=('diagnose',))}"}
    assert gateway.client.post("/v1/jobs", json=body("a?"), headers=without).status_code == 403


def test_a_job_is_cancelled_over_http(gateway: Gateway, fake: Fake) -> None:
    fake.first_byte_seconds = 30.0
    job = gateway.client.post("/v1/jobs", json=body(*[f"{number}?" for number in range(6)])).json()["id"]
    until(lambda: len(fake.requests) >= 2)
    told = gateway.client.delete(f"/v1/jobs/{job}")
    assert (told.status_code, told.json()["status"]) == (200, "cancelled")
    items = gateway.client.get(f"/v1/jobs/{job}/results").json()["items"]
    assert [item["error"]["code"] for item in items] == ["cancelled"] * 6


def test_an_overloaded_upstream_is_waited_for(gateway: Gateway, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_WAIT", 0.2)
    fake.statuses.extend([503] * 4)
    job = gateway.client.post("/v1/jobs", json=body("a?")).json()["id"]
    assert done(gateway, job)["done"] == 1


@pytest.mark.parametrize("query", ["after=-2", "after=x", f"after={10**30}", "limit=0", "limit=1001"])
def test_a_wrong_page_is_refused(query: str, gateway: Gateway) -> None:
    told = gateway.client.get(f"/v1/jobs/job-x/results?{query}")
    assert told.status_code == 422 and query.split("=")[0] in told.json()["error"]["param"]


def test_a_job_goes_on_after_a_restart_of_the_gateway(serve: Serve, settings: Any, fake: Fake) -> None:
    fake.first_byte_seconds = 30.0
    with serve(settings) as gateway:
        job = gateway.client.post("/v1/jobs", json=body("a?", "b?")).json()["id"]
        until(lambda: len(fake.requests) >= 2)
    fake.first_byte_seconds = 0.0
    with serve(settings) as gateway:
        assert done(gateway, job)["done"] == 2


def test_openapi_tells_of_the_routes(gateway: Gateway) -> None:
    paths = gateway.client.get("/openapi.json").json()["paths"]
    post = paths["/v1/jobs"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["items"]["items"]["properties"]["images"]["items"]["properties"]["data"]
    assert "$ref" not in str(schema)
    api.JobRequest.model_validate(post["requestBody"]["content"]["application/json"]["example"])
    assert {"202", "409", "422"} <= set(post["responses"])
    assert set(paths["/v1/jobs/{id}"]) == {"get", "delete"}
    feedback = paths["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]
    api.FeedbackRequest.model_validate(feedback["example"])
