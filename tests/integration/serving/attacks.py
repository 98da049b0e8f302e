"""What attackers send, and what they must be told."""

from __future__ import annotations

import base64
import io
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from tests.conftest import png

CHAT, DIAGNOSE = "/v1/chat/completions", "/v1/diagnose"
INTERNALS = re.compile(r"Traceback|File \"|\.py\b|serving\.|site-packages|sqlalchemy|BaseSettings|root:x:0")
PNG = base64.b64encode(png()).decode()
MEBI = 1 << 20


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
