"""What is looked at before a request of /v1/chat/completions goes on."""

from __future__ import annotations

import base64
import io
import json
import time
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from serving.gateway import looking
from serving.gateway.errors import GatewayError
from serving.gateway.looking import look
from serving.gateway.settings import Settings
from tests.conftest import png
from tests.unit.gateway.chatting import body, data_uri

HOSTS = ["images.example"]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://images.example/a.png", True),
        ("https://images.example:443/a.png", True),
        ("https://IMAGES.example/a.png", True),
        ("https://images.example:8443/a.png", False),
        ("http://images.example/a.png", False),
        ("https://images.example.evil.example/a.png", False),
        ("https://evil.example/images.example", False),
        ("https://user@images.example/a.png", False),
        ("https://images.example@evil.example/a.png", False),
        ("https://images.example\\@evil.example/", False),
        ("https://images.example\n.evil.example/", False),
        ("https://images.example:port/", False),
        ("https://[::1]/", False),
        ("https://imáges.example/", False),
    ],
)
def test_hosts_that_may_be_named(url: str, allowed: bool) -> None:
    settings = Settings(_env_file=None, image_hosts=HOSTS)
    data = json.dumps(body(url)).encode()
    if allowed:
        assert look(data, settings).body is data
    else:
        with pytest.raises(GatewayError) as caught:
            look(data, settings)
        assert caught.value.code == "image-url-refused"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
        {"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/"}},
        {"type": "input_image", "image_url": "http://169.254.169.254/"},
        {"image_url": "http://169.254.169.254/"},
        {"type": "text", "text": "x", "image_url": "http://169.254.169.254/"},
        {"type": "text", "text": "x", "video_url": "http://169.254.169.254/"},
        {"type": "image_url", "image_url": None, "uuid": "another-callers"},
        {"type": "image_url", "image_url": "http://169.254.169.254/"},
    ],
)
def test_no_other_part_makes_the_upstream_fetch(part: dict[str, Any]) -> None:
    data = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    with pytest.raises(GatewayError) as caught:
        look(data, Settings(_env_file=None, image_hosts=HOSTS))
    assert caught.value.status == 400


def test_a_bomb_is_measured_and_not_decoded(settings: Settings) -> None:
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")  # 400 megapixels in 50 KB
    began = time.monotonic()
    with pytest.raises(GatewayError) as caught:
        look(json.dumps(body(data_uri(stream.getvalue()))).encode(), settings)
    assert caught.value.status == 413
    assert time.monotonic() - began < 0.5


def test_a_header_behind_much_metadata_is_found(settings: Settings) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    Image.new("RGB", (40, 30)).save(stream, "JPEG", exif=exif, icc_profile=b"y" * 200_000)
    look(json.dumps(body(data_uri(stream.getvalue(), "jpeg"))).encode(), settings)


LIMITS = Settings(_env_file=None, max_images=2, max_image_bytes=100_000, max_pixels=64 * 48)
NOISE = base64.b64encode(bytes(range(256)) * 150).decode()  # of 38,400 bytes
PNG = data_uri(png())
WIDE = data_uri(png(width=65))
PADDED = data_uri(png() + bytes(range(256)) * 150)  # an image with bytes behind its end
BROAD = data_uri(png(width=65) + bytes(range(256)) * 150)
LARGE = PADDED + NOISE * 2
PIECES = st.one_of(
    st.sampled_from(["x", '"', "\\", "/", "}", "\n", "\u00e9", "\U0001f600", ";base64,", PNG]),
    st.just(";base64," + NOISE),
)
TEXTS = st.lists(PIECES, max_size=4).map("".join)
URLS = st.one_of(st.sampled_from([PNG, WIDE, PADDED, BROAD, LARGE, "data:image/png;base64," + NOISE]), TEXTS)
PARTS = st.one_of(
    URLS.map(lambda url: {"type": "image_url", "image_url": {"url": url}}),
    TEXTS.map(lambda text: {"type": "text", "text": text}),
)
CONTENTS = st.one_of(st.lists(PARTS, min_size=1, max_size=4), TEXTS)
BODIES = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.just("user"), "content": CONTENTS}), min_size=1, max_size=2
        )
    },
    optional={"model": TEXTS, "user": TEXTS},
)


def outcome(decide: Any) -> tuple[Any, ...]:
    try:
        return ("goes on", decide())
    except GatewayError as error:
        return (error.status, error.code, error.message, error.param)


@hypothesis_settings(max_examples=300, deadline=None)
@given(made=BODIES, ascii_only=st.booleans(), slashes=st.booleans(), data=st.data())
def test_what_is_left_out_changes_no_decision(made: Any, ascii_only: bool, slashes: bool, data: st.DataObject) -> None:
    text = json.dumps(made, ensure_ascii=ascii_only)
    if slashes:
        text = text.replace("/", "\\/")  # as PHP writes it
    if data.draw(st.booleans()):  # spoiled somewhere
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from(['"', "\\", ",", "}", "]", "{", ";base64,"])) + text[at:]
    sent = text.encode()

    def whole() -> bytes:  # read by the same rules
        return looking.Looked(sent, looking._check(sent, LIMITS)).named("medforge")

    assert outcome(lambda: look(sent, LIMITS).named("medforge")) == outcome(whole)


def test_most_of_an_image_is_left_out() -> None:
    sent = json.dumps(body(PADDED, PADDED)).encode()
    short = looking._shortened(sent, LIMITS)
    assert len(sent) > 100_000 > 10_000 > len(short)
    assert [part["type"] for part in json.loads(short)["messages"][0]["content"]] == ["image_url", "image_url", "text"]


@pytest.mark.parametrize("escaped", [NOISE[:4095] + "\n" + NOISE, NOISE + '"', NOISE + "\n" + NOISE])
def test_nothing_is_left_out_of_what_has_escapes(escaped: str) -> None:
    sent = json.dumps(body(PADDED, user=f";base64,{escaped}")).encode()
    assert looking._shortened(sent, LIMITS) is sent


def test_an_image_that_would_be_left_out_is_not_too_large() -> None:
    for url in (LARGE, LARGE + NOISE * 10):
        with pytest.raises(GatewayError) as caught:
            look(json.dumps(body(PNG, url)).encode(), LIMITS)
        assert (caught.value.status, caught.value.param) == (413, "messages.0.content.1.image_url.url")


def test_a_request_that_names_data_without_end_is_looked_at_in_time(settings: Settings) -> None:
    texts = [{"type": "text", "text": ";base64," * 250_000}, {"type": "text", "text": ";base64,\\" * 100_000}]
    sent = json.dumps({"messages": [{"role": "user", "content": texts}]}).encode()
    began = time.monotonic()
    look(sent, settings)
    assert time.monotonic() - began < 5, "it takes a blink, and minutes where each is looked for from the beginning"


def test_what_was_not_looked_at_may_not_be_json(settings: Settings) -> None:
    sent = json.dumps(body(model="another") | {PADDED: 1}).encode().replace(PADDED[-100:].encode(), b"\xff")
    looked = look(sent, settings)
    with pytest.raises(GatewayError) as caught:
        looked.named("medforge")
    assert (caught.value.status, caught.value.code) == (400, "json-invalid")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_sizes_of_png_are_those_that_pillow_reads(mode: str) -> None:
    stream = io.BytesIO()
    Image.new(mode, (123, 45)).save(stream, "PNG")
    assert looking._png_size(stream.getvalue()) == (123, 45)


def test_pillow_is_not_asked_for_a_sound_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking.Image, "open", lambda *_, **__: pytest.fail("it takes ten times as long"))
    look(json.dumps(body(PADDED, PNG)).encode(), LIMITS)


def header(width: int, height: int) -> bytes:
    """A PNG's signature and its first chunk, by the specification: section 5.2 and 11.2.2."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


def spoiled(at: int) -> bytes:
    data = bytearray(png())
    data[at] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [*map(spoiled, (0, 11, 17, 23, 24, 30)), header(0, 48) + bytes(5000), header(64, 0) + bytes(5000), header(64, 48),
     header(64, 48)[:30], png()[:40]],
)  # fmt: skip
def test_what_pillow_takes_for_no_png_is_none(data: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        look(json.dumps(body(data_uri(data))).encode(), LIMITS)
    assert caught.value.code == "image-invalid"
