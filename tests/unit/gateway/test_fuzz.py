"""Random, cut and bit-flipped files and texts: a picture or one clear refusal, in bounded time and memory."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from serving.gateway.errors import GatewayError
from serving.gateway.images import read_picture
from serving.gateway.settings import Settings

LIMITS = Settings(_env_file=None, max_pixels=1_000_000, max_side=256)
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SECONDS, MEMORY = 5.0, 256 << 20
pytestmark = pytest.mark.filterwarnings("ignore")


def _image(kind: str, mode: str = "L") -> bytes:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (24, 31, 3), np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif.tobytes())
    return stream.getvalue()


def _sample(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(str(path)).read_bytes()


SEEDS = [
    *(_image(kind, mode) for kind in ("PNG", "TIFF") for mode in ("L", "RGB", "1")),
    *(_image("PNG", mode) for mode in ("P", "RGBA")),
    *(_image("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
    *(_sample(name) for name in ("MR_small.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm")),
    *(_sample(name) for name in ("SC_rgb_jpeg_dcmtk.dcm", "CT_small.dcm", "rtdose_rle.dcm")),
]


def attempt(data: bytes) -> None:
    """A picture within the limits or a refusal; anything else is an error of the gateway's."""
    began = time.monotonic()
    try:
        picture = read_picture(data, LIMITS, None, "images.0")
    except GatewayError as error:
        assert 400 <= error.status < 500
        assert error.param == "images.0"
    else:
        assert max(picture.size) <= 256
        assert picture.out.width * picture.out.height <= LIMITS.max_pixels
    assert time.monotonic() - began < SECONDS


@FUZZ
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0+", bytes(128) + b"DICM"]), st.binary()
)
def test_random_bytes(head: bytes, rest: bytes) -> None:
    attempt(head + rest)


@FUZZ
@given(st.sampled_from(SEEDS), st.floats(0, 1))
def test_files_cut_short(data: bytes, share: float) -> None:
    attempt(data[: int(len(data) * share)])


@FUZZ
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=12))
def test_flipped_bits(data: bytes, flips: list[tuple[float, int]]) -> None:
    changed = bytearray(data)
    for share, mask in flips:
        changed[min(len(data) - 1, int(share * len(data)))] ^= mask
    attempt(bytes(changed))


@FUZZ
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=12))
def test_flipped_headers(data: bytes, flips: list[tuple[int, int]]) -> None:
    """Where sizes, offsets and tags stand."""
    changed = bytearray(data)
    for at, value in flips:
        start = 128 if data[128:132] == b"DICM" else 0
        changed[min(len(data) - 1, start + at)] = value
    attempt(bytes(changed))


@FUZZ
@given(st.sampled_from(SEEDS), st.sampled_from(SEEDS), st.floats(0, 1))
def test_files_glued_together(first: bytes, second: bytes, share: float) -> None:
    attempt(first[: int(len(first) * share)] + second[int(len(second) * share) :])


@FUZZ
@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.sampled_from(["<", ">"]))
def test_tiff_directories(entries: int, count: int, offset: int, order: str) -> None:
    """Directories that claim to be anything."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    tags = [
        (256, 4, 1, count),
        (257, 4, 1, count),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, offset),
        (277, 3, 1, 1),
        (278, 4, 1, entries),
        (279, 4, 1, offset),
    ]
    body = struct.pack(f"{order}H", len(tags)) + b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    attempt(head + body + struct.pack(f"{order}I", offset % 64) + bytes(64))


@pytest.mark.parametrize("data", SEEDS)
def test_the_seeds_are_sound(data: bytes) -> None:
    assert read_picture(data, LIMITS, None, "images.0").data


@pytest.mark.parametrize("pages", [50_000])
def test_a_tiff_of_many_pages_takes_no_time(pages: int) -> None:
    """Each directory of 2 + 0 entries + 4 bytes; Pillow would need seconds to step through them."""
    body = b"".join(struct.pack("<HI", 0, 8 + 6 * (number + 1)) for number in range(pages - 1)) + struct.pack(
        "<HI", 0, 0
    )
    attempt(b"II*\0" + struct.pack("<I", 8) + body)


def test_memory_is_bounded() -> None:
    """What a refused file costs at its worst."""
    tracemalloc.start()
    try:
        for data in SEEDS:
            for at in range(0, min(len(data), 400), 29):
                changed = bytearray(data)
                changed[at] = 0xFF
                attempt(bytes(changed))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
