"""The object store: any S3 endpoint over the MinIO SDK, or the embedded server where the environment names none.

Nothing here relies on what S3 servers differ on: tags, ACLs, versioning, conditional writes, user metadata, content
types or ETags. What a folder holds is told by a manifest of SHA-256 digests that is written last; every file is
checked against it while it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medforge.files import canonical_json, link_tree, list_files, new_folder, sha256_file
from medforge.s3 import Entry, entry_of, explained, is_configured, open_client, read_endpoint
from medforge.transfers import Counter, HashingReader, transfer

MANIFEST = "manifest.sha256.json"
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"

_CHUNK = 1 << 20
_PART = 16 << 20  # bytes of a multipart upload that one thread holds in memory
_BROKEN_READS = 3  # a read goes on where it broke off so many times, then it fails

FileTable = dict[str, dict[str, Any]]
"""Relative name → {"sha256": str or None when unknown, "size": bytes}."""


Entries = list[Entry]
Names = list[str]


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``; the prefix may be empty and carries no slash at its ends."""
    match = re.fullmatch(r"s3://([^/]*)/?(.*)", url, re.DOTALL)
    if not match:
        raise ValueError(f"{url!r} is not an object store's address; write s3://bucket/prefix")
    bucket, prefix = match[1], match[2].rstrip("/")
    if not re.fullmatch(BUCKET, bucket):
        raise ValueError(
            f"{url!r}: {bucket!r} is no bucket name: 3 to 63 lower-case letters, digits, dots and hyphens are"
        )
    if prefix:
        check_name(prefix, url)
    return bucket, prefix


def check_name(name: str, where: str) -> None:
    """Raise ValueError if `name` would leave the folder it is put in, or is one that S3 servers cannot keep."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise ValueError(f"{where}: the name {name!r} is refused: it has an empty, `.` or `..` part, or a backslash")
    if not name.isprintable():
        raise ValueError(f"{where}: the name {name!r} is refused: it has control or undecodable characters")


@contextmanager
def connect(root: Path = Path(".medforge"), create: bool = True) -> Iterator[Store]:
    """The store that the environment names (MEDFORGE_S3_ENDPOINT and keys), else the embedded one under `root`.

    With `create=False` an embedded store that was never made is a ValueError instead of a new, empty one.
    """
    if is_configured():
        yield Store.from_environment()
        return
    if not create and not (root / "store").is_dir():
        raise ValueError(
            f"there is no object store at {root / 'store'} yet: a pipeline run or `medforge store put` makes one; "
            "else give its --root, or set MEDFORGE_S3_ENDPOINT"
        )
    from medforge.embedded import serve

    with serve(root) as environment:
        yield Store.from_environment(environment)


def download(url: str, target: Path) -> None:
    """Download the prefix that ``s3://bucket/prefix`` names to the folder `target`."""
    bucket, prefix = parse_url(url)
    with connect(create=False) as store:
        store.download_folder(bucket, prefix, target)


class Store:
    """The objects of one S3 endpoint. Every mistake the user can mend is a ValueError, and none shows the secret."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, region: str, secure: bool) -> None:
        """`endpoint` is host:port. Nothing is sent before the first call."""
        self.url = f"{'https' if secure else 'http'}://{endpoint}"
        self._client = open_client(endpoint, access_key, secret_key, region, secure)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Store:
        """The store that MEDFORGE_S3_ENDPOINT, _ACCESS_KEY, _SECRET_KEY, _REGION and _SECURE name."""
        values = os.environ if environment is None else environment
        if not is_configured(values):
            raise ValueError("MEDFORGE_S3_ENDPOINT, MEDFORGE_S3_ACCESS_KEY and MEDFORGE_S3_SECRET_KEY are not set")
        endpoint, secure = read_endpoint(values["MEDFORGE_S3_ENDPOINT"], values.get("MEDFORGE_S3_SECURE", ""))
        region = values.get("MEDFORGE_S3_REGION") or "us-east-1"
        return cls(endpoint, values["MEDFORGE_S3_ACCESS_KEY"], values["MEDFORGE_S3_SECRET_KEY"], region, secure)

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write one object whole, over the one that was there."""
        check_name(key, f"s3://{bucket}")
        with explained(self.url, bucket, key):
            self._client.put_object(bucket_name=bucket, object_name=key, data=io.BytesIO(data), length=len(data))

    def get(self, bucket: str, key: str) -> bytes:
        """An object's bytes, held in memory; ValueError if it is missing."""
        with explained(self.url, bucket, key):
            response = self._client.get_object(bucket_name=bucket, object_name=key)
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

    def get_json(self, bucket: str, key: str) -> Any:
        """The JSON in an object; ValueError if it is missing or broken."""
        try:
            return json.loads(self.get(bucket, key).decode())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"s3://{bucket}/{key}: is not valid JSON: {error}") from None

    def exists(self, bucket: str, key: str) -> bool:
        """Whether the object is there; a missing bucket holds none."""
        from minio.error import S3Error

        with explained(self.url, bucket, key):
            try:
                self._client.stat_object(bucket_name=bucket, object_name=key)
            except S3Error as error:
                if error.code in ("NoSuchKey", "NoSuchBucket"):
                    return False
                raise
        return True

    def upload_file(self, source: Path, bucket: str, key: str) -> None:
        """Write one file to one object, in pieces, with progress."""
        self.upload_files({key: source}, bucket)

    def download_file(self, bucket: str, key: str, target: Path) -> None:
        """Write one object to the file `target`, in pieces, with progress. Its digest is not known, nor checked."""
        sizes = {entry.key: entry.size for entry in self._listing(bucket, key)}
        if key not in sizes:
            raise ValueError(f"s3://{bucket}/{key}: there is no such object")
        target.parent.mkdir(parents=True, exist_ok=True)
        info = {"sha256": None, "size": sizes[key]}
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
            path = Path(work) / "object"
            transfer(
                f"get s3://{bucket}/{key}",
                {key: sizes[key]},
                lambda _, count: self._save(bucket, key, info, path, count),
            )
            os.replace(path, target)

    def remove(self, bucket: str, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with explained(self.url, bucket, key):
            self._client.remove_object(bucket_name=bucket, object_name=key)

    def list(self, bucket: str, prefix: str = "") -> Entries:
        """The objects below the folder `prefix`, sorted by key: `v1` lists `v1/…` and never `v10/…`."""
        return self._listing(bucket, _folder(prefix))

    def folders(self, bucket: str, prefix: str = "") -> Names:
        """The names of the folders directly below the folder `prefix`, sorted."""
        prefix = _folder(prefix)
        with explained(self.url, bucket):
            found = self._client.list_objects(bucket_name=bucket, prefix=prefix or None)
            return sorted(str(item.object_name)[len(prefix) :].rstrip("/") for item in found if item.is_dir)

    def buckets(self) -> Names:
        """The names of the buckets that the keys may see."""
        with explained(self.url):
            return sorted(bucket.name for bucket in self._client.list_buckets())

    def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket is there."""
        with explained(self.url, bucket):
            return self._client.bucket_exists(bucket_name=bucket)

    def ensure_bucket(self, bucket: str) -> None:
        """Make the bucket if it is not there."""
        from minio.error import S3Error

        with explained(self.url, bucket):
            if not self._client.bucket_exists(bucket_name=bucket):
                try:
                    self._client.make_bucket(bucket_name=bucket)
                except S3Error as error:  # somebody else made it in between
                    if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                        raise

    def upload_folder(self, folder: Path, bucket: str, prefix: str) -> FileTable:
        """Write a folder's files below `prefix`, and last their manifest, which is returned.

        ValueError if the folder is empty, holds a name that the store cannot keep, or if other objects are there
        already, which the folder would be mixed with.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        names = list_files(folder)
        if not names:
            raise ValueError(f"{folder}: holds no files; there is nothing to upload")
        if MANIFEST in names:
            raise ValueError(f"{folder / MANIFEST}: the name is the upload's own; remove or rename the file")
        prefix = _folder(prefix)
        others = sorted({entry.key for entry in self.list(bucket, prefix)} - {prefix + n for n in [*names, MANIFEST]})
        if others:
            raise ValueError(
                f"s3://{bucket}/{prefix}: already holds {_some(others)}, which {folder} does not; "
                "upload to another prefix, or remove them first"
            )
        table = self.upload_files({prefix + name: folder / name for name in names}, bucket)
        files = {name: table[prefix + name] for name in names}
        self.put(bucket, prefix + MANIFEST, canonical_json(files))
        return files

    def upload_files(self, files: Mapping[str, Path], bucket: str) -> FileTable:
        """Write files to keys in parallel. Returns SHA-256 and size of what was sent, by key."""
        for key in files:
            check_name(key, f"s3://{bucket}")
        table: FileTable = {}

        def send(key: str, count: Counter) -> None:
            table[key] = self.send(files[key], bucket, key, count)

        transfer(f"put s3://{bucket}", {key: path.stat().st_size for key, path in files.items()}, send)
        return {key: table[key] for key in files}

    def download_folder(self, bucket: str, prefix: str, target: Path) -> FileTable:
        """Write all objects below `prefix` to the folder `target`, which appears only when it is whole.

        Where an upload left a manifest, the names, sizes and SHA-256 must be the manifest's; files that `target`
        already holds are then not fetched again. Returns the files' table. ValueError if nothing is there, or if
        something is missing, extra or corrupted.
        """
        prefix = _folder(prefix)
        where = f"s3://{bucket}/{prefix}"
        # An empty object whose key ends in a slash is how consoles draw an empty folder.
        sizes = {e.key[len(prefix) :]: e.size for e in self.list(bucket, prefix) if not e.key.endswith("/")}
        if not sizes:
            raise ValueError(f"{where}: there is nothing here; `medforge store ls s3://{bucket}` lists what there is")
        if MANIFEST in sizes:
            del sizes[MANIFEST]
            files = read_table(self.get_json(bucket, prefix + MANIFEST), where + MANIFEST)
            compare_listing(sizes, files, where)
        else:
            files = {name: {"sha256": None, "size": size} for name, size in sizes.items()}
        self.download_files(bucket, prefix, files, target)
        return files

    def download_files(self, bucket: str, prefix: str, files: FileTable, target: Path) -> None:
        """Write the named files below `prefix` to the folder `target` in parallel, each checked while it is written."""
        prefix = _folder(prefix)
        for name in files:
            check_name(name, f"s3://{bucket}/{prefix}")
            for parent in Path(name).parents:
                if parent.as_posix() in files:
                    raise ValueError(f"s3://{bucket}/{prefix}: {parent} is both an object and a folder of objects")
        with new_folder(target) as work:

            def save(name: str, count: Counter) -> None:
                if _is(target / name, files[name]):
                    link_tree(target / name, work / name)
                    count(files[name]["size"])
                else:
                    self._save(bucket, prefix + name, files[name], work / name, count)

            sizes = {name: info["size"] for name, info in files.items()}
            transfer(f"get s3://{bucket}/{prefix}", sizes, save)

    def differing(self, bucket: str, prefix: str, files: FileTable) -> Names:
        """The names in `files` whose objects below `prefix` are missing or have another size or SHA-256, sorted."""
        prefix = _folder(prefix)
        there = {entry.key[len(prefix) :]: entry.size for entry in self.list(bucket, prefix)}
        same_size = {name: info["size"] for name, info in files.items() if there.get(name) == info["size"]}
        different = set(files) - set(same_size)

        def check(name: str, count: Counter) -> None:
            digest = hashlib.sha256()
            for piece in self._pieces(bucket, prefix + name, same_size[name]):
                digest.update(piece)
                count(len(piece))
            if digest.hexdigest() != files[name]["sha256"]:
                different.add(name)

        transfer(f"check s3://{bucket}/{prefix}", same_size, check)
        return sorted(different)

    def _listing(self, bucket: str, prefix: str) -> Entries:
        with explained(self.url, bucket):
            found = self._client.list_objects(bucket_name=bucket, prefix=prefix or None, recursive=True)
            return sorted(entry_of(item) for item in found)

    def send(self, source: Path, bucket: str, key: str, count: Counter) -> dict[str, Any]:
        """Upload one file and return {"sha256", "size"} as sent. `count(bytes)` is called as it goes, and may raise."""
        with source.open("rb") as stream, explained(self.url, bucket, key):
            size = os.fstat(stream.fileno()).st_size
            reader = HashingReader(stream, count)
            self._client.put_object(
                bucket_name=bucket,
                object_name=key,
                data=reader,  # type: ignore[arg-type]  # the SDK only reads
                length=size,
                part_size=max(_PART, size // 9000),  # S3 allows 10,000 parts
                num_parallel_uploads=1,  # the files go in parallel; their parts in order
            )
            return {"sha256": reader.digest.hexdigest(), "size": size}

    def _save(self, bucket: str, key: str, info: dict[str, Any], path: Path, count: Counter) -> None:
        """Stream an object to `path` inside a folder that nobody sees yet; ValueError if it is not what `info` says."""
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb") as stream:
            for piece in self._pieces(bucket, key, info["size"]):
                stream.write(piece)
                digest.update(piece)
                count(len(piece))
        if info["sha256"] not in (None, digest.hexdigest()):
            raise ValueError(
                f"s3://{bucket}/{key}: is corrupted: its SHA-256 is {digest.hexdigest()}, the manifest says "
                f"{info['sha256']}; upload it again from its source"
            )

    def _pieces(self, bucket: str, key: str, size: int) -> Iterator[bytes]:
        """An object's bytes; a connection that breaks is taken up again where it broke."""
        from urllib3.exceptions import HTTPError

        done = broken = 0
        with explained(self.url, bucket, key):
            while done < size:
                before = done
                response = self._client.get_object(bucket_name=bucket, object_name=key, offset=done)
                try:
                    for piece in response.stream(_CHUNK):
                        done += len(piece)
                        yield piece
                except HTTPError:
                    broken += 1
                    if broken > _BROKEN_READS:
                        raise
                else:
                    if done == before:
                        break
                finally:
                    response.close()
                    response.release_conn()
        if done != size:
            raise ValueError(f"s3://{bucket}/{key}: is corrupted: it has {done} bytes, not {size}")


def read_table(value: Any, where: str) -> FileTable:
    """`value` as a table of files; ValueError names the entry that is none."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where}: is not a table of files")
    for name, info in value.items():
        check_name(name, where)
        digest, size = (info.get("sha256"), info.get("size")) if isinstance(info, dict) else (None, None)
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest) or type(size) is not int:
            raise ValueError(f"{where}: {name}: has no SHA-256 and size")
    return value


def compare_listing(sizes: Mapping[str, int], files: FileTable, where: str) -> None:
    """Raise ValueError unless the listed names and sizes are the table's."""
    if missing := sorted(set(files) - set(sizes)):
        raise ValueError(f"{where}: {_some(missing)} missing, though its manifest names them; upload the folder again")
    if extra := sorted(set(sizes) - set(files)):
        raise ValueError(f"{where}: {_some(extra)} there, though its manifest does not name them; remove them")
    for name, size in sizes.items():
        if size != files[name]["size"]:
            raise ValueError(
                f"{where}{name}: is corrupted: it has {size} bytes, the manifest says {files[name]['size']}; "
                "upload it again from its source"
            )


def _some(names: Names) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} object{'s' * (len(names) != 1)} ({', '.join(names[:3])}{more})"


def _folder(prefix: str) -> str:
    """The prefix with one slash at its end, so that `v1` does not also mean `v10`."""
    return prefix.strip("/") + "/" if prefix.strip("/") else ""


def _is(path: Path, info: dict[str, Any]) -> bool:
    return (
        info["sha256"] is not None
        and path.is_file()
        and path.stat().st_size == info["size"]
        and sha256_file(path) == info["sha256"]
    )
