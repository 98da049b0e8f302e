"""Files that are whole or absent, and the digests that name them.

Everything that MedForge writes goes to a temporary name first and is renamed, so that a killed process or a full
disk leaves either the old file or the new one. Digests are SHA-256 in lower-case hexadecimal.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys and no white space: equal values give equal bytes. NaN is refused."""
    return _CANONICAL.encode(value).encode()


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of `value`'s canonical JSON."""
    return sha256_bytes(canonical_json(value))


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """The files below `folder` as sorted POSIX paths relative to it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def tree_digest(path: Path) -> str:
    """One digest for a folder (its files' names and bytes) or for a single file (its bytes).

    Raises FileNotFoundError when there is nothing at `path`.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return sha256_json({name: sha256_file(path / name) for name in list_files(path)})


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())  # mkstemp makes 0600, which other users of a shared volume cannot read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Key order is kept, so that equal values give equal files."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; ValueError names the file and the line when it is missing, empty or broken."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; a JSON file is expected") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: is empty; a JSON document is expected")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        raise ValueError(message) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; renamed to `path` at the end, removed if anything is raised.

    An existing folder at `path` is replaced only then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    work.chmod(0o777 & ~_umask())
    try:
        yield work
        replace_folder(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`, taking the place of a file or folder that stands there."""
    if target.is_dir() and not target.is_symlink():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
        os.replace(target, old / "old")
        os.replace(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.replace(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Put the file or folder `source` at `target` by hard links, or by copies where the file system has none."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _link(str(source), str(target))
        return
    with new_folder(target) as work:
        shutil.copytree(source, work, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
