"""Writing a data set folder: shards as samples come, the manifest last, the whole renamed into place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medforge import __version__
from medforge.dataset import SCHEMA, SCHEMA_VERSION, Reject, root_digest, write_rejects
from medforge.files import new_folder, read_json, sha256_file, write_json
from medforge.records import BOX_MARK, SPLITS, Sample

SHARD_BYTES = 256 << 20
GROUP_ROWS = 256
GROUP_BYTES = 64 << 20
GROUP_RAW_BYTES = 256 << 20  # repeats counted: Arrow lays out a group's images one by one, up to 2 GiB
_SHARD_ROWS = 200_000
_SUFFIX = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"GIF8": "gif",
    b"RIFF": "webp",
}


def refuse_overwrite(folder: Path) -> None:
    """ValueError when something else than a data set stands at `folder`: only a data set is ever replaced."""
    if folder.is_dir() and (not any(folder.iterdir()) or "shards" in _manifest(folder)):
        return
    if folder.exists():
        raise ValueError(f"{folder}: exists and is no data set, so it is not overwritten; name another place")


def _manifest(folder: Path) -> Any:
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


class _Shards:
    """The rows of one split that wait for their shard, grouped by image when it is written."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.groups: dict[tuple[str, ...], list[Sample]] = {}
        self.images: dict[str, bytes] = {}
        self.size = self.rows = self.count = 0

    def add(self, sample: Sample, images: Sequence[bytes]) -> None:
        key = tuple(ref.sha256 for ref in sample.images)
        self.groups.setdefault(key, []).append(sample)
        for ref, data in zip(sample.images, images, strict=True):
            if ref.sha256 not in self.images:
                self.images[ref.sha256] = data
                self.size += len(data)
        self.rows += 1
        if self.size >= SHARD_BYTES or self.rows >= _SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        path = self.folder / f"{self.split}-{self.count:05d}.parquet"
        plain = ["images.list.element.bytes"]
        compression = {name: "zstd" for name in _leaves() if name not in plain} | dict.fromkeys(plain, "none")
        with pq.ParquetWriter(
            path,
            SCHEMA,
            compression=compression,
            use_dictionary=True,
            dictionary_pagesize_limit=GROUP_BYTES * 2,  # an image that leaves the dictionary is stored once a row
            write_statistics=False,
        ) as writer:
            batch: list[Sample] = []
            held: set[str] = set()
            size = raw = 0
            for samples in self.groups.values():
                for sample in samples:
                    new = {ref.sha256 for ref in sample.images} - held
                    added = sum(len(self.images[sha]) for sha in new)
                    row = sum(len(self.images[ref.sha256]) for ref in sample.images)
                    full = len(batch) >= GROUP_ROWS or size + added > GROUP_BYTES or raw + row > GROUP_RAW_BYTES
                    if batch and full:
                        writer.write_table(self._table(batch))
                        batch, held, size, raw = [], set(), 0, 0
                        new = {ref.sha256 for ref in sample.images}
                        added = sum(len(self.images[sha]) for sha in new)
                    batch.append(sample)
                    held |= new
                    size += added
                    raw += row
            writer.write_table(self._table(batch))
        self.count += 1
        self.groups, self.images, self.size, self.rows = {}, {}, 0, 0

    def _table(self, samples: Sequence[Sample]) -> pa.Table:
        rows = []
        for sample in samples:
            row = sample.to_row()
            row["image_refs"] = row["images"]
            row["images"] = [
                {"bytes": self.images[ref.sha256], "path": image_name(ref.sha256, self.images[ref.sha256])}
                for ref in sample.images
            ]
            rows.append(row)
        return pa.Table.from_pylist(rows, SCHEMA)


def _leaves() -> list[str]:
    names = [name for name in SCHEMA.names if pa.types.is_string(SCHEMA.field(name).type)]
    for name in ("images", "image_refs", "turns", "boxes"):
        for child in SCHEMA.field(name).type.value_type:
            inner = ".list.element" if pa.types.is_list(child.type) else ""
            names.append(f"{name}.list.element.{child.name}{inner}")
    return names


def image_name(sha256: str, data: bytes) -> str:
    """The file name of an image: its digest and the ending that its first bytes tell."""
    suffix = next((end for magic, end in _SUFFIX.items() if data.startswith(magic)), "img")
    return f"{sha256}.{suffix}"


class DatasetWriter:
    """A context manager that takes samples and leaves a whole data set folder, or nothing if anything is raised.

    with DatasetWriter(out, source="VQA-RAD", licence="CC0-1.0", converter="vqa-rad") as writer:
        writer.add(sample, [image_bytes])
        writer.reject(Reject(row_id, "convert", "missing-image", "…"))

    `extra` names further JSON files, each made from the manifest when that is known. Raises ValueError when something
    else than a data set stands at `folder`, or no sample was added.
    """

    def __init__(
        self,
        folder: Path | str,
        source: str,
        licence: str,
        converter: str,
        pixels: tuple[int, int] | None = None,
        extra: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
    ) -> None:
        refuse_overwrite(Path(folder))
        self._target = new_folder(Path(folder))
        self._about = {"source": source, "licence": licence, "converter": {"name": converter, "version": __version__}}
        self._pixels = pixels
        self._extra = extra or {}
        self.rejects: list[Reject] = []
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._images: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._pairs: list[dict[str, Any]] = []
        self._types: dict[str, dict[str, str]] = {}
        self._splits: dict[str, _Shards] = {}
        self.manifest: dict[str, Any] = {}

    def __enter__(self) -> DatasetWriter:
        self._work = self._target.__enter__()
        (self._work / "data").mkdir()
        return self

    def add(self, sample: Sample, images: Sequence[bytes]) -> None:
        """Take a sample and the encoded bytes of its images, in the order of `sample.images`."""
        split = sample.split
        assert split in SPLITS, split
        if split not in self._splits:
            self._splits[split] = _Shards(self._work / "data", split)
        self._splits[split].add(sample, images)
        counts = self.counts[split]
        counts["samples"] += 1
        counts[f"answer_type={sample.answer_type}"] += 1
        counts[f"question_type={sample.question_type}"] += 1
        counts[f"language={sample.language}"] += 1
        self._images[split] |= {ref.sha256 for ref in sample.images}
        self._types[sample.id] = {
            "question_type": sample.question_type,
            "answer_type": sample.answer_type,
            "from": sample.question_type_from,
        }
        if split == "test":
            self._add_pair(sample, images)

    def _add_pair(self, sample: Sample, images: Sequence[bytes]) -> None:
        folder = self._work / "images"
        folder.mkdir(exist_ok=True)
        paths = []
        for ref, data in zip(sample.images, images, strict=True):
            path = folder / image_name(ref.sha256, data)
            if not path.exists():
                path.write_bytes(data)
            paths.append(f"images/{path.name}")
        self._pairs.append(
            {
                "id": sample.id,
                "image": paths[0] if len(paths) == 1 else paths,
                "conversations": [
                    {
                        "from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role),
                        "value": _plain(turn.text, sample),
                    }
                    for turn in sample.turns
                ],
            }
        )

    def reject(self, reject: Reject) -> None:
        """Keep the reason why a row was dropped."""
        self.rejects.append(reject)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as failure:
                self._target.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._target.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if not self._splits:
            reasons = Counter(reject.reason for reject in self.rejects)
            detail = self.rejects[0].detail if self.rejects else "the source has no rows"
            raise ValueError(f"no sample is left ({dict(reasons) or 'nothing was read'}); first: {detail}")
        shards = []
        for split in SPLITS:
            if split in self._splits:
                self._splits[split].flush()
                shards += self._name_shards(split, self._splits[split].count)
        write_rejects(self._work / "rejects.parquet", self.rejects)
        write_json(self._work / "test.json", self._pairs)
        write_json(self._work / "type_mapping.json", self._types)
        self.manifest = {
            "schema_version": SCHEMA_VERSION,
            **self._about,
            "root": root_digest(shards),
            "min_pixels": self._pixels[0] if self._pixels else None,
            "max_pixels": self._pixels[1] if self._pixels else None,
            "counts": {
                split: {"images": len(self._images[split]), **dict(sorted(self.counts[split].items()))}
                for split in SPLITS
                if split in self._splits
            },
            "rejected": dict(sorted(Counter(reject.reason for reject in self.rejects).items())),
            "shards": shards,
        }
        for name, make in self._extra.items():
            write_json(self._work / name, make(self.manifest))
        write_json(self._work / "manifest.json", self.manifest)

    def _name_shards(self, split: str, count: int) -> list[dict[str, Any]]:
        shards = []
        for number in range(count):
            path = self._work / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
            (self._work / "data" / f"{split}-{number:05d}.parquet").rename(path)
            rows = pq.read_metadata(path).num_rows
            size = path.stat().st_size
            name = path.relative_to(self._work).as_posix()
            shards.append({"path": name, "split": split, "rows": rows, "bytes": size, "sha256": sha256_file(path)})
        return shards


def _plain(text: str, sample: Sample) -> str:
    """The text with its boxes as normalised coordinates, which every LLaVA-style reader understands."""

    def coordinates(match: Any) -> str:
        return "[" + ", ".join(f"{value:.3f}" for value in sample.boxes[int(match.group(1))].xyxy) + "]"

    return BOX_MARK.sub(coordinates, text)


def write_dataset(
    folder: Path | str,
    samples: Iterable[tuple[Sample, Sequence[bytes]]],
    source: str = "test",
    licence: str = "CC0-1.0",
    converter: str = "test",
) -> dict[str, Any]:
    """Write the samples as a data set; the manifest is returned."""
    with DatasetWriter(folder, source, licence, converter) as writer:
        for sample, images in samples:
            writer.add(sample, images)
    return writer.manifest
