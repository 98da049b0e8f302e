"""DICOM files as they come: names in them, broken and compressed ones, pydicom's own samples."""

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
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from serving.gateway.dicom import coded_size
from serving.gateway.errors import GatewayError
from serving.gateway.images import read_picture
from serving.gateway.settings import Settings
from tests.unit.gateway.dicoms import NAME, dataset, file, pixels, read, refused, table

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns of what these tests make


@pytest.fixture
def limits(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path)


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
