"""A DICOM file's picture, as a viewer would show it: PS3.3 C.7.6.3 (pixels) and C.11 (lookup tables, windows).

Stored values → modality LUT or rescale → VOI LUT or window (the first of several; without any, the pixels' own range) →
8 bit; MONOCHROME1 inverted; colour as it is. Overlays are not drawn: they may hold names, and they are no tissue.

Only the tags that pictures need are read, so that a patient's name never becomes an object of this process, and no
message repeats a tag's value. Of a file with many frames only one is decoded. Sizes are checked before that: those
that the tags tell, and those inside the compressed frame, which decoders believe rather than the tags.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
import pydicom.config
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels import apply_color_lut, pixel_array

from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.images import MAX_FRAMES, Frame, check_pixels, pick_frame, to_bytes, too_many_scans

if TYPE_CHECKING:
    from serving.gateway.settings import Settings

TAGS = (
    *("BurnedInAnnotation", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "PixelAspectRatio", "PixelSpacing", "ModalityLUTSequence", "RescaleSlope"),
    *("RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData"),
)
# the functional groups of enhanced files that hold what else stands at the top
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # implicit, explicit, big endian
_RLE = "1.2.840.10008.1.2.5"
_ENCODED = (
    *(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70)),  # JPEG: baseline, extended, lossless
    *(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81)),  # JPEG-LS
    *(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203)),  # JPEG 2000, high-throughput too
)
_GREY = ("MONOCHROME1", "MONOCHROME2")
# the decoder, or pydicom, has made RGB of these when the pixels come
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_ASPECTS = (0.05, 20.0)

# What pydicom says of odd values quotes them. It is the caller who is told, by us, that a file is not sound.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def read_dicom(data: bytes, settings: Settings, frame: int | None, param: str) -> Frame:
    """The picture of a DICOM file, 8-bit grey or RGB. `frame` picks one of several, None the middle one.

    Raises GatewayError for files without a picture, with names drawn into it (by `settings.burned_in`), of a kind that
    is not taken, too large or broken.
    """
    try:
        return _read(data, settings, frame, param)
    except GatewayError:
        raise
    except Exception:  # pydicom and its decoders raise whatever broken bytes lead them to, and quote values
        raise _broken(param) from None


def _read(data: bytes, settings: Settings, frame: int | None, param: str) -> Frame:
    syntax = _transfer_syntax(data)
    if syntax not in (*_NATIVE, _RLE, *_ENCODED):
        message = "has a transfer syntax that is not taken (deflated, or a video); send it uncompressed or as JPEG 2000"
        raise bad_request("dicom-transfer-syntax", f"{param}: {message}", param)
    dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(TAGS))
    if "PixelData" not in dataset:
        message = "is a DICOM file without a picture, such as a report or a PDF; send the image's own file"
        raise bad_request("dicom-no-image", f"{param}: {message}", param)
    _check_annotation(dataset, settings, param)
    check_pixels(int(dataset.Columns), int(dataset.Rows), settings, param)
    if dataset.BitsAllocated not in (8, 16, 32) or dataset.SamplesPerPixel not in (1, 3):
        raise _unsupported("its pixels are neither grey nor colour of 8, 16 or 32 bits", param)
    if dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise _unsupported("its HighBit is not BitsStored - 1, as PS3.5 8.1.1 asks", param)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= frames <= MAX_FRAMES:
        raise _broken(param)
    number = pick_frame(frame, frames, param)
    values = _stored(dataset, syntax, number, frames)
    sources = [*_groups(dataset, number), dataset]
    return Frame(Image.fromarray(_shown(values, dataset, sources, param)), number, frames, _aspect(sources, param))


def _broken(param: str) -> GatewayError:
    message = "is a DICOM file that cannot be read: it is broken, cut short or against the standard; export it again"
    return bad_request("dicom-unreadable", f"{param}: {message}", param)


def _unsupported(why: str, param: str) -> GatewayError:
    return bad_request("dicom-unsupported", f"{param}: {why}; export it as MONOCHROME2 or RGB", param)


def _transfer_syntax(data: bytes) -> str:
    """The transfer syntax of the file, read before the rest: a deflated rest would be unpacked whole, whatever its
    size."""
    stream = io.BytesIO(data)
    stream.seek(132)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    return str(meta.TransferSyntaxUID)


def _check_annotation(dataset: Dataset, settings: Settings, param: str) -> None:
    said = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if settings.burned_in == "allow" or said == "NO" or (said != "YES" and settings.burned_in == "refuse"):
        return
    why = "says that text is drawn into the picture" if said == "YES" else "does not say that no text is drawn into it"
    message = f"{why} (BurnedInAnnotation), which may name the patient; send it cleaned, with BurnedInAnnotation NO"
    raise bad_request("burned-in-annotation", f"{param}: {message}", param)


def _stored(dataset: Dataset, syntax: str, number: int, frames: int) -> np.ndarray:
    """One frame's stored values: [rows, columns], or [rows, columns, 3] as RGB."""
    if syntax in _NATIVE:
        return pixel_array(dataset, index=number)  # without the bits above BitsStored: old files keep overlays there
    tables = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    offsets = tables if all(tables) else None
    coded = get_frame(dataset.PixelData, number, number_of_frames=frames, extended_offsets=offsets)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if syntax == _RLE:
        _check_runs(coded, rows * columns)
    elif coded_size(coded) != (columns, rows, dataset.SamplesPerPixel) or too_many_scans(coded):
        raise ValueError("the compressed frame has another size than the tags say")
    # what was checked is what is decoded: the frame alone, whatever the tables said
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in dataset:
            delattr(dataset, name)
    dataset.NumberOfFrames = 1
    dataset.PixelData = encapsulate([coded])
    return pixel_array(dataset, index=0)


def coded_size(coded: bytes) -> tuple[int, int, int]:
    """Width, height and components that a JPEG, JPEG-LS or JPEG 2000 stream tells of itself. ValueError for none.

    ITU-T T.81 B.2.2 (frame header), T.87 C.2.2 (its marker is 0xF7), T.800 A.5.1 (SIZ).
    """
    if coded[:4] == b"\xff\x4f\xff\x51":  # no JP2 boxes may stand before it (PS3.5 A.4.4)
        x1, y1, x0, y0 = struct.unpack_from(">4I", coded, 8)
        return x1 - x0, y1 - y0, struct.unpack_from(">H", coded, 40)[0]
    at = 2
    while coded[:2] == b"\xff\xd8" and at + 4 <= len(coded) and coded[at] == 0xFF:
        marker, length = coded[at + 1], struct.unpack_from(">H", coded, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width, components = struct.unpack_from(">HHB", coded, at + 5)
            return width, height, components
        if marker == 0xDE:
            raise ValueError("a hierarchical JPEG tells its size elsewhere")
        at += 1 if marker == 0xFF else 2 + length
    raise ValueError("no frame header of JPEG, JPEG-LS or JPEG 2000")


def _check_runs(coded: bytes, pixels: int) -> None:
    """ValueError when a segment of an RLE frame would unpack to more than a byte a pixel (PS3.5 G.3): two bytes can
    make 128, so a small file could fill the memory."""
    segments = struct.unpack_from("<I", coded)[0]
    if not 1 <= segments <= 15:
        raise ValueError("an RLE frame has 1 to 15 segments")
    bounds = (*struct.unpack_from(f"<{segments}I", coded, 4), len(coded))
    for at, stop in pairwise(bounds):
        made = 0
        while at < stop:
            head = coded[at]
            made += head + 1 if head < 128 else (257 - head) % 129
            at += head + 2 if head < 128 else 1 + (head > 128)
            if made > pixels + 128:
                raise ValueError("an RLE segment holds more than the picture")


def _groups(dataset: Dataset, number: int) -> Iterator[Dataset]:
    """What enhanced files tell of this frame, then of all frames."""
    for name, index in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(name) or []
        if index < len(items):
            yield from (items[index].get(group)[0] for group in _GROUPS if items[index].get(group))


def _told(sources: Sequence[Dataset], name: str) -> Any:
    """An attribute of the first source that has it with a value, else None."""
    values = (source.get(name) for source in sources)
    return next((value for value in values if value is not None and value != "" and value != []), None)


def _number(sources: Sequence[Dataset], name: str) -> float | None:
    """The same as a number: the first where there are several."""
    value = _told(sources, name)
    if value is None:
        return None
    number = float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is no finite number")
    return number


def _shown(stored: np.ndarray, dataset: Dataset, sources: Sequence[Dataset], param: str) -> np.ndarray:
    """Stored values as they are shown: uint8 of [rows, columns] or [rows, columns, 3]."""
    photometric = str(dataset.PhotometricInterpretation).strip()
    if photometric == "PALETTE COLOR":
        return _palette(stored, dataset, param)
    if stored.ndim == 3 and photometric in _COLOUR:
        return _high_byte(stored, int(dataset.BitsStored))
    if stored.ndim != 2 or photometric not in _GREY:
        raise _unsupported("its photometric interpretation is not taken", param)
    padding = _padding(stored, dataset)
    values = _modality(stored, sources)
    shown = _voi(values, padding, sources)
    if photometric == "MONOCHROME1":
        shown = 255 - shown
    if padding is not None:
        shown = np.where(padding, np.uint8(0), shown)  # it is no tissue, in either photometric interpretation
    return shown


def _high_byte(values: np.ndarray, bits: int) -> np.ndarray:
    return (values >> max(0, bits - 8)).astype(np.uint8)


def _palette(stored: np.ndarray, dataset: Dataset, param: str) -> np.ndarray:
    if "RedPaletteColorLookupTableData" not in dataset:
        # segmented tables describe ramps, and few bytes of them can describe a table that fills the memory
        raise _unsupported("its palette is missing or segmented", param)
    colours = apply_color_lut(stored, dataset)
    # some writers put 8-bit entries into tables that they declare as 16-bit ones
    return _high_byte(colours, 16 if colours.max() > 255 else 8)


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Where a pixel stands for no measurement, or None where the file names no such value (PS3.3 C.7.5.1.1.2)."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _modality(stored: np.ndarray, sources: Sequence[Dataset]) -> np.ndarray:
    if table := _told(sources, "ModalityLUTSequence"):
        return look_up(stored, table[0])[0]
    slope, intercept = _number(sources, "RescaleSlope"), _number(sources, "RescaleIntercept")
    kind: Any = np.float32 if stored.dtype.itemsize < 4 else np.float64  # 24 bits are exact in float32
    return stored.astype(kind) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _voi(values: np.ndarray, padding: np.ndarray | None, sources: Sequence[Dataset]) -> np.ndarray:
    if table := _told(sources, "VOILUTSequence"):
        shown, bits = look_up(values, table[0])
        return to_bytes(shown, 0, 2**bits - 1)
    center, width = _number(sources, "WindowCenter"), _number(sources, "WindowWidth")
    if center is not None and width is not None:
        return window(values, center, width, str(_told(sources, "VOILUTFunction") or "LINEAR").strip())
    measured = values if padding is None else values[~padding]
    if not measured.size:
        return np.zeros(values.shape, np.uint8)
    return to_bytes(values, float(measured.min()), float(measured.max()))


def window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values as 8-bit grey by a window: PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT).

    Raises ValueError for a width or a function that the standard does not know.
    """
    if function == "SIGMOID" and width > 0:
        exponent = np.clip(-4.0 * (values - center) / width, -80, 80)
        return to_bytes(1.0 / (1.0 + np.exp(exponent)), 0, 1)
    if function == "LINEAR_EXACT" and width > 0:
        return to_bytes(values, center - width / 2, center + width / 2)
    if function != "LINEAR" or width < 1:
        raise ValueError("the window is none of the standard's")
    if width == 1:
        return np.where(values > center - 0.5, np.uint8(255), np.uint8(0))
    return to_bytes(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def look_up(values: np.ndarray, table: Dataset) -> tuple[np.ndarray, int]:
    """Values through a lookup table, and the bits of its entries; beyond the table its ends count (PS3.3 C.11.1.1)."""
    entries, first, bits = (int(part) for part in table.LUTDescriptor)
    entries = entries or 1 << 16
    if first >= 1 << 15 and values.min() < 0:
        first -= 1 << 16  # a signed number that was read as an unsigned one
    if not 8 <= bits <= 16:
        raise ValueError("a lookup table has entries of 8 to 16 bits")
    data = table.LUTData
    if isinstance(data, bytes):
        wide = len(data) >= 2 * entries
        data = np.frombuffer(data, np.dtype(">u2" if table.original_encoding[1] is False else "<u2") if wide else "u1")
    numbers = np.atleast_1d(np.asarray(data, dtype=np.int64))
    if len(numbers) < entries:
        raise ValueError("a lookup table is shorter than it says")
    # a modality's values need not be whole numbers
    return numbers[np.clip(np.floor(values) - first, 0, entries - 1).astype(np.int64)], bits


def _aspect(sources: Sequence[Dataset], param: str) -> float:
    """How much taller than wide a pixel is: row spacing over column spacing, or the ratio that the file tells."""
    told = _told(sources, "PixelSpacing") or _told(sources, "PixelAspectRatio")
    if told is None:
        return 1.0
    rows, columns = (float(value) for value in told)
    ratio = rows / columns if rows > 0 and columns > 0 else math.nan
    if not _ASPECTS[0] <= ratio <= _ASPECTS[1]:  # a NaN too
        raise _unsupported("its pixels' aspect ratio (PixelSpacing, PixelAspectRatio) is none that can be shown", param)
    return ratio
