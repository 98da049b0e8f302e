"""Source files to a data set: every row becomes a sample, or a reject that says why it did not."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from medforge.config import DataConfig
from medforge.convert import conversations, parts, slake, splits, vqa_rad
from medforge.convert.common import Format, Row, Source
from medforge.dataset import Reject
from medforge.dataset_writer import DatasetWriter, refuse_overwrite
from medforge.records import Sample, sample_id

PHANTOM = "phantom"


def _phantom_rows(source: Source) -> Iterator[Row]:
    from medforge.convert.phantom import rows

    yield from rows(source.data.phantom)


FORMATS: dict[str, Format] = {
    "vqa-rad": vqa_rad.FORMAT,
    "slake": slake.FORMAT,
    "conversations": conversations.FORMAT,
    PHANTOM: Format("CC0-1.0", "nothing: SOURCE is the word phantom", lambda path: None, _phantom_rows),
}


def run(source: str, out: Path, data: DataConfig, seed: int = 0) -> dict[str, Any]:
    """Convert `source` (a folder, a JSON file, `s3://bucket/prefix` or `phantom`) to a data set at `out`.

    `seed` deals the studies where splits are dealt anew. Returns the manifest. Raises ValueError when the source is
    missing, broken, of no known format or without a usable row, or when `out` is something else than a data set.
    """
    refuse_overwrite(out)
    with _opened(source, data) as (name, opened):
        return _convert(name, lambda _: FORMATS[name].rows(opened), opened.path, out, data, seed)


def run_shard(source: str, out: Path, data: DataConfig, shard: int) -> dict[str, Any]:
    """Read the rows of shard number `shard` (from 0) of `data.shards` to a part at the folder `out`.

    Returns what part.json says: the format, the shard, and how many rows the shard and the whole source have. Raises
    ValueError as `run` does; a shard without a row is sound.
    """
    with _opened(source, data) as (name, opened):
        return parts.write(out, name, FORMATS[name], opened, shard, data.shards)


def join(folders: Sequence[Path], out: Path, data: DataConfig, seed: int = 0) -> dict[str, Any]:
    """Make of the parts of all shards the data set that `run` makes of the source; returns its manifest.

    Raises ValueError when a part is missing, is there twice, or was read from another state of the source.
    """
    refuse_overwrite(out)
    found = parts.Parts.open(folders)
    return _convert(found.format, found.rows, Path(data.source), out, data, seed)


def detect(path: Path) -> str:
    """The name of the format of a folder or JSON file, and prints what showed it.

    Raises ValueError with what each format needs when it is none of them.
    """
    for name, form in FORMATS.items():
        if what := form.found(path):
            print(f"format {name}: {what}")
            return name
    needs = "\n".join(f"  {name}: {form.needs}" for name, form in FORMATS.items())
    raise ValueError(f"{path}: no known format, {_contents(path)}. What each format needs:\n{needs}")


def _contents(path: Path) -> str:
    if path.is_file():
        return "and it is empty" if not path.stat().st_size else f"by the first bytes of this {path.suffix or 'file'}"
    names = [
        f"{item.name}{'/' if item.is_dir() else ' (empty)' if not item.stat().st_size else ''}"
        for item in sorted(path.iterdir())
    ]
    return f"it holds {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "the folder is empty"


@contextmanager
def _opened(source: str, data: DataConfig) -> Iterator[tuple[str, Source]]:
    """The name of the source's format, and the source as the format's reader takes it."""
    if source == PHANTOM or data.format == PHANTOM:
        if source != PHANTOM or data.format not in (PHANTOM, "auto"):
            raise ValueError(f"source {source!r} and format {data.format!r} do not go together: phantom is both")
        yield PHANTOM, Source(Path(), PHANTOM, data)
        return
    with _local(source) as (path, name):
        format_name = detect(path) if data.format == "auto" else data.format
        yield format_name, Source(path, name, data)


@contextmanager
def _local(source: str) -> Iterator[tuple[Path, str]]:
    """The source as a local path, and the name it goes by."""
    if not source.startswith("s3://"):
        path = Path(source)
        if not path.exists():
            raise ValueError(f"{source}: no such file or folder")
        yield path, path.resolve().stem if path.is_file() else path.resolve().name
        return
    from medforge.storage import connect, parse_url

    bucket, prefix = parse_url(source)
    with tempfile.TemporaryDirectory(prefix="medforge-source-") as folder, connect(create=False) as store:
        path = Path(folder) / "source"
        store.download_folder(bucket, prefix, path)
        yield path, (prefix or bucket).rsplit("/", 1)[-1]


def _convert(
    format_name: str,
    rows: Callable[[bool], Iterator[Row]],
    where: Path,
    out: Path,
    data: DataConfig,
    seed: int,
) -> dict[str, Any]:
    """Read twice: for what dealing has to know, then for writing. Image bytes are held for one row only.

    `rows` gives the source's rows in their order; its argument says whether image bytes are wanted.
    """
    form = FORMATS[format_name]
    if data.licence and form.licence:
        raise ValueError(f"licence {data.licence!r}: {format_name} is {form.licence}; leave the licence out")
    members, sources, licences, rejects = [], set(), set(), []
    for row in _told_apart(rows(False), data.languages):
        if isinstance(row, Reject):
            rejects.append(row)
        else:
            members.append(splits.Member.of(row[0]))
            sources.add(row[0].source)
            licences.add(row[0].licence)
    if not members:
        if not rejects:
            raise ValueError(f"{where}: has no rows")
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in rejects).most_common())
        raise ValueError(f"{where}: not one row is usable ({reasons}); the first: {rejects[0].detail}")
    dealt = iter(splits.assign(members, data, seed))
    with DatasetWriter(out, ", ".join(sorted(sources)), ", ".join(sorted(licences)), format_name) as writer:
        for row in _told_apart(rows(True), data.languages):
            if isinstance(row, Reject):
                writer.reject(row)
            else:
                writer.add(row[0].with_split(next(dealt)), row[1])
    return writer.manifest


def _told_apart(rows: Iterator[Row], languages: Sequence[str]) -> Iterator[Row]:
    """The reader's rows, the languages that are not wanted rejected, and true repeats given ids of their own.

    An id depends on its own row only (readers put the source's row id into it), so that it stays when rows around it
    come and go. Only a row that is the same in all of that is told apart, by counting.
    """
    seen: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        sample = row[0]
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            sample = _renamed(sample, seen[sample.id])
        if languages and sample.language not in languages:
            detail = f"language {sample.language} is not among {', '.join(languages)}"
            yield Reject(sample.id, "convert", "language-left-out", detail)
        else:
            yield sample, row[1]


def _renamed(sample: Sample, count: int) -> Sample:
    return replace(sample, id=sample_id(sample.source, sample.images, sample.turns, f"{sample.id}#{count}"))
