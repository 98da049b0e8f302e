"""The upstream of all contenders: a bare ASGI application that takes a request of OpenAI's API and answers at once.

It costs as little as uvicorn lets it, so that what is measured is the way to it. With BENCHMARK_READS=1 it does what
every model's server has to do before the model begins, and nothing else: it parses the request and decodes the image.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

READS = "BENCHMARK_READS"
MODEL = "mock"
ANSWER = "No focal lesion is seen."
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_COMPLETION = {
    "id": "chatcmpl-benchmark",
    "object": "chat.completion",
    "created": 1700000000,
    "model": MODEL,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}],
    "usage": {"prompt_tokens": 300, "completion_tokens": 6, "total_tokens": 306},
}
_MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1700000000, "owned_by": "benchmark"}]}
_BODIES = {
    "/v1/chat/completions": json.dumps(_COMPLETION).encode(),
    "/v1/models": json.dumps(_MODELS).encode(),
}


async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Take the whole body, then send the fixed answer of the path."""
    if scope["type"] != "http":
        raise NotImplementedError(f"{scope['type']}: this upstream speaks plain HTTP only")
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["method"] == "POST" and os.environ.get(READS):
        read(b"".join(pieces))
    body = _BODIES.get(scope["path"])
    status, body = (404, b"{}") if body is None else (200, body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def read(body: bytes) -> tuple[int, int]:
    """Parse a request and decode its images. Returns the last one's width and height."""
    from PIL import Image

    size = (0, 0)
    for message in json.loads(body)["messages"]:
        for part in message["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                size = Image.open(io.BytesIO(data)).convert("RGB").size
    return size
