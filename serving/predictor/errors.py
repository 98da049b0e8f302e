"""Why a request is not served: one exception, in the shape that the clients of OpenAI's API read."""

from __future__ import annotations

import math
import traceback
from typing import Any


class Refusal(Exception):  # noqa: N818  it is the answer, not a fault of ours
    """A request that is not served. `status` is the HTTP status, `code` a stable name, `param` the field at fault.

    `retry_after` (seconds) becomes the header of that name. The message never repeats what the request holds.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON document of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers beside it."""
        return {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}


def bad_request(code: str, message: str, param: str | None = None) -> Refusal:
    """400: the request itself is at fault, and sending it again does not help."""
    return Refusal(400, code, message, param)


def internal() -> Refusal:
    """500: what went wrong is told in the log, not to the client."""
    return Refusal(500, "internal", "the server failed on this request, or on one beside it; try again")


def outline(error: BaseException) -> str:
    """The kind and place of an error for the log, without its message, which may hold what a request does."""
    trace = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + (f" at {trace[-1].filename}:{trace[-1].lineno}" if trace else "")
