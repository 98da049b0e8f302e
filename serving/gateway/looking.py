"""A look into a request of /v1/chat/completions, without taking it apart: is it one, and may its images go on?

What is checked is what could harm: an upstream that is made to fetch a URL (SSRF), files that are no images, images
that are too many or too large. All else is the upstream's to judge.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
from PIL import Image

from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.settings import Settings

_MEDIA = {"data:image/png;base64": "PNG", "data:image/jpeg;base64": "JPEG", "data:image/jpg;base64": "JPEG"}
_HEADERS = (4 << 10, 128 << 10)  # characters of base64 that mostly, and nearly always, hold an image's header
_DATA = b";base64,"
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"  # every PNG begins so; width and height follow


class _Url(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    detail: str | None = None


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message. Unknown fields are refused: vLLM, for one, takes `uuid` for an image of somebody else's."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: _Url | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _Body(msgspec.Struct):
    messages: list[_Message]
    model: str | None = None
    stream: bool | None = None


_body = msgspec.json.Decoder(_Body)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Looked:
    """A request that may go on: its bytes, and the model that it names."""

    body: bytes
    model: str | None

    def named(self, model: str) -> bytes:
        """The request for the upstream's `model`: the same bytes, unless they name another or none."""
        if not model or self.model == model:
            return self.body
        try:
            fields = _fields.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError):  # in what `look` did not look at
            raise _no_json() from None
        fields["model"] = msgspec.Raw(msgspec.json.encode(model))
        return msgspec.json.encode(fields)


def look(body: bytes, settings: Settings) -> Looked:
    """The request, if it may go on. GatewayError 400 or 413 that names the field otherwise."""
    short = _shortened(body, settings)
    try:
        return Looked(body, _check(short, settings))
    except GatewayError:
        if short is body:
            raise
        return Looked(body, _check(body, settings))


def _shortened(body: bytes, settings: Settings) -> bytes:
    """The same request without the later part of its images' data, which takes long to read and tells nothing.

    Only whole characters of JSON's strings go: what is left out holds no quote and no escape. An image that is too
    large stays, to be refused.
    """
    kept, at = [], 0
    for _ in range(settings.max_images):
        start = body.find(_DATA, at)
        end = body.find(b'"', start)
        if start < 0 or end < 0:
            break
        cut = start + len(_DATA) + _HEADERS[0]
        if cut < end:
            if body.find(b"\\", start, end) >= 0 or (end - start) * 3 // 4 > settings.max_image_bytes:
                return body
            kept.append(body[at:cut])
        else:
            kept.append(body[at:end])
        at = end
    kept.append(body[at:])
    return b"".join(kept) if len(kept) > 1 else body


def _check(body: bytes, settings: Settings) -> str | None:
    """The model that a request names, if it may go on."""
    try:
        read = _body.decode(body)
    except msgspec.ValidationError as error:
        raise bad_request("invalid", f"The body is no request of /v1/chat/completions: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _no_json() from None
    if not read.messages:
        raise bad_request("invalid", "There has to be a message", "messages")
    images = 0
    for number, message in enumerate(read.messages):
        if not isinstance(message.content, list):
            continue
        for place, part in enumerate(message.content):
            param = f"messages.{number}.content.{place}"
            if part.type == "image_url":
                images += 1
                if images > settings.max_images:
                    raise bad_request(
                        "images-too-many", f"There may be {settings.max_images} images in a request", param
                    )
                _check_image(part.image_url.url if part.image_url else "", settings, f"{param}.image_url.url")
            elif part.type not in ("text", "refusal") or part.image_url is not None:
                raise bad_request("part-unsupported", "A part is a text or an image_url", f"{param}.type")
    return read.model


def _no_json() -> GatewayError:
    return bad_request("json-invalid", "The body is not JSON")


def _check_image(url: str, settings: Settings, param: str) -> None:
    if not url[:5].lower().startswith("data:"):
        _check_host(url, settings, param)
        return
    comma = url.find(",", 0, 64)
    kind = _MEDIA.get(url[: max(comma, 0)].lower().replace(" ", ""))
    if kind is None:
        raise bad_request("image-unsupported", "An image is data:image/png;base64,… or data:image/jpeg;base64,…", param)
    if (len(url) - comma) * 3 // 4 > settings.max_image_bytes:
        raise GatewayError(413, "image-too-large", f"An image may have {settings.max_image_bytes} bytes", param)
    width, height = _size(url, comma + 1, kind, param)
    if width * height > settings.max_pixels:
        raise GatewayError(413, "image-too-large", f"An image may have {settings.max_pixels} pixels", param)


def _size(url: str, start: int, kind: str, param: str) -> tuple[int, int]:
    """Width and height as the image's header tells them. No pixel is decoded."""
    for end in (*(start + size for size in _HEADERS), len(url)):
        try:
            data = base64.b64decode(url[start:end], validate=True)
            if kind == "PNG" and len(data) >= _HEADERS[0] * 3 // 4 and (size := _png_size(data)):
                return size
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                return image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise GatewayError(413, "image-too-large", "The image has too many pixels", param) from None
        except binascii.Error:
            raise bad_request("image-invalid", "The image is not base64", param) from None
        except Exception as error:
            if end >= len(url):
                raise bad_request(
                    "image-invalid", f"The image is no {kind} as its media type says ({type(error).__name__})", param
                ) from None
    raise AssertionError("the whole image was looked at")


def _png_size(data: bytes) -> tuple[int, int] | None:
    """What a sound PNG begins with, in a tenth of Pillow's time; None leaves the judgement to Pillow."""
    if not data.startswith(_PNG) or data[29:33] != zlib.crc32(data[12:29]).to_bytes(4, "big"):
        return None
    width, height = struct.unpack_from(">II", data, len(_PNG))
    return (width, height) if width and height else None


def _check_host(url: str, settings: Settings, param: str) -> None:
    """GatewayError unless the upstream may fetch this URL: https, at a host that the settings name."""
    plain = url.isascii() and url.isprintable() and not set(url) & set(" \\@")  # what parsers read differently
    try:
        parsed = urlsplit(url) if plain else None
        allowed = parsed and parsed.scheme == "https" and parsed.port in (None, 443)
    except ValueError:
        parsed, allowed = None, False
    if not parsed or not allowed or parsed.hostname not in settings.image_hosts:
        hosts = f" or at https://{', '.join(settings.image_hosts)}" if settings.image_hosts else ""
        raise bad_request("image-url-refused", f"Images are sent in the request, as data: URIs{hosts}", param)
