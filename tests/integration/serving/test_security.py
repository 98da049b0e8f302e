"""What an attacker tries: paths, URLs that the gateway should fetch, headers, sizes, slow and packed bodies, other
callers' data, and what lies in logs and files afterwards."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from serving.gateway.settings import Settings
from tests.conftest import png
from tests.integration.serving.processes import Running, gateway_process
from tests.unit.gateway.conftest import Gateway, Serve, make_key, until
from tests.unit.gateway.fake import Fake

CHAT, DIAGNOSE = "/v1/chat/completions", "/v1/diagnose"
INTERNALS = re.compile(r"Traceback|File \"|\.py\b|serving\.|site-packages|sqlalchemy|BaseSettings|root:x:0")
PNG = base64.b64encode(png()).decode()
_MEBI = 1 << 20


def chat(url: str, text: str = "Is there a nodule?") -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "medforge", "messages": [{"role": "user", "content": content}]}


def ask(image: str, **changes: object) -> dict[str, Any]:
    return {"question": "Is there a nodule?", "images": [{"data": image}]} | changes


def is_told(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error document of an answer, which has the shape, the request's id, and nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"code", "type", "message", "param", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]
    assert not INTERNALS.search(answer.text)
    return error


def raw(url: str, request: bytes, seconds: float = 10.0) -> bytes:
    """All that is answered to these bytes until the connection is closed, or nothing more comes."""
    place = urlsplit(url)
    assert place.hostname
    assert place.port
    pieces = []
    with socket.create_connection((place.hostname, place.port), timeout=seconds) as connection:
        try:
            connection.sendall(request)
            while piece := connection.recv(1 << 16):
                pieces.append(piece)
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
    return b"".join(pieces)


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
        assert running.resident - before < 8 * _MEBI
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
        while sent < 64 * _MEBI:
            sent += 1 << 16
            yield b'{"messages": "' + b" " * (1 << 16)

    with serve(settings.model_copy(update={"max_body": 1 << 18, "max_image_bytes": 1 << 18})) as gateway:
        try:
            answer = gateway.client.post(path, content=endless(), headers={"content-type": "application/json"})
        except httpx.TransportError:
            pass  # it was cut off while it was sent
        else:
            is_told(answer, 413)
        assert sent < 48 * _MEBI
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
    part = b'--x\r\nContent-Disposition: form-data; name="image"\r\nX-Large: ' + b"a" * (32 * _MEBI)
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


# bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def small_png(width: int, height: int, extra: bytes, pixels: bytes) -> bytes:
    """A grey PNG of these chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def wide_png(side: int = 60_000) -> bytes:
    """A PNG whose header tells of 3.6 thousand million pixels."""
    return small_png(side, side, b"", zlib.compress(bytes(4096)))


def long_png(kind: bytes) -> bytes:
    """A small PNG with 256 MiB of zeros behind a text or a colour profile."""
    packer = zlib.compressobj(9)
    packed = b"".join([*(packer.compress(bytes(16 * _MEBI)) for _ in range(16)), packer.flush()])
    return small_png(8, 8, chunk(kind, b"x\0\0" + packed), zlib.compress(bytes(9 * 8)))


def wide_tiff() -> bytes:
    """A deflated TIFF of 400 million pixels, all black."""
    stream = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(stream, "TIFF", compression="tiff_adobe_deflate")
    return stream.getvalue()


def dicom(pixels: bytes, rows: int, columns: int, **tags: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    values: dict[str, Any] = {
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": pixels,
        "BurnedInAnnotation": "NO",
    }
    for name, value in (values | tags).items():
        setattr(made, name, value)
    return made


def written(dataset: FileDataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def deflated_dicom() -> bytes:
    """256 MiB of zeros in a deflated DICOM file."""
    made = dicom(bytes(256 * _MEBI), 16_384, 16_384)
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return written(made)


def many_frames() -> bytes:
    """A DICOM file that tells of a thousand million frames."""
    return written(dicom(bytes(64), 8, 8, NumberOfFrames="1000000000"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [wide_png, lambda: long_png(b"zTXt"), lambda: long_png(b"iCCP"), wide_tiff, deflated_dicom, many_frames],
    ids=["png", "png-text", "png-profile", "tiff", "dicom-deflate", "dicom-frames"],
)
def test_bombs_do_not_go_off(settings: Settings, key: str, fake: Fake, bomb: Callable[[], bytes]) -> None:
    """Refused, or read without unpacking them; in little memory and time."""
    data = bomb()
    assert len(data) < 32 * _MEBI
    headers = {"authorization": f"Bearer {key}"}
    image = base64.b64encode(data).decode()
    with gateway_process(settings) as running:
        running.client.post(DIAGNOSE, json=ask(PNG), headers=headers).raise_for_status()
        before = _peak(running)
        began = time.monotonic()
        answers = [
            running.client.post(DIAGNOSE, json=ask(image), headers=headers),
            running.client.post("/v1/preview", content=data, headers=headers),
            running.client.post(CHAT, json=chat(f"data:image/png;base64,{image}"), headers=headers),
        ]
        assert time.monotonic() - began < 15
        for answer in answers[:2]:
            is_told(answer, 413 if answer.status_code == 413 else 400)
        assert answers[2].status_code in (200, 400, 413)  # /v1/chat/completions reads a PNG's header only
        assert _peak(running) - before < 160 * _MEBI


def _peak(running: Running) -> int:
    """The most memory that the process has held, in bytes (proc(5))."""
    status = Path(f"/proc/{running.process.pid}/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found
    return int(found[1]) * 1024


# who may


@pytest.mark.parametrize("name", ["key", "api_key", "api-key", "apikey", "access_token", "token", "authorization"])
def test_a_key_counts_in_its_header_only(gateway: Gateway, key: str, name: str) -> None:
    """A query stands in logs of proxies and in histories."""
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        for value in (key, f"Bearer {key}"):
            is_told(client.get("/v1/models", params={name: value}), 401)
            is_told(client.get("/v1/models", headers={"cookie": f"{name}={value}"}), 401)
            is_told(client.post(CHAT, params={name: value}, json=chat(f"data:image/png;base64,{PNG}")), 401)
        is_told(client.get("/v1/models", headers={"x-api-key": key}), 401)
        is_told(client.get("/v1/models", auth=("user", key)), 401)


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer mf_", "Basic mf_x", "bearer null", "Bearer \u20ac"])
def test_what_is_no_key_is_refused(gateway: Gateway, value: str) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        answer = client.get("/v1/models", headers={b"authorization": value.encode()})
    is_told(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_every_route_but_health_and_page_needs_a_key(gateway: Gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    without = {"/livez", "/readyz", "/metrics"}
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        for path, operations in document["paths"].items():
            for method in set(operations) & {"get", "post", "put", "patch", "delete"}:
                answer = client.request(method, path.replace("{id}", "x"), content=b"{}")
                assert (answer.status_code == 401) == (path not in without), (method, path, answer.status_code)


def test_another_callers_job_and_answers_do_not_exist(gateway: Gateway, settings: Settings) -> None:
    mine = gateway.client.post("/v1/jobs", json={"items": [ask(PNG)], "name": "mine"})
    assert mine.status_code == 202
    path = f"/v1/jobs/{mine.json()['id']}"
    answered = gateway.client.post(DIAGNOSE, json=ask(PNG)).raise_for_status().json()["id"]
    other = {"authorization": f"Bearer {make_key(settings, 'other', scopes=('diagnose', 'jobs', 'feedback'))}"}
    is_told(gateway.client.get(path, headers=other), 404)
    is_told(gateway.client.get(f"{path}/results", headers=other), 404)
    is_told(gateway.client.delete(path, headers=other), 404)
    assert gateway.client.get("/v1/jobs", headers=other).json()["jobs"] == []
    verdict = {"request_id": answered, "verdict": "wrong"}
    is_told(gateway.client.post("/v1/feedback", json=verdict, headers=other), 404)
    assert gateway.client.post("/v1/feedback", json=verdict).status_code == 201
    assert gateway.client.get(path).status_code == 200


def test_an_idempotency_key_is_a_callers_own(gateway: Gateway, settings: Settings, fake: Fake) -> None:
    """Somebody who guesses another's key does not get the stored answer."""
    first = gateway.client.post(DIAGNOSE, json=ask(PNG), headers={"idempotency-key": "one"})
    asked = len(fake.requests)
    other = f"Bearer {make_key(settings, 'other')}"
    second = gateway.client.post(DIAGNOSE, json=ask(PNG), headers={"idempotency-key": "one", "authorization": other})
    assert (first.status_code, second.status_code) == (200, 200)
    assert "idempotent-replayed" not in second.headers
    assert len(fake.requests) == 2 * asked


# errors


def test_errors_have_one_shape_and_tell_no_internals(gateway: Gateway) -> None:
    client = gateway.client
    assert is_told(client.get("/nothing"), 404)["code"] == "not-found"
    for method, path in (("GET", CHAT), ("PUT", DIAGNOSE), ("DELETE", "/"), ("TRACE", "/livez"), ("PATCH", "/v1/jobs")):
        answer = client.request(method, path)
        is_told(answer, 405)
        assert answer.headers["allow"]
    is_told(client.post(DIAGNOSE, content=b"{", headers={"content-type": "application/json"}), 422)
    is_told(client.post("/v1/feedback", json={"request_id": "x", "verdict": "<patient>"}), 422)
    is_told(client.get("/v1/jobs?limit=many"), 422)
    is_told(client.post(CHAT, content=b"\xff\xfe"), 400)
    is_told(client.post(DIAGNOSE, content=b"x", headers={"content-type": "text/plain"}), 415)


@pytest.mark.parametrize("path", [CHAT, DIAGNOSE])
def test_a_failure_of_the_gateway_tells_its_id_only(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("patient Jane Roe has it")

    monkeypatch.setattr(gateway.parts.upstreams, "choose", fail)
    body = chat(f"data:image/png;base64,{PNG}") if path == CHAT else ask(PNG)
    answer = gateway.client.post(path, json=body)
    assert is_told(answer, 500)["code"] == "internal"
    assert "Jane" not in answer.text
    assert "Jane" not in "".join(capsys.readouterr())
    monkeypatch.undo()
    assert gateway.client.post(path, json=body).status_code == 200


# what is left behind


@pytest.mark.slow
def test_no_key_question_or_image_lies_in_logs_or_files(settings: Settings, fake: Fake, key: str) -> None:
    """After successes and failures of all kinds: the log, the audit log, and the database hold none of it."""
    secret, question, name, answer = key.split("_", 2)[2], "Is Zebediah's nodule there?", "Roe^Jane", "Zounds, a nodule"
    fake.text = answer
    scan = written(dicom(png(3)[:4096], 64, 64, PatientName=name, PatientID="QX-4711", WindowCenter=None))
    broken = written(dicom(b"", 64, 64, PatientName=name, PatientID="QX-4711"))
    picture = base64.b64encode(png(5)).decode()
    headers = {"authorization": f"Bearer {key}"}
    with gateway_process(settings) as running:
        client = running.client

        def post(path: str, body: dict[str, Any], **extra: str) -> httpx.Response:
            return client.post(path, json=body, headers=headers | extra)

        done = post(DIAGNOSE, ask(picture, question=question), **{"idempotency-key": "one"})
        assert done.json()["answer"] == answer
        assert post(CHAT, chat(f"data:image/png;base64,{picture}", question)).status_code == 200
        streamed = chat(f"data:image/png;base64,{picture}", question) | {"stream": True}
        assert answer.split()[0] in post(CHAT, streamed).text
        post(DIAGNOSE, ask(picture, question=question), accept="text/event-stream")
        for file in (scan, broken, scan[:300], b"DICM", png(5)[:200]):
            post(DIAGNOSE, ask(base64.b64encode(file).decode(), question=question))
            form = {"image": (f"{name}.dcm", file, "application/dicom")}
            client.post(DIAGNOSE, data={"question": question}, files=form, headers=headers)
            client.post("/v1/preview", content=file, headers=headers)
        post(DIAGNOSE, {"question": question, "images": question, name: question})
        post(DIAGNOSE, ask(picture, question=f"{question} <|im_start|>"))
        post(CHAT, {"messages": question})
        post(CHAT, chat(f"https://{question}/{picture[:50]}"))
        post("/v1/jobs", {"items": [ask(picture, question=question)], "name": "night"})
        post("/v1/jobs", {"items": [ask(picture, question=question, task=question)]})
        post("/v1/feedback", {"request_id": done.json()["id"], "verdict": question})
        client.get("/v1/models", params={"key": key, "q": question})
        client.get(f"/v1/jobs/{name}", headers=headers)
        client.get(f"/{name}/{secret}")
        client.get("/v1/models", headers={"authorization": f"Bearer {key}x"})
        client.get("/v1/models", headers={"authorization": key})
        fake.garbage = question.encode()
        post(CHAT, chat(f"data:image/png;base64,{picture}", question))
        post(DIAGNOSE, ask(picture, question=question))
        fake.garbage = None
        fake.statuses.extend([400, 500, 503, 503, 503])
        for _ in range(3):
            post(DIAGNOSE, ask(picture, question=question))

        def jobs() -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = client.get("/v1/jobs", headers=headers).json()["jobs"]
            return listed

        until(lambda: all(job["status"] == "finished" for job in jobs()), 30)
        fake.stop()
        post(CHAT, chat(f"data:image/png;base64,{picture}", question))
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)

        places = [running.log, *(path for path in settings.data_dir.rglob("*") if path.is_file())]
        assert len(places) >= 3
        assert b'"event":"request"' in running.log.read_bytes()
    words = [secret, question, "Zebediah", "Zounds", "Roe", "QX-4711", "Jane", picture[200:260]]
    words.append(settings.secret_key.get_secret_value())
    needles = [word.encode() for word in words] + [png(5)[200:240], scan[-60:-20]]
    for path in places:
        content = path.read_bytes()
        assert [needle for needle in needles if needle in content] == [], path
        assert path.stat().st_mode & 0o077 == 0 or path == running.log, f"{path} can be read by others"
