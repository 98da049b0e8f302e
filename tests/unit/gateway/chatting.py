"""Requests of /v1/chat/completions."""

from __future__ import annotations

import base64
from typing import Any

PATH = "/v1/chat/completions"


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def body(*urls: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "Is there an effusion?"}]
    return {"model": "medforge", "messages": [{"role": "user", "content": content}], **more}
