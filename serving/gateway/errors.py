"""What a caller is told when a request cannot be served: one JSON shape for all routes.

{"error": {"code": "image-too-large", "message": "…", "param": "images.0", "request_id": "…"}}, which the clients of
OpenAI's API read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class GatewayError(Exception):
    """A request that is not served. `status` is the HTTP status, `code` a stable name, `param` the field at fault.

    `retry_after` (seconds) becomes the header of that name.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON document of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"code": self.code, "type": kind, "message": self.message, "param": self.param}
        return {"error": error | {"request_id": request_id}}

    def headers(self) -> Mapping[str, str]:
        """The headers beside it."""
        headers = {"retry-after": str(max(1, round(self.retry_after)))} if self.retry_after is not None else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def encode(self, request_id: str | None = None) -> bytes:
        """`body` as bytes."""
        return msgspec.json.encode(self.body(request_id))


def bad_request(code: str, message: str, param: str | None = None) -> GatewayError:
    """400: the request itself is at fault, and sending it again does not help."""
    return GatewayError(400, code, message, param)
