"""DICOM files made by hand, and how the gateway reads them."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture, read_picture
from serving.gateway.settings import Settings

NAME = "Doe^Jane"


def dataset(values: Any, dtype: str = "uint16", **tags: Any) -> Dataset:
    """A secondary capture of these stored values; `tags` are added, None removes one."""
    array = np.asarray(values, dtype)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    made.PatientName, made.PatientID = NAME, "4711"
    colour = dtype == "uint8" and array.shape[-1] == 3 and array.ndim > 2
    made.Rows, made.Columns = array.shape[-3:-1] if colour else array.shape[-2:]
    made.SamplesPerPixel = 3 if colour else 1
    made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        made.PlanarConfiguration = 0
    if array.ndim - colour == 3:
        made.NumberOfFrames = array.shape[0]
    bits = array.dtype.itemsize * 8
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.PixelRepresentation = int(array.dtype.kind == "i")
    made.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def file(made: Dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, made, enforce_file_format=True)
    return stream.getvalue()


def pixels(data: bytes | Dataset, limits: Settings, frame: int | None = None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(read(data, limits, frame).data)))


def read(data: bytes | Dataset, limits: Settings, frame: int | None = None) -> Picture:
    return read_picture(file(data) if isinstance(data, Dataset) else data, limits, frame, "images.0")


def refused(data: bytes | Dataset, limits: Settings, frame: int | None = None) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        read(data, limits, frame)
    assert caught.value.param == "images.0"
    assert caught.value.__cause__ is None
    assert NAME not in caught.value.message
    return caught.value


def table(descriptor: tuple[int, int, int], data: list[int]) -> Dataset:
    made = Dataset()
    made.LUTDescriptor = list(descriptor)
    made.LUTData = struct.pack(f"<{len(data)}H", *data)
    made["LUTData"].VR = "OW"
    return made


def frames(count: int) -> Dataset:
    return dataset([[[100 * number, 0, 1000]] for number in range(count)], WindowCenter=500.5, WindowWidth=1001)
