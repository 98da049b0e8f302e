"""DICOM files made by hand, with the pixels that a viewer would show worked out by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence

from serving.gateway.dicom import look_up, window
from serving.gateway.settings import Settings
from tests.unit.gateway.dicoms import dataset, frames, pixels, read, refused, table

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns of what these tests make


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


def test_without_a_window_the_range_of_the_pixels_counts(limits: Settings) -> None:
    assert pixels(dataset([[100, 300], [200, 100]]), limits).tolist() == [[0, 255], [128, 0]]


def test_a_window_by_hand(limits: Settings) -> None:
    """PS3.3 C.11.2.1.2.1: centre 50, width 101: 0 at 49.5 - 50 = -0.5, 255 at 99.5; 24.5 would be a quarter."""
    made = dataset([[0, 24, 49], [50, 99, 100]], WindowCenter=50, WindowWidth=101)
    expected = [round((x - 49.5) / 100 * 255 + 127.5) for x in (0, 24, 49, 50, 99)]
    assert pixels(made, limits).ravel().tolist() == [*expected, 255]
    assert expected[:2] == [1, 62]


def test_the_first_of_several_windows(limits: Settings) -> None:
    one = dataset([[0, 100, 200]], WindowCenter=100, WindowWidth=2)
    several = dataset([[0, 100, 200]], WindowCenter=[100, 0], WindowWidth=[2, 4000])
    assert pixels(one, limits).tolist() == pixels(several, limits).tolist() == [[0, 255, 255]]


def test_rescale_comes_before_the_window(limits: Settings) -> None:
    """Stored 0, 1000, 2000 are -1000, 0, 1000 Hounsfield units; a window of 2 around 0 cuts between the first two."""
    made = dataset([[0, 1000, 2000]], RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=-500, WindowWidth=2)
    assert pixels(made, limits).tolist() == [[0, 255, 255]]


def test_signed_values(limits: Settings) -> None:
    assert pixels(dataset([[-1000, 0, 1000]], "int16"), limits).tolist() == [[0, 128, 255]]


def test_32_bits(limits: Settings) -> None:
    assert pixels(dataset([[0, 2**31, 2**32 - 1]], "uint32"), limits).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_pydicoms(function: str) -> None:
    values = np.arange(0, 4096, 7, dtype=np.uint16)
    for center, width in ((2048, 4096), (100.5, 1), (300, 2.5), (-20, 77)):
        made = dataset([values], BitsStored=8, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
        reference = np.clip(apply_windowing(values, made), 0, 255)  # 8 bits stored: its output is 0 to 255
        ours = window(values.astype(np.float32), center, width, function)
        assert np.abs(ours - reference).max() <= 0.501, (center, width)


def test_a_window_of_width_1_is_a_threshold() -> None:
    """PS3.3 C.11.2.1.2.1: 0 up to and including centre - 0.5, 255 above it."""
    assert window(np.array([[99.0, 99.5, 99.6, 100.0]]), 100, 1, "LINEAR").tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowWidth": 0},
        {"WindowWidth": -5},
        {"WindowWidth": 0.5},
        {"VOILUTFunction": "CURVE"},
        {"VOILUTFunction": "SIGMOID", "WindowWidth": 0},
    ],
)
def test_windows_against_the_standard_are_refused(tags: dict[str, Any], limits: Settings) -> None:
    made = dataset([[0, 1]], **{"WindowCenter": 5, "WindowWidth": 5} | tags)
    assert refused(made, limits).code == "dicom-unreadable"


def test_monochrome1_is_inverted(limits: Settings) -> None:
    made = dataset([[0, 100, 300]], PhotometricInterpretation="MONOCHROME1")
    assert pixels(made, limits).tolist() == [[255, 170, 0]]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_does_not_count_and_is_black(photometric: str, limits: Settings) -> None:
    plain = dataset([[10, 20, 20]], PhotometricInterpretation=photometric)
    padded = dataset([[10, 20, 60000]], PhotometricInterpretation=photometric, PixelPaddingValue=60000)
    assert pixels(padded, limits)[0, :2].tolist() == pixels(plain, limits)[0, :2].tolist()
    assert pixels(padded, limits)[0, 2] == 0
    ranged = dataset(
        [[10, 20, 59000]], PhotometricInterpretation=photometric, PixelPaddingValue=60000, PixelPaddingRangeLimit=50000
    )
    assert pixels(ranged, limits).tolist() == pixels(padded, limits).tolist()


def test_signed_padding(limits: Settings) -> None:
    made = dataset([[-2000, 0, 10]], "int16", PixelPaddingValue=-2000)
    assert pixels(made, limits).tolist() == [[0, 0, 255]]


def test_nothing_but_padding_is_black(limits: Settings) -> None:
    assert pixels(dataset([[7, 7]], PixelPaddingValue=7), limits).tolist() == [[0, 0]]


def test_a_voi_table(limits: Settings) -> None:
    """First value 10, four entries of 8 bits: below 10 the first counts, above 13 the last."""
    made = dataset([[0, 10, 11, 12, 13, 99]], VOILUTSequence=Sequence([table((4, 10, 8), [0, 255, 51, 102])]))
    made.WindowCenter, made.WindowWidth = 5000, 1  # the table comes first
    assert pixels(made, limits).tolist() == [[0, 0, 255, 51, 102, 102]]


def test_a_voi_table_of_12_bits(limits: Settings) -> None:
    made = dataset([[0, 1, 2]], VOILUTSequence=Sequence([table((3, 0, 12), [0, 4095, 819])]))
    assert pixels(made, limits).tolist() == [[0, 255, 51]]


def test_a_modality_table_comes_before_the_window(limits: Settings) -> None:
    made = dataset([[0, 1, 2]], ModalityLUTSequence=Sequence([table((3, 0, 16), [500, 0, 1000])]))
    made.WindowCenter, made.WindowWidth = 250, 1
    assert pixels(made, limits).tolist() == [[255, 0, 255]]


def test_a_table_that_begins_below_zero() -> None:
    values, bits = look_up(np.array([-3, -2, -1, 0], np.int16), table((3, 65534, 8), [1, 2, 3]))
    assert (values.tolist(), bits) == ([1, 1, 2, 3], 8)


def test_a_table_that_is_too_short_is_refused(limits: Settings) -> None:
    made = dataset([[0, 1]], VOILUTSequence=Sequence([table((60000, 0, 8), [1, 2])]))
    assert refused(made, limits).code == "dicom-unreadable"


@pytest.mark.parametrize(("count", "asked", "read_"), [(1, None, 0), (2, None, 1), (7, None, 3), (7, 0, 0), (7, 6, 6)])
def test_a_frame_of_many(count: int, asked: int | None, read_: int, limits: Settings) -> None:
    picture = read(frames(count), limits, asked)
    assert (picture.out.frame, picture.out.frames) == (read_, count)
    assert pixels(frames(count), limits, asked)[0, 0] == round(read_ * 25.5)
    assert refused(frames(count), limits, count).code == "image-frame"


def test_a_long_film_is_taken_as_one_frame_is_decoded(limits: Settings) -> None:
    """Its frames together have more pixels than may be decoded at once."""
    settings = limits.model_copy(update={"max_pixels": 10})
    assert read(frames(100), settings).out.frames == 100


def test_frames_of_enhanced_files_have_windows_of_their_own(limits: Settings) -> None:
    def groups(intercept: int, center: float) -> Dataset:
        made, pixel, voi = Dataset(), Dataset(), Dataset()
        pixel.RescaleIntercept, pixel.RescaleSlope = intercept, 1
        voi.WindowCenter, voi.WindowWidth = center, 1
        made.PixelValueTransformationSequence, made.FrameVOILUTSequence = Sequence([pixel]), Sequence([voi])
        return made

    made = dataset([[[0, 10, 20]], [[0, 10, 20]]])
    made.PerFrameFunctionalGroupsSequence = Sequence([groups(0, 5), groups(-100, -85)])
    assert pixels(made, limits, 0).tolist() == [[0, 255, 255]]
    assert pixels(made, limits, 1).tolist() == [[0, 0, 255]]
    shared = dataset([[[0, 10, 20]], [[0, 10, 20]]])
    shared.SharedFunctionalGroupsSequence = Sequence([groups(0, 15)])
    assert pixels(shared, limits, 1).tolist() == [[0, 0, 255]]


def test_overlays_in_unused_bits_are_not_drawn(limits: Settings) -> None:
    """12 bits stored; the bits above are an overlay's."""
    made = dataset([[0xF000, 0x1800, 0x0FFF]], BitsStored=12, HighBit=11)
    plain = dataset([[0x0000, 0x0800, 0x0FFF]], BitsStored=12, HighBit=11)
    assert pixels(made, limits).tolist() == pixels(plain, limits).tolist() == [[0, 128, 255]]
    assert refused(dataset([[0, 1]], BitsStored=12, HighBit=15), limits).code == "dicom-unsupported"
    signed = dataset([[0x0800, 0x0000, 0x07FF]], BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert pixels(signed, limits).tolist() == [[0, 128, 255]]  # -2048, 0, 2047


def test_colour_and_planes(limits: Settings) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], np.uint8)
    assert pixels(dataset(colours, "uint8"), limits).tolist() == colours.tolist()
    planes = dataset(colours, "uint8", PlanarConfiguration=1, PixelData=colours.transpose(2, 0, 1).tobytes())
    assert pixels(planes, limits).tolist() == colours.tolist()


def test_ybr(limits: Settings) -> None:
    """Full-range Y 76, Cb 85, Cr 255 is red (ITU-T T.871)."""
    made = dataset(np.full((2, 2, 3), [76, 85, 255], np.uint8), "uint8", PhotometricInterpretation="YBR_FULL")
    assert np.abs(pixels(made, limits).astype(int) - [254, 0, 0]).max() <= 1


def palette(entries: list[tuple[int, int, int]], bits: int) -> Dataset:
    made = dataset([[0, 1, 2]], "uint8", PhotometricInterpretation="PALETTE COLOR")
    for number, colour in enumerate(("Red", "Green", "Blue")):
        setattr(made, f"{colour}PaletteColorLookupTableDescriptor", [len(entries), 0, bits])
        data = struct.pack(f"<{len(entries)}H", *(entry[number] for entry in entries))
        setattr(made, f"{colour}PaletteColorLookupTableData", data)
    return made


def test_palette_colour(limits: Settings) -> None:
    entries = [(0xFFFF, 0, 0), (0, 0x8000, 0), (0, 0, 0x0100)]
    assert pixels(palette(entries, 16), limits).tolist() == [[[255, 0, 0], [0, 128, 0], [0, 0, 1]]]
    small = [(255, 0, 0), (0, 128, 0), (0, 0, 1)]  # 8-bit entries that are declared as 16-bit ones
    assert pixels(palette(small, 16), limits).tolist() == [[[255, 0, 0], [0, 128, 0], [0, 0, 1]]]


def test_a_palette_that_is_missing_or_segmented_is_refused(limits: Settings) -> None:
    made = palette([(1, 2, 3)] * 3, 16)
    for colour in ("Red", "Green", "Blue"):
        delattr(made, f"{colour}PaletteColorLookupTableData")
        setattr(made, f"Segmented{colour}PaletteColorLookupTableData", struct.pack("<6H", 1, 65535, 9, 1, 65535, 1))
    assert refused(made, limits).code == "dicom-unsupported"


def test_pixels_are_made_square(limits: Settings) -> None:
    """Rows twice as far apart as columns: twice as high. The region's pixels still count the file's own."""
    tall = read(dataset([[0, 1], [2, 3]], PixelSpacing=[1.0, 0.5]), limits)
    assert (tall.size, tall.out.width, tall.out.height) == ((2, 4), 2, 2)
    assert read(dataset([[0, 1], [2, 3]], PixelAspectRatio=[1, 3]), limits).size == (6, 2)
    assert read(dataset([[0, 1], [2, 3]], PixelAspectRatio=[1, 1]), limits).size == (2, 2)
    for bad in ([0, 1], [1000, 1]):
        assert refused(dataset([[0, 1], [2, 3]], PixelAspectRatio=bad), limits).code == "dicom-unsupported"
