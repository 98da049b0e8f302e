"""Attacks from outside: paths, URLs, headers, bodies."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from serving.gateway.settings import Settings
from tests.integration.serving.attacks import CHAT, DIAGNOSE, INTERNALS, MEBI, PNG, ask, chat, is_told, raw
from tests.integration.serving.processes import gateway_process
from tests.unit.gateway.conftest import Gateway, Serve
from tests.unit.gateway.fake import Fake


class Canary:
    """A web server that should never be called."""

    def __init__(self) -> None:
        calls: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                calls.append(self.path)
                self.send_error(404)

            do_POST = do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.calls = calls
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def canary() -> Iterator[Canary]:
    made = Canary()
    yield made
    made.close()


# paths


PATHS = (
    "/page/../settings.py",
    "/page/../../../../../../etc/passwd",
    "/page/..%2fsettings.py",
    "/page/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/page/%2e%2e/settings.py",
    "/page/%2e%2e%2fsettings.py",
    "/page/..%5csettings.py",
    "/page/..%252fsettings.py",
    "/page/....//settings.py",
    "/page//etc/passwd",
    "/page/%2fetc%2fpasswd",
    "/page/index.html%00.js",
    "/page/.",
    "/page/",
    "/../../../../etc/passwd",
    "//etc/passwd",
    "/v1/jobs/../../../etc/passwd",
    "/v1/jobs/..%2f..%2f..%2fetc%2fpasswd",
    "/.env",
    "/.git/config",
    "/docs",
    "/redoc",
)


def test_no_path_leads_out_of_the_page(gateway: Gateway) -> None:
    """Sent as they are: a client's library would tidy them."""
    for path in PATHS:
        answer = raw(gateway.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        # a job's id needs a key before anybody looks for the job
        assert head.split()[1] in (b"404", b"400", b"401"), (path, head)
        assert not INTERNALS.search(body.decode()), path


# requests that the gateway is talked into


URLS = (
    "http://169.254.169.254/latest/meta-data/",
    "https://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/",
    "http://2852039166/",
    "http://localhost:8080/metrics",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://images.example/a.png",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//images.example/a.png",
    "/etc/passwd",
    "",
    "http://images.example/a.png",
    "https://images.example:8443/a.png",
    "https://images.example.evil.example/a.png",
    "https://evil.example/images.example",
    "https://images.example@evil.example/a.png",
    "https://evil.example#@images.example/",
    "https://evil.example\\@images.example/",
    " https://images.example/a.png",
    "https://images.example\n.evil.example/",
    "https://ımages.example/a.png",
    "data:text/html;base64,PGgxPg==",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/png,notbase64",
    "data:image/png;base64,!!!!",
    f"data:image/jpeg;base64,{PNG}",
)


def test_no_url_goes_on_but_to_a_host_that_is_allowed(serve: Serve, settings: Settings, fake: Fake) -> None:
    with serve(settings.model_copy(update={"image_hosts": ["images.example"]})) as gateway:
        for url in URLS:
            error = is_told(gateway.client.post(CHAT, json=chat(url)), 400)
            assert error["param"] == "messages.0.content.0.image_url.url", url
            assert "evil" not in error["message"]
    assert fake.requests == []


def test_an_allowed_host_goes_on_and_is_not_fetched_here(serve: Serve, settings: Settings, fake: Fake) -> None:
    with serve(settings.model_copy(update={"image_hosts": ["images.example"]})) as gateway:
        url = "https://images.example/a.png"
        assert gateway.client.post(CHAT, json=chat(url)).status_code == 200
    assert fake.requests[0]["messages"][0]["content"][0]["image_url"]["url"] == url


def test_diagnose_fetches_nothing(gateway: Gateway, canary: Canary) -> None:
    for data in (f"{canary.url}/image.png", "file:///etc/passwd", "http://169.254.169.254/"):
        is_told(gateway.client.post(DIAGNOSE, json=ask(data)), 400)
    assert canary.calls == []


def test_an_upstreams_redirect_is_not_followed(serve: Serve, settings: Settings, canary: Canary) -> None:
    """Neither its answers nor its list of models lead the gateway, and its key, elsewhere."""

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(307)
            self.send_header("location", f"{canary.url}/stolen")
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirects)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        upstream = f"http://127.0.0.1:{server.server_port}/v1"
        with serve(settings.model_copy(update={"stable": upstream})) as gateway:
            assert gateway.client.get("/readyz").status_code == 503
            is_told(gateway.client.post(CHAT, json=chat(f"data:image/png;base64,{PNG}")), 502)
            is_told(gateway.client.post(DIAGNOSE, json=ask(PNG)), 502)
        assert canary.calls == []
    finally:
        server.shutdown()
        server.server_close()


# headers


@pytest.mark.parametrize(
    "value",
    [
        "a" * 65,
        "short",
        "with blank",
        "tab\there",
        'quote"quote',
        "<script>",
        "aaaaaaaa%0d%0aSet-Cookie: x=1",
        "ünïcödé",
    ],
)
def test_a_request_id_that_is_none_is_not_taken_over(gateway: Gateway, value: str) -> None:
    answer = raw(
        gateway.url,
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value.encode() + b"\r\n\r\n",
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert value.encode() not in answer
    assert b"set-cookie" not in head.lower()
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head + b"\r\n")
    assert re.fullmatch(r"[0-9a-f]{32}", json.loads(body)["error"]["request_id"])


def test_nothing_of_a_path_comes_back_in_headers(gateway: Gateway) -> None:
    for path in ("/page/%0d%0aSet-Cookie:%20x=1", "/v1/models?x=%0d%0aSet-Cookie:%20x=1", "/%0d%0aX-Bad:%201/"):
        answer = raw(gateway.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"set-cookie" not in head
        assert b"x-bad" not in head
        assert b"location" not in head


def test_other_sites_are_given_nothing(gateway: Gateway) -> None:
    """No CORS: a page of another origin may not read answers, and no preflight allows it to ask."""
    evil = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (
        gateway.client.options(DIAGNOSE, headers=evil),
        gateway.client.get("/v1/models", headers=evil),
        gateway.client.get("/", headers=evil),
    ):
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_only_the_hosts_that_are_allowed(serve: Serve, settings: Settings) -> None:
    with serve(settings.model_copy(update={"allowed_hosts": ["gateway.example"]})) as gateway:
        for host in ("evil.example", "gateway.example.evil.example", "", "gateway.example@evil.example"):
            is_told(gateway.client.get("/v1/models", headers={"host": host}), 421)
        assert gateway.client.get("/v1/models", headers={"host": "gateway.example:8080"}).status_code == 200


@pytest.mark.parametrize("size", [1 << 17, 1 << 24])
def test_oversized_headers_are_refused(settings: Settings, key: str, size: int) -> None:
    """In little memory, and the gateway goes on."""
    with gateway_process(settings) as running:
        before = running.resident
        head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\nX-Large: "
        answer = raw(running.url, head.encode() + b"a" * size + b"\r\n\r\n")
        assert not answer.startswith(b"HTTP/1.1 200")
        assert running.resident - before < 8 * MEBI
        assert running.client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: -1",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding : chunked",
        "Content-Length: 0x5",
        "Content-Length: 99999999999999999999999",
        " Folded: yes",
    ],
)
def test_requests_that_two_servers_could_read_differently(gateway: Gateway, head: str) -> None:
    """Request smuggling: what comes after such a head is never answered as a second request."""
    smuggled = "0\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{smuggled}"
    answer = raw(gateway.url, request.encode(), 3)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert b"200 OK" not in answer
    assert gateway.client.get("/livez").status_code == 200


# bodies


def test_a_body_that_is_too_large_by_its_length_is_not_read(serve: Serve, settings: Settings, key: str) -> None:
    with serve(settings.model_copy(update={"max_body": 1 << 16})) as gateway:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {1 << 40}\r\n\r\n"
        began = time.monotonic()
        answer = raw(gateway.url, head.encode(), 5)
        assert answer.startswith(b"HTTP/1.1 413")
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("path", [CHAT, DIAGNOSE, "/v1/jobs", "/v1/feedback", "/v1/preview"])
def test_a_body_without_a_length_is_read_no_further_than_its_limit(
    serve: Serve, settings: Settings, key: str, path: str
) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64 * MEBI:
            sent += 1 << 16
            yield b'{"messages": "' + b" " * (1 << 16)

    with serve(settings.model_copy(update={"max_body": 1 << 18, "max_image_bytes": 1 << 18})) as gateway:
        try:
            answer = gateway.client.post(path, content=endless(), headers={"content-type": "application/json"})
        except httpx.TransportError:
            pass  # it was cut off while it was sent
        else:
            is_told(answer, 413)
        assert sent < 48 * MEBI
        assert gateway.client.get("/livez").status_code == 200


@pytest.mark.parametrize("path", [CHAT, DIAGNOSE])
def test_a_body_that_never_ends_is_cut_off(serve: Serve, settings: Settings, key: str, path: str) -> None:
    with serve(settings.model_copy(update={"deadline": 1.0})) as gateway:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        began = time.monotonic()
        answer = raw(gateway.url, f"{head}Content-Length: 1000\r\n\r\n{{".encode(), 8)
        assert answer.startswith(b"HTTP/1.1 408")
        assert 0.5 < time.monotonic() - began < 5
        assert b"body-too-slow" in answer


def test_a_forms_headers_have_a_limit(settings: Settings, key: str) -> None:
    """A part's header as long as the body may be: refused, and quickly."""
    part = b'--x\r\nContent-Disposition: form-data; name="image"\r\nX-Large: ' + b"a" * (32 * MEBI)
    with gateway_process(settings) as running:
        began = time.monotonic()
        headers = {"content-type": "multipart/form-data; boundary=x", "authorization": f"Bearer {key}"}
        answer = running.client.post(DIAGNOSE, content=part + b"\r\n\r\nx\r\n--x--\r\n", headers=headers)
        is_told(answer, 400)
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_head_that_never_ends_is_cut_off(settings: Settings) -> None:
    """Half-sent heads would take every connection, and need no key."""
    with gateway_process(settings) as running:
        began = time.monotonic()
        answer = raw(running.url, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: ", 25)
        assert time.monotonic() - began < 20
        assert not answer.startswith(b"HTTP/1.1 200")
