"""Requests of /v1/diagnose, as JSON and as forms, in one piece and in many; what is wrong is named by its field."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.requests import Request

from serving.gateway import api
from serving.gateway.errors import GatewayError
from serving.gateway.metrics import Metrics
from serving.gateway.reading import Asked, read_images, read_pictures, read_request
from serving.gateway.settings import Settings

BOUNDARY = "x-boundary-x"
Part = tuple[str, bytes] | tuple[str, bytes, str]


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path, max_image_bytes=4096, max_body=16_384)


def png(value: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, "PNG")
    return stream.getvalue()


def request(body: bytes, kind: str | None, step: int | None = None) -> Request:
    step = step or max(1, len(body))
    pieces = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    headers = [(b"content-type", kind.encode())] if kind else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def read(body: bytes, kind: str | None, settings: Settings, step: int | None = None) -> Asked:
    return asyncio.run(read_request(request(body, kind, step), settings))


def form(parts: Sequence[Part], boundary: str = BOUNDARY) -> bytes:
    pieces = []
    for name, data, *filename in parts:
        extra = f'; filename="{filename[0]}"\r\nContent-Type: application/octet-stream' if filename else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
        pieces.append(head.encode() + data + b"\r\n")
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()


def read_form(parts: Sequence[Part], settings: Settings, step: int | None = None) -> Asked:
    return read(form(parts), f"multipart/form-data; boundary={BOUNDARY}", settings, step)


def read_json(document: Any, settings: Settings) -> Asked:
    return read(json.dumps(document).encode(), "application/json; charset=utf-8", settings)


def refused(call: Any, *values: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        call(*values)
    return caught.value


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("step", [None, 1, 7, 64])
def test_a_form(step: int | None, limits: Settings) -> None:
    parts: list[Part] = [
        ("task", b"finding"),
        ("finding", "胸腔积液".encode()),
        ("language", b"zh"),
        ("question", b""),  # what a page's form sends for an empty field
        ("frame", b"2"),
        ("image", png(1), "../../etc/passwd"),
        ("image", png(2), "b.png"),
    ]
    asked = read_form(parts, limits, step)
    assert asked.question == api.Question(task="finding", finding="胸腔积液", language="zh")
    assert [(one.data, one.frame, one.param) for one in asked.files] == [
        (png(1), 2, "images.0"),
        (png(2), 2, "images.1"),
    ]
    assert asked.digest == hashlib.sha256(form(parts)).hexdigest()


def test_equal_forms_have_one_identity(limits: Settings) -> None:
    parts: list[Part] = [("task", b"report"), ("image", png(), "a")]
    other: list[Part] = [("image", png(), "b"), ("task", b"report")]
    kind = "multipart/form-data; boundary="
    first, second = read(form(parts, "one"), kind + "one", limits), read(form(other, "two"), kind + "two", limits)
    assert first.identity == second.identity
    assert first.digest != second.digest
    changed = read_form([("task", b"report"), ("image", png(3), "a")], limits)
    assert changed.identity != first.identity


def test_frames_one_for_each(limits: Settings) -> None:
    images: list[Part] = [("image", png(), "a"), ("image", png(), "b")]
    asked = read_form([("task", b"report"), *images, ("frame", b"0"), ("frame", b"")], limits)
    assert [one.frame for one in asked.files] == [0, None]
    error = refused(read_form, [("task", b"report"), *images, *[("frame", b"1")] * 3], limits)
    assert (error.status, error.param) == (422, "frame")
    for bad in (b"-1", b"x", b"1.5", "２".encode(), b"9" * 30):
        assert refused(read_form, [("task", b"report"), *images, ("frame", bad)], limits).param == "frame"


def test_json(limits: Settings) -> None:
    document = {"question": "Which organ?", "images": [{"data": b64(png()), "frame": 1}]}
    asked = read_json(document, limits)
    assert (asked.question.question, asked.question.task) == ("Which organ?", "ask")
    assert [(one.data, one.frame) for one in asked.files] == [(png(), 1)]
    assert asked.identity == json.dumps(document).encode()
    lines = "\r\n".join(b64(png())[at : at + 20] for at in range(0, len(b64(png())), 20))
    for text in (f"data:image/png;base64,{b64(png())}", f"DATA:;base64,{b64(png())}", lines):
        asked = read_json({"task": "report", "images": [{"data": text}]}, limits)
        assert asked.files[0].data == png()


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"question": "x", "images": []}, "images"),
        ({"question": "x"}, "images"),
        ({"images": [{"data": "AA=="}]}, "question"),
        ({"task": "finding", "images": [{"data": "AA=="}]}, "finding"),
        ({"task": "finding", "finding": "  ", "images": [{"data": "AA=="}]}, "finding"),
        ({"task": "report", "question": "x", "images": [{"data": "AA=="}]}, "question"),
        ({"task": "guess", "images": [{"data": "AA=="}]}, "task"),
        ({"question": "x", "language": "fr", "images": [{"data": "AA=="}]}, "language"),
        ({"question": "x" * 4001, "images": [{"data": "AA=="}]}, "question"),
        ({"question": "x", "quest": 1, "images": [{"data": "AA=="}]}, "quest"),
        ({"question": "x", "images": [{"data": "AA==", "frame": -1}]}, "images.0.frame"),
        ({"question": "x", "images": [{"frame": 1}]}, "images.0.data"),
        ({"question": 5, "images": [{"data": "AA=="}]}, "question"),
        ([], None),
    ],
)
def test_json_against_the_schema(document: Any, param: str | None, limits: Settings) -> None:
    error = refused(read_json, document, limits)
    assert (error.status, error.code, error.param) == (422, "invalid", param)


def test_what_was_sent_is_not_repeated(limits: Settings) -> None:
    error = refused(read_json, {"question": "x", "language": "DOE^JANE", "images": [{"data": "A"}]}, limits)
    assert "DOE" not in error.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"question": "\xff"}', b'{"question": "\\ud800"}', b"null x", b"[" * 9000]
)
def test_what_is_no_json(body: bytes, limits: Settings) -> None:
    assert refused(read, body, "application/json", limits).status == 422


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("!!!!", "image-base64"),
        ("AAA", "image-base64"),
        ("", "image-missing"),
        ("data:image/png;base64,", "image-missing"),
        ("é" * 8, "image-base64"),
    ],
)
def test_what_is_no_base64(data: str, code: str, limits: Settings) -> None:
    error = refused(read_json, {"question": "x", "images": [{"data": data}]}, limits)
    assert (error.status, error.code, error.param) == (400, code, "images.0.data")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_other_content_types(kind: str | None, limits: Settings) -> None:
    assert refused(read, b"x", kind, limits).status == 415


def test_the_body_has_its_limit_while_it_is_read(limits: Settings) -> None:
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    endless = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    with pytest.raises(GatewayError) as caught:
        asyncio.run(read_request(endless, limits))
    assert (caught.value.status, taken) == (413, 17)


def test_an_image_has_its_limit_while_it_is_read(limits: Settings) -> None:
    error = refused(read_form, [("task", b"report"), ("image", bytes(4097), "a")], limits, 100)
    assert (error.status, error.code, error.param) == (413, "image-too-large", "images.0")
    error = refused(read_json, {"task": "report", "images": [{"data": b64(bytes(6200))}]}, limits)
    assert (error.status, error.code, error.param) == (413, "image-too-large", "images.0")


def test_too_many_images(limits: Settings) -> None:
    images: list[Part] = [("image", png(), "a")] * 5
    assert refused(read_form, [("task", b"report"), *images], limits).code == "images-too-many"
    error = refused(read_json, {"task": "report", "images": [{"data": b64(png())}] * 5}, limits)
    assert (error.status, error.code, error.param) == (400, "images-too-many", "images")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("task", b"report")], "image"),
        ([("task", b"report"), ("image", b"", "")], "image"),
        ([("task", b"report"), ("task", b"ask"), ("image", b"x", "a")], "task"),
        ([("patient", b"x"), ("image", b"x", "a")], "patient"),
        ([("question", b"\xff"), ("image", b"x", "a")], "question"),
        ([("question", b"x" * 40_000)], "question"),
        ([("task", b"ask"), ("image", b"x", "a")], "question"),
    ],
)
def test_forms_against_the_schema(parts: list[Part], param: str, limits: Settings) -> None:
    error = refused(read_form, parts, limits.model_copy(update={"max_body": 1 << 20}))
    assert (error.status, error.param) == (422, param)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", f"multipart/form-data; boundary={BOUNDARY}"),
        (form([("task", b"report")]), "multipart/form-data"),
        (form([("task", b"report")]), "multipart/form-data; boundary=other"),
        (form([("task", b"report")])[:-20], f"multipart/form-data; boundary={BOUNDARY}"),
        (b"garbage" * 50, f"multipart/form-data; boundary={BOUNDARY}"),
        (form([("frame", b"")] * 65), f"multipart/form-data; boundary={BOUNDARY}"),
        (form([("task", b"report")], "b" * 3000), f"multipart/form-data; boundary={'b' * 3000}"),
    ],
)
def test_broken_forms(body: bytes, kind: str, limits: Settings) -> None:
    error = refused(read, body, kind, limits)
    assert (error.status, error.code) == (400, "multipart-invalid")


def test_a_large_form_touches_no_disk(limits: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, fail)
    settings = limits.model_copy(update={"max_body": 8 << 20, "max_image_bytes": 4 << 20})
    asked = read_form([("task", b"report"), ("image", bytes(3 << 20), "a")], settings, 1 << 16)
    assert len(asked.files[0].data) == 3 << 20
    assert len(repr(asked)) < 10_000  # no image in a log


def test_pictures_are_counted(limits: Settings) -> None:
    metrics = Metrics()
    asked = read_form([("task", b"report"), ("image", png(), "a"), ("image", b"nothing", "b")], limits)
    with pytest.raises(GatewayError) as caught:
        asyncio.run(read_pictures(asked.files, limits, metrics))
    assert (caught.value.code, caught.value.param) == ("image-format", "images.1")
    value = metrics.registry.get_sample_value
    assert value("medforge_gateway_images_total", {"format": "png", "outcome": "read"}) == 1
    assert value("medforge_gateway_images_total", {"format": "unknown", "outcome": "refused"}) == 1


def test_the_images_of_a_jobs_item(limits: Settings) -> None:
    item = api.DiagnoseRequest(task="report", images=[api.ImageIn(data=b64(png()))])
    assert [picture.size for picture in read_images(item, limits)] == [(4, 4)]
    many = api.DiagnoseRequest(task="report", images=[api.ImageIn(data=b64(png()))] * 5)
    assert refused(read_images, many, limits).code == "images-too-many"
