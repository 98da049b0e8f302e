"""An image as a caller sends it, to pixels alone: PNG, JPEG, TIFF or DICOM in, an 8-bit PNG out.

- What a file is decides its content, never its name. Its header's size is checked before anything is decoded; above
  `settings.max_pixels`, Pillow's own guard against bombs (twice 89 million pixels) stays in force.
- What goes on is always encoded anew from the pixel array, so that no EXIF, GPS position, comment or DICOM tag can go
  on, nor anything behind a file's end. No file is passed on as it is, even one that seems to have no metadata: that
  would rest on a complete list of the places where a format can hide some.
- It is PNG: it is lossless, so a faint line is as it was; a second JPEG would blur it. Fast compression is enough, as
  the way to the upstream is short.
- Transparent pixels become black: in radiology black is the absence of signal, while white would read as bone,
  calcification or contrast agent.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from medforge.reference import image_statistics
from serving.gateway import api
from serving.gateway.errors import GatewayError, bad_request

if TYPE_CHECKING:
    from serving.gateway.settings import Settings

Kind = Literal["png", "jpeg", "tiff", "dicom"]
Size = tuple[int, int]  # width, height

MAX_ELONGATION = 200  # Qwen-VL's own limit
MAX_FRAMES = 100_000
_COMPRESSION = 1  # zlib's fastest
_ROWS = 64
_SCANS = 32  # of a progressive JPEG; libjpeg's own way of writing one has 10
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of what it reads only in part: half a picture, or an orientation that is lost, is no picture to judge.
# A filter for the process, as one for a call would be shared by all threads anyway.
warnings.filterwarnings("error", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Picture:
    """An image as it goes on: `data` is a PNG of `size` (width, height). `out` tells of the file as it was sent."""

    out: api.ImageOut
    data: bytes
    media_type: str
    size: Size
    statistics: Mapping[str, float]


@dataclass(frozen=True)
class Frame:
    """A decoded picture (8-bit grey or RGB), which frame of how many it is, and how much taller than wide its pixels
    are."""

    image: Image.Image
    number: int | None = None
    frames: int = 1
    aspect: float = 1.0


def read_picture(data: bytes, settings: Settings, frame: int | None, param: str) -> Picture:
    """The picture in a file's bytes; `frame` picks one of several, None the middle one.

    It blocks for as long as decoding takes: call it in a thread. Raises GatewayError 400 or 413, with `param` and the
    mend, for a file that is not taken.
    """
    if len(data) > settings.max_image_bytes:
        raise too_large(f"is of more than {settings.max_image_bytes} bytes", "a smaller file", param)
    kind = sniff(data)
    if kind is None:
        message = "is no PNG, JPEG, TIFF or DICOM file (with its 128-byte preamble); send one of these"
        raise bad_request("image-format", f"{param}: {message}", param)
    if kind == "dicom":
        from serving.gateway.dicom import read_dicom

        read = read_dicom(data, settings, frame, param)
    else:
        read = _read_raster(data, kind, settings, frame, param)
    width, height = read.image.size
    sent = _reduced(read, settings.max_side, param)
    out = api.ImageOut(
        sha256=hashlib.sha256(data).hexdigest(),
        format=kind,
        width=width,
        height=height,
        frame=read.number,
        frames=read.frames,
    )
    return Picture(out, _png(sent), "image/png", sent.size, image_statistics(sent))


def sniff(data: bytes) -> Kind | None:
    """What a file is, by its first bytes; None for anything else.

    DICOM comes first: its free preamble may look like a TIFF file, and its rules (burned-in names) must hold then.
    """
    if data[128:132] == b"DICM":
        return "dicom"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "tiff" if data.startswith(_TIFF_HEADS) else None


def too_large(what: str, mend: str, param: str) -> GatewayError:
    """413: an image of too many bytes or pixels."""
    return GatewayError(413, "image-too-large", f"{param}: {what}; send {mend}", param)


def check_pixels(width: int, height: int, settings: Settings, param: str) -> None:
    """GatewayError for a size that is not decoded: none, too large, or too elongated for the model."""
    if width < 1 or height < 1:
        raise bad_request("image-unreadable", f"{param}: has no width or no height", param)
    if width * height > settings.max_pixels:
        raise too_large(f"has more than {settings.max_pixels} pixels", "a smaller image", param)
    if max(width, height) > MAX_ELONGATION * min(width, height):
        message = f"is more than {MAX_ELONGATION} times longer than wide, which no model takes; crop it"
        raise bad_request("image-elongated", f"{param}: {message}", param)


def pick_frame(frame: int | None, frames: int, param: str) -> int:
    """The frame that is read: the one that was asked for, else the middle one (the later of two)."""
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        message = f"has {frames} frame{'s' * (frames > 1)}, numbered from 0; frame {frame} is none of them"
        raise bad_request("image-frame", f"{param}: {message}", param)
    return frame


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of [rows, columns] as 8-bit grey, `low` black and `high` white; a range without extent is black, and so
    is what is no number."""
    scale = 255.0 / (high - low) if high > low else 0.0
    shown = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):  # in floats, a large image would take much more room at once
        rows = slice(start, start + _ROWS)
        shown[rows] = np.nan_to_num(np.clip((values[rows] - low) * scale, 0, 255)).round()
    return shown


def _read_raster(data: bytes, kind: Kind, settings: Settings, frame: int | None, param: str) -> Frame:
    frames, number = 1, None
    if kind == "tiff":
        data, number, frames = _tiff_page(data, frame, param)
    elif frame is not None:
        pick_frame(frame, frames, param)
    if kind == "jpeg" and too_many_scans(data):
        raise _unreadable(kind, param)
    try:
        opened = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except Image.DecompressionBombError:
        raise too_large(f"has more than {settings.max_pixels} pixels", "a smaller image", param) from None
    except Exception:  # Pillow's readers raise whatever a broken header leads them to
        raise _unreadable(kind, param) from None
    check_pixels(*opened.size, settings, param)
    try:
        opened.load()
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
        image = _eight_bits(opened)
    except Exception:  # as above; a decoder, too, may raise anything, and its words may quote the file
        raise _unreadable(kind, param) from None
    return Frame(image.transpose(turn) if turn is not None else image, number, frames)


def too_many_scans(data: bytes) -> bool:
    """Whether a JPEG goes over its pixels so often that decoding it would take minutes: a scan may be a few bytes.

    No data byte looks like the marker that is counted (ITU-T T.81 F.1.2.3); a thumbnail in the metadata adds one.
    """
    return data.count(b"\xff\xda") > _SCANS


def _unreadable(kind: str, param: str) -> GatewayError:
    message = f"begins as a {kind.upper()} file but cannot be read: it is broken, cut short or of a rare kind"
    return bad_request("image-unreadable", f"{param}: {message}; export it again", param)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit grey or RGB. Grey of more bits is scaled by its own range, never cut off."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode != "F":
            return Image.fromarray(to_bytes(values, float(values.min()), float(values.max())))
        known = np.isfinite(values)
        low, high = values.min(initial=np.inf, where=known), values.max(initial=-np.inf, where=known)
        if low > high:
            raise ValueError("no pixel has a value")
        return Image.fromarray(to_bytes(values, float(low), float(high)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _tiff_page(data: bytes, frame: int | None, param: str) -> tuple[bytes, int, int]:
    """A TIFF file whose first page is the one that is asked for; that page's number; and how many there are.

    The chain of pages is walked by hand, two reads a page: Pillow would parse every page on its way, and a file may
    hold a million of them.
    """
    try:
        offsets = _tiff_offsets(data)
    except (struct.error, OverflowError, ValueError):
        raise _unreadable("tiff", param) from None
    number = pick_frame(frame, len(offsets), param)
    order, big = ("<" if data[:1] == b"I" else ">"), data[2:4] in (b"+\0", b"\0+")
    head = data[:8] + struct.pack(f"{order}Q", offsets[number]) if big else data[:4]
    head += b"" if big else struct.pack(f"{order}I", offsets[number])
    return head + data[len(head) :], number, len(offsets)


def _tiff_offsets(data: bytes) -> list[int]:
    """Where each page's directory begins (TIFF 6.0, section 2; BigTIFF has the same with 8-byte numbers)."""
    order, big = ("<" if data[:1] == b"I" else ">"), data[2:4] in (b"+\0", b"\0+")
    count_form, entry, offset_form = ("Q", 20, "Q") if big else ("H", 12, "I")
    at = struct.unpack_from(f"{order}{offset_form}", data, 8 if big else 4)[0]
    seen: dict[int, None] = {}
    while at:
        if at in seen or len(seen) >= MAX_FRAMES:
            raise ValueError("the pages' chain does not end")
        seen[at] = None
        entries = struct.unpack_from(f"{order}{count_form}", data, at)[0]
        after = at + struct.calcsize(count_form) + entries * entry
        if after > len(data):
            raise ValueError("a page's directory is cut off")
        at = struct.unpack_from(f"{order}{offset_form}", data, after)[0]
    if not seen:
        raise ValueError("it has no page")
    return list(seen)


def _reduced(read: Frame, max_side: int, param: str) -> Image.Image:
    """The picture with square pixels, its longer side at most `max_side`. It is never enlarged but to square pixels."""
    width, height = float(read.image.width), float(read.image.height)
    if read.aspect >= 1:
        height *= read.aspect
    else:
        width /= read.aspect
    scale = min(1.0, max_side / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if max(size) > MAX_ELONGATION * min(size):
        raise bad_request("image-elongated", f"{param}: is too elongated for the model; crop it", param)
    return read.image if size == read.image.size else read.image.resize(size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    """A PNG of the pixels; the array has nothing else to tell."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"compress_level": _COMPRESSION}
    Image.fromarray(np.asarray(image)).save(stream, "PNG", **options)
    return stream.getvalue()
