"""Images that are small when they are sent and huge when they are read."""

from __future__ import annotations

import base64
import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from serving.gateway.settings import Settings
from tests.integration.serving.attacks import CHAT, DIAGNOSE, MEBI, PNG, ask, chat, dicom, is_told, written
from tests.integration.serving.processes import Running, gateway_process
from tests.unit.gateway.fake import Fake


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
    packed = b"".join([*(packer.compress(bytes(16 * MEBI)) for _ in range(16)), packer.flush()])
    return small_png(8, 8, chunk(kind, b"x\0\0" + packed), zlib.compress(bytes(9 * 8)))


def wide_tiff() -> bytes:
    """A deflated TIFF of 400 million pixels, all black."""
    stream = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(stream, "TIFF", compression="tiff_adobe_deflate")
    return stream.getvalue()


def deflated_dicom() -> bytes:
    """256 MiB of zeros in a deflated DICOM file."""
    made = dicom(bytes(256 * MEBI), 16_384, 16_384)
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
    assert len(data) < 32 * MEBI
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
        assert _peak(running) - before < 160 * MEBI


def _peak(running: Running) -> int:
    """The most memory that the process has held, in bytes (proc(5))."""
    status = Path(f"/proc/{running.process.pid}/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found
    return int(found[1]) * 1024
