"""Bodies come to the application as they were sent, in few pieces. The limits of heads are in test_security.py."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from serving.gateway.protocol import PIECE, BoundedProtocol
from tests.unit.gateway.conftest import until


async def tell(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the SHA-256 of the request's body and the sizes of its pieces."""
    whole, sizes, more = hashlib.sha256(), [], True
    while more:
        message = await receive()
        assert type(message["body"]) is bytes
        whole.update(message["body"])
        sizes.append(len(message["body"]))
        more = message["more_body"]
    told = json.dumps({"sha256": whole.hexdigest(), "sizes": sizes}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": told})


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(tell, "127.0.0.1", 0, http=BoundedProtocol, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client
    server.should_exit = True
    thread.join(15)


def cut(body: bytes) -> Iterator[bytes]:
    return (body[at : at + 70_001] for at in range(0, len(body), 70_001))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 200_000, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 7])
def test_a_body_comes_whole_and_in_order(size: int, chunked: bool, client: httpx.Client) -> None:
    body = np.random.default_rng(size).bytes(size)
    for _ in range(2):  # the second on the same connection
        told = client.post("/", content=cut(body) if chunked else body).json()
        assert told["sha256"] == hashlib.sha256(body).hexdigest()
        assert sum(told["sizes"]) == size
        assert len(told["sizes"]) <= size // PIECE + 2
