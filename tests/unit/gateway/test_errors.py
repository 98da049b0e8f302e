"""The one shape of errors."""

from __future__ import annotations

import json

from serving.gateway.errors import GatewayError, bad_request


def test_the_body_is_what_openais_clients_read() -> None:
    error = GatewayError(429, "rate-exceeded", "Too many", "x", 2.4)
    assert json.loads(error.encode("r-1")) == {
        "error": {
            "code": "rate-exceeded",
            "type": "invalid_request_error",
            "message": "Too many",
            "param": "x",
            "request_id": "r-1",
        }
    }
    assert error.headers() == {"retry-after": "2"}
    assert GatewayError(503, "x", "y").body()["error"]["type"] == "server_error"


def test_headers() -> None:
    assert GatewayError(401, "x", "y").headers() == {"www-authenticate": "Bearer"}
    assert GatewayError(503, "x", "y", retry_after=0.01).headers() == {"retry-after": "1"}  # 0 would mean at once
    assert bad_request("x", "y").headers() == {}
