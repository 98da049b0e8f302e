"""The upstream of all contenders: a bare ASGI application that reads a request of OpenAI's API and answers at once.

It costs as little as uvicorn lets it, so that what is measured is the way to it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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
    """Read the whole body, then send the fixed answer of the path."""
    if scope["type"] != "http":
        raise NotImplementedError(f"{scope['type']}: this upstream speaks plain HTTP only")
    while (await receive()).get("more_body"):
        pass
    body = _BODIES.get(scope["path"])
    status, body = (404, b"{}") if body is None else (200, body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
