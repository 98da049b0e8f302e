"""DICOM files made by hand, with the pixels that a viewer would show worked out by hand, and pydicom's own samples."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from serving.gateway.dicom import coded_size, look_up, window
from serving.gateway.errors import GatewayError
from serving.gateway.images import Picture, read_picture
from serving.gateway.settings import Settings

NAME = "Doe^Jane"
pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns of what these tests make


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


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


def frames(count: int) -> Dataset:
    return dataset([[[100 * number, 0, 1000]] for number in range(count)], WindowCenter=500.5, WindowWidth=1001)


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


@pytest.mark.parametrize(
    ("policy", "said", "taken"),
    [
        ("refuse", "YES", False),
        ("refuse", " yes ", False),
        ("refuse", "NO", True),
        ("refuse", None, True),
        ("refuse-unless-no", "YES", False),
        ("refuse-unless-no", "NO", True),
        ("refuse-unless-no", None, False),
        ("refuse-unless-no", "MAYBE", False),
        ("allow", "YES", True),
    ],
)
def test_names_in_the_picture(policy: str, said: str | None, taken: bool, limits: Settings) -> None:
    settings = limits.model_copy(update={"burned_in": policy})
    made = dataset([[0, 1]])
    if said is not None:
        made.BurnedInAnnotation = said
    if taken:
        assert read(made, settings)
    else:
        error = refused(made, settings)
        assert error.code == "burned-in-annotation"
        assert ("does not say" in error.message) is (said in (None, "MAYBE"))


def test_files_without_a_picture(limits: Settings) -> None:
    report = dataset([[0, 1]], PixelData=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    assert refused(report, limits).code == "dicom-no-image"
    document = dataset([[0, 1]], PixelData=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1")
    document.EncapsulatedDocument = b"%PDF-1.7 "
    assert refused(document, limits).code == "dicom-no-image"


def test_sizes_are_checked_before_decoding(limits: Settings) -> None:
    large = dataset([[0, 1]], Rows=60000, Columns=60000)
    assert (refused(large, limits).status, refused(large, limits).code) == (413, "image-too-large")
    assert refused(dataset([[0, 1]], Rows=0), limits).status == 400
    assert refused(dataset([[0, 1]], Columns=0), limits).status == 400
    assert refused(dataset([[0, 1]], Rows=100, Columns=100), limits).code == "dicom-unreadable"  # too few bytes
    assert refused(dataset([[0, 1]], NumberOfFrames=10**8), limits).code == "dicom-unreadable"
    assert refused(dataset([[0, 1]], BitsAllocated=64), limits).code == "dicom-unsupported"
    assert refused(dataset([[0, 1]], PhotometricInterpretation="CMYK"), limits).code == "dicom-unsupported"


def encapsulated(frame: bytes, syntax: str, **tags: Any) -> Dataset:
    made = dataset([[0, 1]], "uint8", **tags)
    made.file_meta.TransferSyntaxUID = UID(syntax)
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return made


def jpeg(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), 100).save(stream, "JPEG")
    return stream.getvalue()


def test_a_compressed_frame_of_another_size_is_refused(limits: Settings) -> None:
    sound = encapsulated(jpeg(16, 8), "1.2.840.10008.1.2.4.50", Rows=8, Columns=16)
    assert pixels(sound, limits).shape == (8, 16)
    bomb = encapsulated(jpeg(3000, 2000), "1.2.840.10008.1.2.4.50", Rows=8, Columns=16)
    assert refused(bomb, limits).code == "dicom-unreadable"
    stream = io.BytesIO()
    Image.new("L", (64, 32)).save(stream, "JPEG2000", no_jp2=True)
    assert coded_size(stream.getvalue()) == (64, 32, 1)
    hidden = encapsulated(stream.getvalue(), "1.2.840.10008.1.2.4.90", Rows=8, Columns=16)
    assert refused(hidden, limits).code == "dicom-unreadable"


def test_a_run_that_would_fill_the_memory_is_refused(limits: Settings) -> None:
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 4_000_000  # 512 million bytes
    began = time.monotonic()
    bomb = encapsulated(runs, RLELossless, Rows=8, Columns=16)
    assert refused(bomb, limits).code == "dicom-unreadable"
    assert time.monotonic() - began < 5


def test_deflated_files_are_refused_unread(limits: Settings) -> None:
    made = dataset([[0, 1]])
    made.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1.99")
    head = file(dataset([[0, 1]]))
    deflated = file(made)
    assert refused(deflated, limits).code == "dicom-transfer-syntax"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(1 << 20)) + packer.flush()
    assert refused(deflated[: deflated.index(b"1.2.840.10008.1.2.1.99") + 22] + bomb, limits).status == 400
    assert len(head) < 2000


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_uncompressed_syntaxes(syntax: UID, limits: Settings) -> None:
    made = dataset([[0, 100, 200]], VOILUTSequence=Sequence([table((3, 0, 8), [0, 255, 9])]))
    made.file_meta.TransferSyntaxUID = syntax
    assert pixels(made, limits).tolist() == [[0, 9, 9]]


def sample(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(str(path)).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit", "expb"],
)
def test_every_lossless_compression_shows_the_same(name: str, limits: Settings) -> None:
    """Copies of one picture, each through another decoder."""
    assert read(sample(f"MR_small_{name}.dcm"), limits).data == read(sample("MR_small.dcm"), limits).data


@pytest.mark.parametrize(
    "name",
    ["SC_rgb_dcmtk_+eb+cr", "SC_rgb_jpeg_dcmtk", "SC_rgb_jls_lossy_line", "SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_gdcm_KY"],
)
def test_colours_of_lossy_copies_are_near(name: str, limits: Settings) -> None:
    """The same test picture in RGB and in YBR, through JPEG and JPEG-LS: a wrong colour space would be far off."""
    expected = pixels(sample("SC_rgb_rle.dcm"), limits).astype(int)
    assert np.abs(pixels(sample(f"{name}.dcm"), limits) - expected).mean() < 4


def test_the_ct_sample_by_hand(limits: Settings) -> None:
    """CT_small has no window: its range in Hounsfield units. It names a padding value, but holds none."""
    data = sample("CT_small.dcm")
    source = pydicom.dcmread(io.BytesIO(data))
    assert "WindowCenter" not in source
    stored = source.pixel_array.astype(float)
    expected = (stored - stored.min()) / (stored.max() - stored.min()) * 255
    assert np.abs(pixels(data, limits) - expected).max() <= 0.5001


def test_all_samples_are_read_or_refused(limits: Settings) -> None:
    """Every file in pydicom's wheel: a picture, or one clear refusal; most of those with pixels are read."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    codes: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.dcm")):
        try:
            made = read_picture(path.read_bytes(), limits, None, "images.0")
            assert made.size[0] >= 1
            codes.setdefault("read", []).append(path.name)
        except GatewayError as error:
            assert error.status in (400, 413), (path, error)
            codes.setdefault(error.code, []).append(path.name)
    assert len(codes["read"]) >= 50, codes
    # a JPEG 2000 file with boxes, one that is out of order, two frames that contradict their tags, broken tags
    assert len(codes["dicom-unreadable"]) <= 8, codes


def test_nothing_of_a_file_is_logged() -> None:
    """In a process of its own, as pytest has warning filters of its own. pydicom would quote the odd values."""
    made = dataset([[0, 1]], BurnedInAnnotation="doe^jane lives here")
    made.add_new("PixelSpacing", "DS", ["1", "1"])
    data = file(made).replace(b"1.2.840.10008.1.2.1\0", b"1.2.doe^jane.8.1.2.1")
    code = (
        "import logging, sys; logging.basicConfig(level=0)\n"
        "from serving.gateway.images import read_picture\n"
        "from serving.gateway.settings import Settings\n"
        "from serving.gateway.errors import GatewayError\n"
        "data = sys.stdin.buffer.read()\n"
        "for one in (data, data.replace(b'1.2.doe^jane.8.1.2.1', b'1.2.840.10008.1.2.1\\0'), data[:-1]):\n"
        "    try: read_picture(one, Settings(_env_file=None, burned_in='refuse-unless-no'), None, 'images.0')\n"
        "    except GatewayError as error: print(error.code)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"dicom-transfer-syntax", b"burned-in-annotation", b"dicom-transfer-syntax"]
    assert b"jane" not in done.stderr.lower()
    assert b"pydicom" not in done.stderr.lower()


def test_no_tag_goes_on(limits: Settings) -> None:
    data = file(dataset([[0, 1]]))
    assert NAME.encode() in data
    assert NAME.encode() not in read(data, limits).data


@pytest.mark.parametrize(
    "break_it",
    [lambda data: data[:200], lambda data: data[:-1], lambda data: data[:132] + b"\xff" * 500, lambda data: data[:132]],
)
def test_broken_files(break_it: Callable[[bytes], bytes], limits: Settings) -> None:
    error = refused(break_it(file(dataset(np.arange(64).reshape(8, 8)))), limits)
    assert error.code in ("dicom-unreadable", "dicom-no-image")


def test_big_endian(limits: Settings) -> None:
    made = dataset([[0, 256, 512]])
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    made.PixelData = np.array([0, 256, 512], ">u2").tobytes()
    assert pixels(made, limits).tolist() == [[0, 128, 255]]


def test_only_the_frame_that_is_needed_is_decoded(limits: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.gateway import dicom

    seen: list[int] = []
    original = dicom.pixel_array

    def counting(made: Dataset, index: int) -> np.ndarray:
        assert not {"PatientName", "PatientID", "SOPInstanceUID"} & set(made.dir())  # they were never read
        seen.append(len(list(generate_frames(made.PixelData, number_of_frames=int(made.NumberOfFrames)))))
        return original(made, index=index)

    monkeypatch.setattr(dicom, "pixel_array", counting)
    assert read(sample("rtdose_rle.dcm"), limits).out.frames == 15
    assert seen == [1]
