"""A source read in shards: each shard opens the images of its own rows only, and leaves a part.

Rows are dealt to the shards in blocks, as the rows of one image mostly stand together. What hangs on all rows (the
splits, repeats, what a row claims for itself) is decided when the parts are joined, from the same rows in the same
order as without shards. A part is a folder:

    part.json         format, shard, of (how many shards), rows (of this shard), source_rows (of all)
    rows.parquet      place (the row's number in the source), kind (sample or reject), value (JSON)
    images.parquet    sha256, bytes: each image of the part once
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medforge.convert.common import Format, Row, Source
from medforge.dataset import Reject
from medforge.files import new_folder, read_json, write_json
from medforge.records import sample_from_row

ABOUT = "part.json"
BLOCK = 64  # rows that stay together
_ROWS = pa.schema([("place", pa.int64()), ("kind", pa.string()), ("value", pa.string())])
_IMAGES = pa.schema([("sha256", pa.string()), ("bytes", pa.large_binary())])
_GROUP_ROWS = 10_000
_GROUP_BYTES = 8 << 20
_CACHE_BYTES = 512 << 20


def write(out: Path, name: str, form: Format, source: Source, shard: int, of: int) -> dict[str, Any]:
    """Write the part of `shard` (from 0) of `of` shards to the folder `out`; returns the content of part.json."""
    if not 0 <= shard < of:
        raise ValueError(f"shard {shard}: there are {of} shards (data.shards), counted from 0")
    kept = total = 0
    held: set[str] = set()
    reader = form.rows(source)
    with (
        new_folder(out) as folder,
        _Table(folder / "rows.parquet", _ROWS) as rows,
        _Table(folder / "images.parquet", _IMAGES) as images,
    ):
        for place in count():
            mine = place // BLOCK % of == shard
            source.images.asleep = not mine
            row = next(reader, None)
            if row is None:
                total = place
                break
            if not mine:
                continue
            kept += 1
            if isinstance(row, Reject):
                rows.add(place, "reject", json.dumps(vars(row), ensure_ascii=False))
                continue
            rows.add(place, "sample", json.dumps(row[0].to_row(), ensure_ascii=False))
            for ref, data in zip(row[0].images, row[1], strict=True):
                if ref.sha256 not in held:
                    held.add(ref.sha256)
                    images.add(ref.sha256, data, size=len(data))
        about = {"format": name, "shard": shard, "of": of, "rows": kept, "source_rows": total}
        write_json(folder / ABOUT, about)
    return about


class Parts:
    """The parts of all shards of one source."""

    def __init__(self, folders: Sequence[Path], format_name: str) -> None:
        self.folders, self.format = folders, format_name

    @classmethod
    def open(cls, folders: Sequence[Path]) -> Parts:
        """The parts in these folders, in any order.

        Raises ValueError when one is missing or there twice, or the source changed while the shards read it.
        """
        for folder in folders:
            if not (folder / ABOUT).is_file():
                raise ValueError(f"{folder}: has no {ABOUT}, so it is no part of a source; convert the shard again")
        about = [read_json(folder / ABOUT) for folder in folders]
        for name in ("format", "of", "source_rows"):
            if len(found := {str(part[name]) for part in about}) > 1:
                raise ValueError(
                    f"the parts differ in {name} ({', '.join(sorted(found))}): the source or the configuration changed "
                    "between them; convert all shards again"
                )
        of = about[0]["of"] if about else 0
        if sorted(part["shard"] for part in about) != list(range(of)) or not of:
            shards = sorted(part["shard"] for part in about)
            raise ValueError(f"the shards {shards} are there; each of 0 to {of - 1} is needed once")
        return cls(folders, about[0]["format"])

    def rows(self, with_images: bool) -> Iterator[Row]:
        """The rows of all parts in the order of the source; without images, the lists of bytes are empty."""
        streams = [self._rows(folder, with_images) for folder in self.folders]
        for _, row in heapq.merge(*streams, key=lambda item: item[0]):
            yield row

    def _rows(self, folder: Path, with_images: bool) -> Iterator[tuple[int, Row]]:
        images = _Images(folder / "images.parquet", _CACHE_BYTES // len(self.folders)) if with_images else None
        for batch in pq.ParquetFile(folder / "rows.parquet").iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                value = json.loads(row["value"])
                if row["kind"] == "reject":
                    yield row["place"], Reject(**value)
                else:
                    sample = sample_from_row(value)
                    yield row["place"], (sample, [images.get(ref.sha256) for ref in sample.images] if images else [])


class _Table:
    """A Parquet file that is written group by group; it stands, without rows, when none came."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._rows: list[tuple[Any, ...]] = []
        self._size = 0

    def __enter__(self) -> _Table:
        return self

    def add(self, *row: Any, size: int = 0) -> None:
        """Take a row of about `size` bytes."""
        self._rows.append(row)
        self._size += size
        if self._size >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._size = [], 0

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


class _Images:
    """The images of a part by digest, read a row group at a time; the latest groups stay in memory."""

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._file = pq.ParquetFile(path)
        self._groups: OrderedDict[int, dict[str, bytes]] = OrderedDict()
        self._most = max(1, cache_bytes // _GROUP_BYTES)
        self._where = {
            sha256: group
            for group in range(self._file.num_row_groups)
            for sha256 in self._file.read_row_group(group, columns=["sha256"])["sha256"].to_pylist()
        }

    def get(self, sha256: str) -> bytes:
        """The bytes of the image."""
        group = self._where[sha256]
        if group not in self._groups:
            table = self._file.read_row_group(group).to_pydict()
            self._groups[group] = dict(zip(table["sha256"], table["bytes"], strict=True))
            if len(self._groups) > self._most:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group][sha256]
