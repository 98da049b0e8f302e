"""Images: what they are, what is made of their pixels, and that nothing but pixels goes on."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from serving.gateway.errors import GatewayError
from serving.gateway.images import MAX_FRAMES, Picture, _tiff_offsets, read_picture, sniff
from serving.gateway.settings import Settings

NAME = b"DOE^JANE"


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(values: list[list[int]], dtype: str = "uint8") -> Image.Image:
    return Image.fromarray(np.array(values, dtype))


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def refused(data: bytes, limits: Settings, frame: int | None = None) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        read_picture(data, limits, frame, "images.0")
    assert caught.value.param == "images.0"
    assert caught.value.message.startswith("images.0: ")
    return caught.value


def test_a_png_keeps_its_pixels(limits: Settings) -> None:
    data = encoded(grey([[0, 10, 20], [30, 40, 250]]), "PNG")
    picture = read_picture(data, limits, None, "images.0")
    assert pixels(picture).tolist() == [[0, 10, 20], [30, 40, 250]]
    assert (picture.out.width, picture.out.height, picture.size) == (3, 2, (3, 2))
    assert picture.out.sha256 == hashlib.sha256(data).hexdigest()
    assert (picture.out.format, picture.out.frame, picture.out.frames) == ("png", None, 1)
    assert picture.media_type == "image/png"
    assert picture.statistics


def test_content_decides_never_the_name() -> None:
    assert sniff(b"\x89PNG\r\n\x1a\n" + b"\0" * 200) == "png"
    assert sniff(b"\xff\xd8\xff\xe0") == "jpeg"
    assert sniff(b"MM\0*" + b"\0" * 4) == "tiff"
    assert sniff(b"II*\0" + b"\0" * 124 + b"DICM") == "dicom"  # a preamble that looks like TIFF
    for other in (b"", b"GIF89a", b"BM", b"%PDF-1.7", b"<svg/>", b"DICM", b"RIFF0000WEBP"):
        assert sniff(other) is None


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + b"\0" * 500, b"%!PS-Adobe"])
def test_other_files_are_refused(data: bytes, limits: Settings) -> None:
    assert refused(data, limits).code == "image-format"


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_turns_the_picture(
    orientation: int, expected: list[list[int]], kind: str, limits: Settings
) -> None:
    """By hand, from the table of EXIF 2.32, 4.6.4 A: 6 means that the first row is the right-hand side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40
    picture = read_picture(encoded(Image.fromarray(values), kind, exif=exif.tobytes()), limits, None, "images.0")
    assert (pixels(picture) // 40).tolist() == expected
    assert picture.size == (len(expected[0]), len(expected)) == (picture.out.width, picture.out.height)


def test_a_jpeg_is_turned_too(limits: Settings) -> None:
    values = np.zeros((16, 32), np.uint8)
    values[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(values), "JPEG", quality=100, exif=exif.tobytes())
    shown = pixels(read_picture(data, limits, None, "images.0"))
    assert shown.shape == (32, 16)
    assert shown[:16].max() < 10
    assert shown[16:].min() > 245


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_own_range(kind: str, limits: Settings) -> None:
    data = encoded(grey([[1000, 2000], [1500, 1000]], "uint16"), kind)
    assert pixels(read_picture(data, limits, None, "images.0")).tolist() == [[0, 255], [128, 0]]


def test_float_grey_and_values_that_are_none(limits: Settings) -> None:
    values = np.array([[0.0, 1.0], [np.nan, 0.5]], np.float32)
    data = encoded(Image.fromarray(values), "TIFF")
    assert pixels(read_picture(data, limits, None, "images.0")).tolist() == [[0, 255], [0, 128]]
    nothing = encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    assert refused(nothing, limits).code == "image-unreadable"


def test_a_flat_image_is_black(limits: Settings) -> None:
    data = encoded(grey([[700, 700]], "uint16"), "PNG")
    assert pixels(read_picture(data, limits, None, "images.0")).tolist() == [[0, 0]]


def test_transparent_pixels_become_black(limits: Settings) -> None:
    values = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    shown = pixels(read_picture(encoded(Image.fromarray(values), "PNG"), limits, None, "images.0"))
    assert shown[0, 0].tolist() == [200, 100, 50]
    assert shown[0, 1].tolist() == [0, 0, 0]
    assert np.allclose(shown[0, 2], [100, 50, 25], atol=1)


def test_palette_with_a_transparent_colour(limits: Settings) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    plain = pixels(read_picture(encoded(image, "PNG"), limits, None, "images.0"))
    assert plain.tolist() == [[[255, 0, 0], [0, 255, 0]]]
    clear = pixels(read_picture(encoded(image, "PNG", transparency=1), limits, None, "images.0"))
    assert clear.tolist() == [[[255, 0, 0], [0, 0, 0]]]


def test_cmyk(limits: Settings) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    shown = pixels(read_picture(encoded(image, "JPEG", quality=100), limits, None, "images.0"))
    assert np.abs(shown[8, 8].astype(int) - [255, 0, 0]).max() < 8


def test_bilevel(limits: Settings) -> None:
    data = encoded(Image.fromarray(np.array([[True, False]])), "PNG")
    assert pixels(read_picture(data, limits, None, "images.0")).tolist() == [[255, 0]]


def pages(count: int, big: bool = False) -> bytes:
    images = [Image.fromarray(np.full((4, 5), 10 * number, np.uint8)) for number in range(count)]
    return encoded(images[0], "TIFF", save_all=True, append_images=images[1:], big_tiff=big)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("count", "asked", "read"), [(1, None, 0), (2, None, 1), (5, None, 2), (5, 0, 0), (5, 4, 4), (4, None, 2)]
)
def test_a_page_of_a_tiff(count: int, asked: int | None, read: int, big: bool, limits: Settings) -> None:
    picture = read_picture(pages(count, big), limits, asked, "images.0")
    assert (picture.out.frame, picture.out.frames) == (read, count)
    assert set(pixels(picture).ravel()) == {10 * read}


@pytest.mark.parametrize("data", [pages(3), encoded(grey([[1]]), "PNG")])
def test_a_frame_that_is_not_there(data: bytes, limits: Settings) -> None:
    error = refused(data, limits, 3)
    assert error.code == "image-frame"
    assert read_picture(data, limits, 0, "images.0")


def test_pages_in_a_circle_end(limits: Settings) -> None:
    data = bytearray(pages(1))
    start = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, start)[0]
    struct.pack_into("<I", data, start + 2 + entries * 12, start)
    assert refused(bytes(data), limits).code == "image-unreadable"


def test_a_chain_of_too_many_pages_is_not_followed(limits: Settings) -> None:
    count = MAX_FRAMES + 1
    body = b"".join(struct.pack("<HI", 0, 8 + 6 * (number + 1)) for number in range(count))
    data = b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<HI", 0, 0)
    with pytest.raises(ValueError, match="chain"):
        _tiff_offsets(data)
    assert refused(data, limits).code == "image-unreadable"


def test_a_large_image_is_reduced_and_says_its_own_size(limits: Settings) -> None:
    settings = limits.model_copy(update={"max_side": 100})
    picture = read_picture(encoded(Image.new("L", (400, 200), 77), "PNG"), settings, None, "images.0")
    assert picture.size == (100, 50)
    assert (picture.out.width, picture.out.height) == (400, 200)
    assert set(pixels(picture).ravel()) == {77}
    small = read_picture(encoded(Image.new("L", (40, 20), 77), "PNG"), settings, None, "images.0")
    assert small.size == (40, 20)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large; its pixels are not there, so decoding it would fail otherwise."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 8000), (11_000, 11_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], limits: Settings) -> None:
    error = refused(bomb(*size), limits)
    assert (error.status, error.code) == (413, "image-too-large")


def test_the_limits_are_inclusive(limits: Settings) -> None:
    data = encoded(Image.new("L", (20, 10)), "PNG")
    settings = limits.model_copy(update={"max_pixels": 200, "max_image_bytes": len(data)})
    assert read_picture(data, settings, None, "images.0").size == (20, 10)
    assert refused(data, settings.model_copy(update={"max_pixels": 199})).status == 413
    assert refused(data, settings.model_copy(update={"max_image_bytes": len(data) - 1})).status == 413


def test_what_no_model_takes_is_refused(limits: Settings) -> None:
    assert refused(encoded(Image.new("L", (201, 1)), "PNG"), limits).code == "image-elongated"
    assert read_picture(encoded(Image.new("L", (200, 1)), "PNG"), limits, None, "images.0").size == (200, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_file_that_is_cut_short_is_refused(kind: str, limits: Settings) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.1, 0.5, 0.9):
        assert refused(data[: int(len(data) * share)], limits).code == "image-unreadable"


def test_no_metadata_goes_on(limits: Settings) -> None:
    exif = Image.Exif()
    exif[0x010E] = NAME.decode()  # ImageDescription
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", NAME.decode())
    info.add_itxt("Comment", NAME.decode())
    image = Image.new("RGB", (32, 32), (1, 2, 3))
    profile = b"\0" * 128 + NAME
    for data in (
        encoded(image, "PNG", pnginfo=info, exif=exif.tobytes(), dpi=(300, 300), icc_profile=profile) + NAME,
        encoded(image, "JPEG", comment=NAME, exif=exif.tobytes(), icc_profile=profile) + NAME,
        encoded(image, "TIFF", description=NAME.decode(), exif=exif.tobytes()) + NAME,
    ):
        assert NAME in data
        sent = read_picture(data, limits, None, "images.0").data
        assert NAME not in sent
        at, names = 8, []
        while at < len(sent):
            length = struct.unpack_from(">I", sent, at)[0]
            names.append(sent[at + 4 : at + 8])
            at += 12 + length
        assert at == len(sent)
        assert set(names) == {b"IHDR", b"IDAT", b"IEND"}


def test_messages_hold_nothing_of_the_file(limits: Settings) -> None:
    data = b"\x89PNG\r\n\x1a\n" + NAME * 40
    assert NAME.decode() not in refused(data, limits).message


def test_a_jpeg_of_endless_scans_is_refused(limits: Settings) -> None:
    """Each scan is a few bytes, and costs as much as the whole picture."""
    data = encoded(Image.new("L", (512, 512), 99), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    assert read_picture(data, limits, None, "images.0").size == (512, 512)
    assert refused(data[:last] + data[last:-2] * 1000 + data[-2:], limits).code == "image-unreadable"
