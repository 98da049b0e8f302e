"""What POST /v1/diagnose is sent, as JSON or as a form, and its images decoded in threads.

A form's parts are kept in memory only, each within its limit while it is read: the usual way spools large files to the
disk, where a patient's image would lie in clear. The body's own limit is checked here and by the middleware.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

import msgspec
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from medforge.files import sha256_bytes
from serving.gateway import api
from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.images import Picture, read_picture, sniff, too_large
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

TEXT_FIELDS = ("task", "question", "finding", "language")
_TEXT_BYTES = 32 << 10
_PARTS = 64
_DATA_URI = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
_SPACE = str.maketrans("", "", " \t\r\n")

# Decoding takes much memory for a moment: as many at once as there are processors, whatever waits.
_decoders = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="images")


@dataclass(frozen=True)
class ImageFile:
    """An image's file as it was sent. `param` is what messages call it."""

    data: bytes = field(repr=False)
    frame: int | None
    param: str


@dataclass(frozen=True)
class Asked:
    """A request: the question and its images' files.

    `digest` is the SHA-256 of the body. `identity` is equal for equal requests: a form's boundary differs each time.
    """

    question: api.Question
    files: tuple[ImageFile, ...]
    digest: str
    identity: bytes


async def read_request(request: Request, settings: Settings) -> Asked:
    """The request that is sent. GatewayError 400, 413, 415 or 422 with the field and the mend if it is none."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    digest = hashlib.sha256()
    chunks = _within(request.stream(), settings.max_body, digest)
    if kind == b"multipart/form-data":
        return await _read_form(chunks, options.get(b"boundary", b""), settings, digest)
    if kind == b"application/json":
        body = b"".join([chunk async for chunk in chunks])
        return await in_thread(_read_json, body, settings, digest.hexdigest())
    raise GatewayError(415, "content-type", "Send application/json or multipart/form-data", "content-type")


async def read_pictures(files: Sequence[ImageFile], settings: Settings, metrics: Metrics) -> list[Picture]:
    """The images, decoded in threads. GatewayError for the first that is not taken."""

    async def read(file: ImageFile) -> Picture:
        try:
            picture = await in_thread(read_picture, file.data, settings, file.frame, file.param)
        except GatewayError:
            metrics.images.labels(sniff(file.data) or "unknown", "refused").inc()
            raise
        metrics.images.labels(picture.out.format, "read").inc()
        return picture

    return [await read(file) for file in files]


def read_images(request: api.DiagnoseRequest, settings: Settings) -> list[Picture]:
    """The images of a JSON request, decoded in this thread. GatewayError for the first that is not taken."""
    return [read_picture(file.data, settings, file.frame, file.param) for file in _files(request, settings)]


async def in_thread(function: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
    """`function(*values)` in one of the images' threads."""
    return await asyncio.get_running_loop().run_in_executor(_decoders, partial(function, *values, **named))


def file_of(image: api.ImageIn, settings: Settings, param: str) -> ImageFile:
    """The file of an image in a JSON request. GatewayError if it is not base64, empty or too large."""
    text = image.data
    if match := _DATA_URI.match(text):
        text = text[match.end() :]
    if len(text) > settings.max_image_bytes * 3 // 2:  # base64 takes 4/3, line breaks a little more
        raise too_large(f"is of more than {settings.max_image_bytes} bytes", "a smaller file", param)
    try:
        data = base64.b64decode(text.translate(_SPACE), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("image-base64", f"{param}: is not base64; encode the file's bytes", f"{param}.data") from None
    if not data:
        raise bad_request("image-missing", f"{param}: is empty; send the file's bytes", f"{param}.data")
    return ImageFile(data, image.frame, param)


def invalid(error: ValidationError) -> GatewayError:
    """422 for a body that breaks the schema: the first breach, with the field's path, never with its value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return GatewayError(422, "json-invalid", "The body is not JSON")
    path = ".".join(str(part) for part in first["loc"])[:100]
    message = first["msg"].removeprefix("Value error, ")
    path = path or next((name for name in TEXT_FIELDS if message.startswith(f"{name}:")), "")
    return GatewayError(
        422, "invalid", message if message.startswith(f"{path}:") else f"{path}: {message}", path or None
    )


async def _within(chunks: AsyncIterator[bytes], limit: int, digest: hashlib._Hash) -> AsyncIterator[bytes]:
    """The body's pieces, counted and hashed."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise GatewayError(
                413, "body-too-large", f"The request's body may have {limit} bytes; send fewer or smaller images"
            )
        digest.update(chunk)
        if chunk:
            yield chunk


def _read_json(body: bytes, settings: Settings, digest: str) -> Asked:
    try:
        asked = api.DiagnoseRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
    return Asked(asked, _files(asked, settings), digest, body)


def _files(request: api.DiagnoseRequest, settings: Settings) -> tuple[ImageFile, ...]:
    if len(request.images) > settings.max_images:
        raise _too_many(settings)
    return tuple(file_of(image, settings, f"images.{number}") for number, image in enumerate(request.images))


def _too_many(settings: Settings) -> GatewayError:
    return bad_request("images-too-many", f"There may be {settings.max_images} images in a request", "images")


class _Form:
    """The callbacks of a form's parser: its parts, each refused as soon as it is too long or unknown."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.texts: dict[str, str] = {}
        self.frames: list[str] = []
        self.images: list[bytes] = []
        self.ended = False
        self._parts = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._name, self._data, self._limit = "", bytearray(), 0

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise bad_request("multipart-invalid", f"The form has more than {_PARTS} parts")
        self._disposition, self._data = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in (*TEXT_FIELDS, "frame", "image"):
            known = ", ".join((*TEXT_FIELDS, "frame", "image"))
            raise GatewayError(422, "invalid", f"The form has a field that is none of {known}", name[:100] or None)
        if name in self.texts:
            raise GatewayError(422, "invalid", f"{name}: is given twice; leave one out", name)
        if name == "image" and len(self.images) >= self._settings.max_images:
            raise _too_many(self._settings)
        self._name = name
        self._limit = self._settings.max_image_bytes if name == "image" else _TEXT_BYTES

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._data) + end - start > self._limit:
            if self._name == "image":
                param = f"images.{len(self.images)}"
                raise too_large(f"is of more than {self._limit} bytes", "a smaller file", param)
            raise GatewayError(422, "invalid", f"{self._name}: is too long", self._name)
        self._data += data[start:end]

    def on_part_end(self) -> None:
        if self._name == "image":
            self.images.append(bytes(self._data))
            return
        try:
            text = self._data.decode()
        except UnicodeDecodeError:
            raise GatewayError(422, "invalid", f"{self._name}: is not UTF-8", self._name) from None
        if self._name == "frame":
            self.frames.append(text.strip())
        else:
            self.texts[self._name] = text

    def on_end(self) -> None:
        self.ended = True


async def _read_form(chunks: AsyncIterator[bytes], boundary: bytes, settings: Settings, digest: hashlib._Hash) -> Asked:
    form = _Form(settings)
    names = (
        "part_begin",
        "header_field",
        "header_value",
        "header_end",
        "headers_finished",
        "part_data",
        "part_end",
        "end",
    )
    try:
        if not boundary:
            raise FormParserError("no boundary")
        callbacks: Any = {f"on_{name}": getattr(form, f"on_{name}") for name in names}
        parser = MultipartParser(boundary, callbacks)
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError:
        raise bad_request(
            "multipart-invalid", "The form cannot be read; send multipart/form-data with its boundary"
        ) from None
    if not form.ended:
        raise bad_request("multipart-invalid", "The form is cut short: its closing boundary is missing")
    return _asked(form, digest.hexdigest())


def _asked(form: _Form, digest: str) -> Asked:
    # a page's form sends its empty fields too
    texts = {name: text for name, text in form.texts.items() if text.strip()}
    try:
        question = api.Question.model_validate(texts)
    except ValidationError as error:
        raise invalid(error) from None
    images = [data for data in form.images if data]
    if not images:
        raise GatewayError(422, "invalid", "image: at least one is needed", "image")
    frames = _frames(form.frames, len(images))
    files = tuple(
        ImageFile(data, frame, f"images.{number}")
        for number, (data, frame) in enumerate(zip(images, frames, strict=True))
    )
    hashes = [sha256_bytes(data) for data in images]
    identity = msgspec.json.encode([question.model_dump(), frames, hashes])
    return Asked(question, files, digest, identity)


def _frames(given: list[str], images: int) -> list[int | None]:
    """A frame for each image: one for all, or one for each; empty is the middle one."""
    if any(text and not (text.isascii() and text.isdecimal() and len(text) <= 9) for text in given):
        raise GatewayError(422, "invalid", "frame: is no number from 0", "frame")
    frames = [int(text) if text else None for text in given] or [None]
    if len(frames) not in (1, images):
        raise GatewayError(422, "invalid", f"frame: is given {len(frames)} times for {images} images", "frame")
    return frames * images if len(frames) == 1 else frames
