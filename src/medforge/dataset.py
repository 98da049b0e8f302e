"""The data set as an artifact: a folder that a later step, or `datasets.load_dataset`, opens.

    data/<split>-00000-of-000NN.parquet   samples; image bytes in a Hugging Face `Image` feature
    manifest.json                         schema version, counts, SHA-256 of each shard and a root digest over them
    rejects.parquet                       id, stage, reason, detail of every row that was dropped, and why
    test.json, type_mapping.json          the LLaVA-style pair, images/ beside it

Rows of one image stand together, so that Parquet's dictionary encoding keeps each image once a row group however
many questions are asked of it.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from medforge.files import read_json, sha256_file, sha256_json
from medforge.records import SPLITS, ImageRef, Sample, sample_from_row

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA_VERSION = 1
T = TypeVar("T")
_CACHE_BYTES = 512 << 20

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_REF = pa.struct([("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
_TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
_BOX = pa.struct([("label", pa.string()), ("xyxy", pa.list_(pa.float64())), ("image", pa.int32())])
_TEXT_COLUMNS = (
    *("id", "answer_type", "question_type", "question_type_from", "language"),
    *("target_diagnosis", "study_id", "source", "licence", "split"),
)


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _features() -> dict[str, Any]:
    """The Hugging Face description of the columns, which makes `images` decode to pictures."""

    def many(feature: Any) -> dict[str, Any]:
        return {"feature": feature, "_type": "List"}

    text = _value("string")
    return {
        "images": many({"_type": "Image"}),
        "image_refs": many({"sha256": text, "width": _value("int32"), "height": _value("int32")}),
        "turns": many({"role": text, "text": text}),
        "boxes": many({"label": text, "xyxy": many(_value("float64")), "image": _value("int32")}),
        **dict.fromkeys(_TEXT_COLUMNS, text),
    }


SCHEMA = pa.schema(
    [
        ("images", pa.list_(_IMAGE)),
        ("image_refs", pa.list_(_REF)),
        ("turns", pa.list_(_TURN)),
        ("boxes", pa.list_(_BOX)),
        *[(name, pa.string()) for name in _TEXT_COLUMNS],
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _features()}})},
)
REJECTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "stage", "reason", "detail")])


@dataclass(frozen=True)
class Reject:
    """A row that was dropped: where (`stage`), why (`reason`, a stable name), and the particulars."""

    id: str
    stage: str
    reason: str
    detail: str


def root_digest(shards: Iterable[dict[str, Any]]) -> str:
    """The digest of a data set: over the names and SHA-256 of its shards."""
    return sha256_json([[shard["path"], shard["sha256"]] for shard in shards])


class Dataset:
    """A data set folder opened for reading. Metadata is read at once, image bytes by row group when asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._samples: dict[str, list[Sample]] = {}
        self._where: dict[str, tuple[str, int]] = {}  # image -> shard and row group
        self._bytes: OrderedDict[str, bytes] = OrderedDict()
        self._cached = 0

    @classmethod
    def open(cls, folder: Path | str, verify: bool = True) -> Dataset:
        """Open `folder`; with `verify` every shard's SHA-256 is compared with the manifest.

        Raises ValueError when it is no data set, has another schema version, or a shard is missing or was changed.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise ValueError(f"{folder}: has no manifest.json, so it is not a data set; make one by `medforge convert`")
        manifest = read_json(folder / "manifest.json")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            found = manifest.get("schema_version")
            raise ValueError(
                f"{folder}/manifest.json: schema_version {found} is not {SCHEMA_VERSION}; convert it again"
            )
        for shard in manifest["shards"]:
            path = folder / shard["path"]
            if not path.is_file():
                raise ValueError(f"{path}: the manifest names this shard, but it is missing")
            if verify and sha256_file(path) != shard["sha256"]:
                raise ValueError(f"{path}: its SHA-256 is not the manifest's: the shard was changed or damaged")
        return cls(folder, manifest)

    @property
    def digest(self) -> str:
        """The root digest over the shards."""
        return str(self.manifest["root"])

    def splits(self) -> list[str]:
        """The splits that hold samples, in the order train, validation, test."""
        present = {shard["split"] for shard in self.manifest["shards"]}
        return [split for split in SPLITS if split in present]

    def samples(self, split: str) -> list[Sample]:
        """The samples of a split in file order, without image bytes. Empty when the split is absent."""
        if split not in self._samples:
            self._samples[split] = list(self._read(split))
        return self._samples[split]

    def _read(self, split: str) -> Iterator[Sample]:
        columns = [name for name in SCHEMA.names if name != "images"]
        for shard in self.manifest["shards"]:
            if shard["split"] != split:
                continue
            file = pq.ParquetFile(self.folder / shard["path"])
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=columns).to_pylist():
                    row["images"] = row.pop("image_refs")
                    sample = sample_from_row(row)
                    for ref in sample.images:
                        self._where.setdefault(ref.sha256, (shard["path"], group))
                    yield sample

    def image_bytes(self, ref: ImageRef) -> bytes:
        """The encoded file of an image of a split that `samples` has read."""
        if ref.sha256 not in self._bytes:
            if ref.sha256 not in self._where:
                for split in self.splits():
                    self.samples(split)
            self._load_group(*self._where[ref.sha256], keep=ref.sha256)
        self._bytes.move_to_end(ref.sha256)
        return self._bytes[ref.sha256]

    def _load_group(self, path: str, group: int, keep: str) -> None:
        table = pq.ParquetFile(self.folder / path).read_row_group(group, columns=["images", "image_refs"])
        for row in table.to_pylist():
            for ref, image in zip(row["image_refs"], row["images"], strict=True):
                if ref["sha256"] not in self._bytes:
                    self._bytes[ref["sha256"]] = image["bytes"]
                    self._cached += len(image["bytes"])
        while self._cached > _CACHE_BYTES and next(iter(self._bytes)) != keep:
            _, dropped = self._bytes.popitem(last=False)
            self._cached -= len(dropped)

    def images(self, sample: Sample) -> list[Image]:
        """The sample's images as RGB pictures, turned as their EXIF orientation says."""
        return [decode_image(self.image_bytes(ref)) for ref in sample.images]

    def rejects(self) -> list[Reject]:
        """The rows that were dropped so far."""
        path = self.folder / "rejects.parquet"
        return [Reject(**row) for row in pq.read_table(path).to_pylist()] if path.is_file() else []


def choose(samples: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of `samples` (all of them for None), drawn by `seed`, in their own order."""
    if limit is None or limit >= len(samples):
        return list(samples)
    import numpy as np

    picked = np.random.default_rng(seed).choice(len(samples), size=limit, replace=False)
    return [samples[index] for index in sorted(picked)]


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write `rejects.parquet` (also when empty: then it has no rows)."""
    pq.write_table(pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECTS_SCHEMA), path)


def decode_image(data: bytes) -> Image:
    """An encoded image as RGB. 16-bit and float grey images are scaled by their own range, not cut off at 255.

    Raises ValueError when the bytes are no image, are truncated, or are a decompression bomb.
    """
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # the object's address in Pillow's message would make the same fault read differently each time
        raise ValueError(str(error).split(" <_io.")[0]) from None
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (255.0 / (high - low) if high > low else 0.0)
        image = Image.fromarray(values.round().astype(np.uint8))
    return image.convert("RGB")
