"""POST /v1/diagnose of a gateway that is a process of its own: files as hospitals send them, many at once, and what is
left of them in its log, its audit log and its folder."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from medforge.audit import verify
from serving.gateway import api
from serving.gateway.settings import Settings
from tests.integration.serving.processes import Running, gateway_process
from tests.integration.serving.test_predictor import address, digest, folder, keys, log, store
from tests.unit.gateway.fake import RELEASE, Fake

__all__ = ["address", "digest", "folder", "keys", "log", "store"]  # fixtures of a real predictor

PATH = "/v1/diagnose"
NAME, QUESTION, ANSWER = "Doe^Jane", "Where is the nodule of Jane Doe?", "in the left upper lobe"


@pytest.fixture
def gateway(settings: Settings, key: str, fake: Fake) -> Iterator[Running]:
    fake.text = ANSWER
    with gateway_process(settings.model_copy(update={"max_image_bytes": 4 << 20})) as running:
        running.client.headers["authorization"] = f"Bearer {key}"
        yield running


def dicom(name: str = "CT_small.dcm") -> bytes:
    """A sample of pydicom's, with a patient's name in it."""
    path = get_testdata_file(name, download=False)
    assert path is not None
    made = pydicom.dcmread(str(path))
    made.PatientName = NAME
    stream = io.BytesIO()
    made.save_as(stream)
    return stream.getvalue()


def picture(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400), np.uint8)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = NAME
    Image.fromarray(noise).save(stream, kind, exif=exif.tobytes())
    return stream.getvalue()


def sent_on(request: dict[str, Any]) -> list[bytes]:
    """The images of a request that reached the predictor."""
    parts = request["messages"][0]["content"]
    return [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in parts if part["type"] == "image_url"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "DICOM"])
def test_every_kind_of_file(kind: str, gateway: Running, fake: Fake) -> None:
    data = dicom() if kind == "DICOM" else picture(kind)
    assert NAME.encode() in data
    files = {"image": (f"{NAME}.dcm", data)}
    response = gateway.client.post(PATH, data={"question": QUESTION}, files=files)
    assert response.status_code == 200, response.text
    answer = api.DiagnoseResponse.model_validate(response.json())
    assert (answer.answer, answer.release.digest, answer.images[0].format) == (ANSWER, RELEASE, kind.lower())
    width, height = answer.images[0].width, answer.images[0].height
    assert answer.regions[0].pixels == (
        round(0.1 * width),
        round(0.2 * height),
        round(0.5 * width),
        round(0.6 * height),
    )
    (image,) = sent_on(fake.requests[0])
    assert NAME.encode() not in image
    assert Image.open(io.BytesIO(image)).size == (width, height)


def test_a_frame_of_a_film_and_a_refusal_by_policy(gateway: Running) -> None:
    film = get_testdata_file("rtdose_rle.dcm", download=False)
    files = {"image": Path(str(film)).read_bytes()}
    response = gateway.client.post(PATH, data={"task": "report", "frame": "4"}, files=files)
    assert response.json()["images"][0]["frame"] == 4
    response = gateway.client.post(PATH, data={"task": "report", "frame": "15"}, files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "image-frame")
    made = pydicom.dcmread(io.BytesIO(dicom()))
    made.BurnedInAnnotation = "YES"
    stream = io.BytesIO()
    made.save_as(stream)
    response = gateway.client.post(PATH, data={"task": "report"}, files={"image": stream.getvalue()})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "burned-in-annotation")


def test_nothing_of_a_patient_is_left(gateway: Running, settings: Settings) -> None:
    files = {"image": (f"{NAME}.dcm", dicom())}
    data = {"question": QUESTION}
    assert gateway.client.post(PATH, data=data, files=files).status_code == 200
    events = gateway.client.post(PATH, data=data, files=files, headers={"accept": "text/event-stream"})
    assert "event: result" in events.text
    broken = {"image": (NAME, dicom()[:3000])}
    assert gateway.client.post(PATH, data=data, files=broken).status_code == 400
    assert gateway.client.post(PATH, json={"question": NAME, "images": [{"data": NAME}]}).status_code == 400
    assert gateway.client.post(PATH, json={"question": NAME, NAME: 1}).status_code == 422
    metrics = gateway.client.get("/metrics").text
    assert 'medforge_gateway_images_total{format="dicom",outcome="read"} 2.0' in metrics
    rows, _ = verify(settings.data_dir / "audit")
    assert rows == 5
    left = [gateway.log.read_bytes(), metrics.encode()]
    left += [path.read_bytes() for path in settings.data_dir.rglob("*") if path.is_file()]
    for trace in (NAME, "Jane", "nodule", ANSWER, "left upper"):
        assert not any(trace.encode() in content for content in left), trace


def test_many_at_once_of_every_kind(gateway: Running) -> None:
    """Sound, broken and foreign files mixed: each gets what it gets alone, and the gateway stays as large as it was."""
    cases = [
        (picture("PNG"), 200),
        (picture("JPEG"), 200),
        (dicom(), 200),
        (dicom("JPEG2000.dcm"), 200),
        (picture("JPEG")[:2000], 400),
        (dicom()[:5000], 400),
        (b"GIF89a" + bytes(500), 400),
        (bytes((4 << 20) + 1), 413),
    ] * 8

    def ask(case: tuple[bytes, int]) -> tuple[int, int]:
        url, headers = f"{gateway.url}{PATH}", gateway.client.headers
        body = {"question": QUESTION}
        response = httpx.post(url, data=body, files={"image": case[0]}, headers=headers, timeout=60, trust_env=False)
        if response.status_code == 200:
            assert response.json()["answer"] == ANSWER
        return case[1], response.status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        first = list(pool.map(ask, cases))
        settled = gateway.resident
        second = list(pool.map(ask, cases))
    for expected, status in first + second:
        assert status == expected or status == 503
    assert sum(status == 503 for _, status in first + second) < len(cases)
    assert gateway.resident < settled + (64 << 20)


def test_a_stream_shows_first_and_withdraws_after(gateway: Running, fake: Fake) -> None:
    fake.match = 0.1
    image = base64.b64encode(picture("PNG")).decode()
    request = {"question": QUESTION, "images": [{"data": image}]}
    seen: list[tuple[str, Any]] = []
    with gateway.client.stream("POST", PATH, json=request, headers={"accept": "text/event-stream"}) as response:
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                seen.append((name, json.loads(line[6:])))
    deltas = [data for name, data in seen if name == "delta"]
    assert "".join(data["text"] for data in deltas) == ANSWER
    assert all(data["provisional"] is True for data in deltas)
    result = api.DiagnoseResponse.model_validate(seen[-1][1])
    assert (result.decision, result.reason, result.answer) == ("abstained", "low-match", None)
    assert result.match
    assert result.match.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    "question",
    [
        {"question": "What imaging modality is this?"},
        {"task": "finding", "finding": "a lesion"},
        {"task": "locate", "finding": "lesion"},
        {"task": "report", "language": "zh"},
    ],
    ids=lambda question: question.get("task", "ask"),
)
def test_a_real_predictor_with_heads(
    question: dict[str, str], address: str, digest: str, settings: Settings, key: str
) -> None:
    """The model is not trained, so that any decision is right; what the heads and the release say must be there, and a
    stream must come to the same end."""
    ours = settings.model_copy(
        update={"stable": f"{address}/openai/v1", "match_threshold": 0.01, "deadline": 110.0, "max_tokens": 8}
    )
    with gateway_process(ours) as running:
        running.client.headers["authorization"] = f"Bearer {key}"
        files = {"image": dicom()}
        whole = running.client.post(PATH, data=question, files=files, timeout=120)
        assert whole.status_code == 200, whole.text
        headers = {"accept": "text/event-stream"}
        stream = running.client.post(PATH, data=question, files=files, headers=headers, timeout=120)
    answer = api.DiagnoseResponse.model_validate(whole.json())
    assert answer.release.digest == digest
    assert answer.match
    assert (answer.match.source, answer.decision == "answered") == ("head", answer.reason is None)
    if answer.task == "ask":
        assert [region.source for region in answer.regions] == ["head"]
    last = stream.text.strip().split("\n\n")[-1]
    assert last.startswith("event: result\ndata: ")
    streamed = api.DiagnoseResponse.model_validate_json(last.partition("data: ")[2])
    told = {"decision", "reason", "answer", "finding", "regions", "release", "images", "usage"}
    assert streamed.model_dump(include=told) == answer.model_dump(include=told)
    assert streamed.match
    assert streamed.match.value == pytest.approx(answer.match.value, abs=1e-3)
