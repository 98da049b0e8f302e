"""`medforge store-check s3://BUCKET`: whether an S3 endpoint does what MedForge asks of one, by trying it.

What is tried is what `medforge.storage` uses and nothing else: no tags, versions, locks or conditional writes.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medforge.storage import Store

_LARGE = (16 << 20) + 12_345  # bytes: more than one part of an upload
_AWKWARD = "a name/with spaces, +plus, ünïcode 图像 & 100%.bin"


def add(commands: Any) -> None:
    """Declare `store-check`."""
    check = commands.add_parser("store-check", help="try whether an object store does what MedForge asks of one")
    check.add_argument("url", metavar="s3://BUCKET", help="what is tried is written below store-check/, and removed")
    check.add_argument("--create", action="store_true", help="make the bucket if it is not there")
    check.add_argument(
        "--root", type=Path, default=Path(".medforge"), metavar="FOLDER",
        help="folder of the embedded store, used where MEDFORGE_S3_ENDPOINT is not set (%(default)s)",
    )  # fmt: skip
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from medforge.storage import connect, parse_url

    bucket, prefix = parse_url(arguments.url)
    if prefix:
        raise ValueError(f"{arguments.url}: a bucket is checked, not a folder in it; write s3://{bucket}")
    with connect(arguments.root, create=arguments.create) as store:
        if not store.has_bucket(bucket):
            if not arguments.create:
                raise ValueError(f"there is no bucket {bucket!r} at {store.url}; --create makes it")
            store.ensure_bucket(bucket)
            print(f"made the bucket {bucket}")
        failed = conformance(store, bucket)
    if failed:
        raise ValueError(f"{store.url} does not do what MedForge asks of a store: {', '.join(failed)}")
    print(f"s3://{bucket} at {store.url} does what MedForge asks of a store")
    return 0


def conformance(store: Store, bucket: str, say: Callable[[str], None] = print) -> list[str]:
    """Try each thing in turn, tell `say` how it went, and clean up. Returns the names of what failed.

    ValueError where the store cannot be reached or cleaned.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="medforge-") as work, _place(store, bucket) as place:
        for name, attempt in CHECKS.items():
            try:
                wrong = attempt(store, bucket, f"{place}/{name.replace(' ', '-')}", Path(work))
            except ValueError as error:
                wrong = str(error)
            say(f"{'failed' if wrong else 'ok':<7} {name}{f': {wrong}' if wrong else ''}")
            if wrong:
                failed.append(name)
    return failed


@contextmanager
def _place(store: Store, bucket: str) -> Iterator[str]:
    """A prefix that nobody else uses, emptied at the end."""
    place = f"store-check/{secrets.token_hex(8)}"
    try:
        yield place
    finally:
        for entry in store.list(bucket, place):
            store.remove(bucket, entry.key)


def _write_and_read(store: Store, bucket: str, place: str, work: Path) -> str:
    for data in (b"one", b"", bytes(range(256)) * 40):
        key = f"{place}/{len(data)}"
        store.put(bucket, key, data)
        if store.get(bucket, key) != data:
            return f"{len(data)} bytes do not come back as they were written"
    return ""


def _overwrite(store: Store, bucket: str, place: str, work: Path) -> str:
    for number in range(5):
        store.put(bucket, place, b"%d" % number)
        if (found := store.get(bucket, place)) != b"%d" % number:
            return f"after {number} was written, {found[:20]!r} is read: a channel would name an old release"
    return ""


def _missing(store: Store, bucket: str, place: str, work: Path) -> str:
    if store.exists(bucket, place):
        return "an object that was never written is there"
    store.put(bucket, place, b"x")
    if not store.exists(bucket, place):
        return "an object that was written is not there"
    store.remove(bucket, place)
    store.remove(bucket, place)
    return "an object that was removed is still there" if store.exists(bucket, place) else ""


def _names(store: Store, bucket: str, place: str, work: Path) -> str:
    key = f"{place}/{_AWKWARD}"
    store.put(bucket, key, b"x")
    listed = [entry.key for entry in store.list(bucket, place)]
    return "" if listed == [key] and store.get(bucket, key) == b"x" else f"{key!r} is listed as {listed!r}"


def _list(store: Store, bucket: str, place: str, work: Path) -> str:
    for name in ("v1/b", "v1/a", "v10/a", "v1/deep/c"):
        store.put(bucket, f"{place}/{name}", b"xy")
    found = [(entry.key, entry.size) for entry in store.list(bucket, f"{place}/v1")]
    if found != [(f"{place}/v1/{name}", 2) for name in ("a", "b", "deep/c")]:
        return f"below v1/ is listed {found!r}"
    folders = store.folders(bucket, place)
    return "" if folders == ["v1", "v10"] else f"as folders are listed {folders!r}"


def _large(store: Store, bucket: str, place: str, work: Path) -> str:
    source, target = work / "large", work / "back"
    block = secrets.token_bytes(1 << 16)
    source.write_bytes((block * (_LARGE // len(block) + 1))[:_LARGE])
    key = f"{place}/large"
    sent = store.upload_files({key: source}, bucket)[key]
    store.download_files(bucket, place, {"large": sent}, target)
    whole = hashlib.sha256(source.read_bytes()).digest() == hashlib.sha256((target / "large").read_bytes()).digest()
    return "" if whole else "a file in several parts comes back changed"


def _range(store: Store, bucket: str, place: str, work: Path) -> str:
    from medforge.s3 import explained

    store.put(bucket, place, bytes(range(200)))
    with explained(store.url, bucket, place):
        # what a download that broke off goes on with, and KServe's storage initializer reads large files by
        response = store._client.get_object(bucket_name=bucket, object_name=place, offset=150)
        try:
            tail = response.read()
        finally:
            response.close()
            response.release_conn()
    return "" if tail == bytes(range(150, 200)) else f"from byte 150 of 200 on, {len(tail)} bytes are read"


CHECKS: dict[str, Callable[[Store, str, str, Path], str]] = {
    "write and read": _write_and_read,
    "read what was just overwritten": _overwrite,
    "tell and remove": _missing,
    "awkward names": _names,
    "list folders": _list,
    "files in several parts": _large,
    "read from an offset": _range,
}
"""What a store has to do; each returns what is wrong, "" if nothing is."""
