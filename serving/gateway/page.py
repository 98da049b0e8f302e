"""The page that a reader uses, at `/`, and the preview that it shows of an image.

The page is plain HTML, CSS and ES modules in `page/`: read once, held in memory, and served with a policy that lets
the browser load nothing from elsewhere and run nothing that is written into the page.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serving.gateway.api import ErrorResponse
from serving.gateway.context import admit, time_left
from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.images import Picture, read_picture
from serving.gateway.parts import Parts
from serving.gateway.reading import in_thread

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
))  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str


def read_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """The page's files by name. ValueError for one that is of no known type."""
    assets = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in MEDIA_TYPES:
            raise ValueError(f"{path}: the page has {', '.join(MEDIA_TYPES)} only; take it away")
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        assets[path.name] = Asset(content, f"{MEDIA_TYPES[path.suffix]}; charset=utf-8", etag)
    return assets


def _serve(request: Request, asset: Asset) -> Response:
    """The file, or 304 where the browser has it. `no-cache`: kept, but asked about every time."""
    headers = HEADERS | {"etag": asset.etag, "cache-control": "no-cache"}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


async def _read_body(request: Request, limit: int) -> bytes:
    """The file that is the request's body; GatewayError 413 as soon as it is above `limit`, 400 where it is empty."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise GatewayError(
                413, "image-too-large", f"An image may have {limit} bytes; send a smaller or compressed one", "body"
            )
    if not body:
        raise bad_request("image-empty", "There is no image; send the file's bytes as the request's body", "body")
    return bytes(body)


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "No image, one that cannot be read or that is refused, or a frame that it does not have.",
        401: "No valid key.",
        403: "The key lacks the scope diagnose.",
        413: "The image is too large.",
        422: "The frame is no whole number from 0.",
        429: "Too many requests of this client.",
        503: "The gateway is draining, or too busy to read the image in time.",
    }.items()
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_OPENAPI = {"requestBody": {"required": True, "content": {"application/octet-stream": _IMAGE}}}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image as the model is given it.",
        "content": {"image/png": _IMAGE},
        "headers": {
            f"x-image-{name}": {"description": description, "schema": {"type": "integer"}}
            for name, description in {
                "width": "Width in pixels of the image as it was sent.",
                "height": "Height in pixels of the image as it was sent.",
                "frame": "The frame that is shown, from 0.",
                "frames": "How many frames the file has.",
            }.items()
        },
    }
}


def router() -> APIRouter:
    """The routes of the page: `/`, `/page/…` and POST /v1/preview."""
    routes = APIRouter()
    assets = read_assets()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _serve(request, assets[INDEX])

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        if name not in assets:
            raise GatewayError(404, "not-found", "The page has no such file")
        return _serve(request, assets[name])

    @routes.post(
        "/v1/preview", tags=["diagnose"], response_class=Response, responses=_ANSWER | _ERRORS, openapi_extra=_OPENAPI
    )
    async def preview(
        request: Request,
        frame: Annotated[int | None, Query(ge=0, description="Frame, from 0; none: the middle one.")] = None,
    ) -> Response:
        """An image as the model is given it: decoded, windowed, turned upright, reduced. Nothing of it is kept."""
        context = await admit(request, "diagnose")
        parts: Parts = request.app.state.parts
        data = await _read_body(request, parts.settings.max_image_bytes)
        left = time_left(context)
        try:
            picture = await asyncio.wait_for(in_thread(read_picture, data, parts.settings, frame, "body"), left)
        except asyncio.TimeoutError:
            raise GatewayError(503, "busy", "Too many images are being read; try again", retry_after=5) from None
        return Response(picture.data, media_type=picture.media_type, headers=_describe(picture))

    return routes


def _describe(picture: Picture) -> dict[str, str]:
    out = picture.out
    numbers = {"width": out.width, "height": out.height, "frame": out.frame or 0, "frames": out.frames}
    return {"cache-control": "no-store"} | {f"x-image-{name}": str(number) for name, number in numbers.items()}
