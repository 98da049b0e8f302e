"""The audit log: an append-only file of JSON lines in which every row holds the hash of the row before it.

Each line is the canonical JSON of {seq, at, prev, …entry…, hash}: `seq` counts from 1, `at` is UTC, `prev` is the hash
of the row before (64 zeros in the first), `hash` the SHA-256 of the row's canonical JSON without it. A row that was
changed, removed, swapped or put in breaks the chain. A tail that was cut off leaves a shorter chain that is whole:
it is found by a head (a row's hash) that was noted elsewhere, which must still be there.

A file has one writer, which holds a lock on it. Given a folder, a writer takes the first of
audit-<host>-0.jsonl, audit-<host>-1.jsonl, … that nobody holds, so that a restart goes on with its file and replicas
on one volume do not meet. Nothing is ever rewritten: what a crash left of a row stays, and is closed by a row
{event: "truncated", bytes, sha256} that says what stands there. Where rows could not be written for a while (a full
disk), the first row after it may be {event: "resumed", refused}: how many were not.

No health information: an entry's fields are those of FIELDS, and its values are numbers or short names.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from medforge.files import canonical_json, sha256_bytes

FIELDS = frozenset(
    {"request_id", "caller", "client", "route", "status", "release", "track", "inputs", "outputs", "decision", "reason"}
)
START = "0" * 64
_NAME = re.compile(r"[!-~]{1,200}")  # printable, without white space: a name or a digest, never a sentence
_TAIL = 1 << 20  # bytes at a file's end in which its last row is looked for; a row has less than 4 KiB
# rows' strings are printable ASCII: these are canonical_json's bytes, in an eighth of the time
_encode = msgspec.json.Encoder(order="sorted").encode


def _now() -> datetime:
    return datetime.now(timezone.utc)


class AuditLog:
    """The writer of one file. `write` returns when its rows are on the disk; not for several threads.

    `path` is a .jsonl file, or a folder in which a free one is taken. With `fsync=False` rows survive the process but
    not a loss of power. ValueError if another process writes to the file, or its last row is not what was written.
    """

    def __init__(self, path: Path, fsync: bool = True, clock: Callable[[], datetime] = _now) -> None:
        self._clock = clock
        self.path, self._file = _take(path, os.O_DSYNC if fsync else 0)
        self._closed = False
        try:
            self._seq, self.head, torn = _last_row(self.path, self._file)
            self._size = os.fstat(self._file).st_size
            if torn:
                note = {"event": "truncated", "bytes": len(torn), "sha256": sha256_bytes(torn)}
                self._write([note], before=b"" if torn.endswith(b"\n") else b"\n")
        except BaseException:
            self.close()
            raise

    def append(self, entry: Mapping[str, Any]) -> str:
        """Write a row. Returns its hash. OSError if it cannot be written: nothing is then.

        None values are left out. ValueError names a field that FIELDS lacks or a value that is no number or short name.
        """
        return self.write([checked(entry)])[0]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Write rows that are `checked`, or notes of the log itself, all or none. Returns their hashes. OSError as of
        `append`."""
        if self._closed:
            raise OSError(f"{self.path}: the audit log is closed")
        return self._write(rows)

    def close(self) -> None:
        """Give the file free."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def _write(self, rows: Sequence[Mapping[str, Any]], before: bytes = b"") -> list[str]:
        at = self._clock().astimezone(timezone.utc).isoformat(timespec="milliseconds")
        lines, hashes, head = [before], [], self.head
        for number, row in enumerate(rows, self._seq + 1):
            body = {"seq": number, "at": at, "prev": head, **row}
            head = body["hash"] = sha256_bytes(_encode(body))
            lines += (_encode(body), b"\n")
            hashes.append(head)
        data = b"".join(lines)
        found = os.fstat(self._file)
        if found.st_size != self._size or not found.st_nlink:
            raise OSError(f"{self.path}: was changed or removed under its writer; keep it, and start the gateway anew")
        try:
            _write_all(self._file, data)
        except OSError:
            # nobody was told that these rows are kept; where they cannot be taken back, the size no longer fits and
            # nothing more is written
            os.ftruncate(self._file, self._size)
            raise
        self._seq, self.head, self._size = self._seq + len(rows), head, self._size + len(data)
        return hashes


def checked(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields without those that are None. ValueError as of `AuditLog.append`."""
    if unknown := sorted(set(entry) - FIELDS):
        raise ValueError(f"audit: {', '.join(unknown)}: is no field of the log; {', '.join(sorted(FIELDS))} are")
    row = {name: value for name, value in entry.items() if value is not None}
    for name, value in row.items():
        if type(value) is not int and not (isinstance(value, str) and _NAME.fullmatch(value)):
            # the value is not repeated: it may be what must not be in a log
            raise ValueError(f"audit: {name}: is no number and no name of 1 to 200 characters without white space")
    return row


def _take(path: Path, flags: int) -> tuple[Path, int]:
    """The file to write to and its descriptor, opened with these flags besides the usual ones, and locked."""
    if path.suffix == ".jsonl":
        return path, _lock(path, flags)
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "host"
    number = 0
    while True:
        file = path / f"audit-{host}-{number}.jsonl"
        try:
            return file, _lock(file, flags)
        except _InUseError:
            number += 1


class _InUseError(ValueError):
    """Another process writes to the file."""


def _lock(path: Path, flags: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise _InUseError(f"{path}: another process writes to this audit log; give each its own file") from None
    if new:
        _sync_folder(path.parent)
    return file


def _sync_folder(folder: Path) -> None:
    """Keep a new file's name over a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _last_row(path: Path, file: int) -> tuple[int, str, bytes]:
    """Number and hash of the last row, and the bytes behind it, which a crash left."""
    size = os.fstat(file).st_size
    start = max(0, size - _TAIL)
    tail = os.pread(file, size - start, start)
    if tail and not tail.endswith(b"\n") and _is_json(tail[tail.rfind(b"\n") + 1 :]):
        _write_all(file, b"\n")  # the row is whole, its end alone is missing
        tail += b"\n"
    end = len(tail)
    while end:
        begin = tail.rfind(b"\n", 0, end - 1) + 1
        line = tail[begin:end]
        if line.endswith(b"\n"):
            try:
                row = _parse(line[:-1])
            except ValueError as error:
                if _is_json(line):
                    raise ValueError(
                        f"{path}: its last row {error}; `medforge audit verify {path}` says more"
                    ) from None
            else:
                return row["seq"], row["hash"], tail[end:]
        end = begin
    if start:
        raise ValueError(f"{path}: its last {_TAIL} bytes hold no row; `medforge audit verify {path}` says more")
    return 0, START, tail


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes) -> dict[str, Any]:
    """The row that a line holds; ValueError says why it is not one that `AuditLog` wrote."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("is no JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("hash"), str) or type(row.get("seq")) is not int:
        raise ValueError("is no row of an audit log")
    body = {name: value for name, value in row.items() if name != "hash"}
    if canonical_json(row) != line or sha256_bytes(canonical_json(body)) != row["hash"]:
        raise ValueError("was changed: its hash is not the hash of what it says")
    return row


@dataclass(frozen=True)
class Chain:
    """A file that was verified: its rows, the time of the first and the last (None for none), and the last's hash."""

    path: Path
    rows: int
    first: str | None
    last: str | None
    head: str
    truncated: int


def verify(path: Path, head: str | None = None) -> tuple[int, str]:
    """The number of rows in a file or a folder's files, and the hash of the last (in a folder: the latest) one.

    ValueError as of `verify_files`.
    """
    chains = verify_files(path, head)
    return sum(chain.rows for chain in chains), max(chains, key=lambda chain: chain.last or "").head


def verify_files(path: Path, head: str | None = None) -> list[Chain]:
    """Read an audit log, or each of a folder, and prove its chain. `head` is a hash that must stand in one of them.

    ValueError names file and line of the first row that was changed, removed, swapped or put in, or says that the
    row with the hash `head` is gone.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise ValueError(f"{path}: holds no audit log (*.jsonl)")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path}: no such file or folder")
    chains, found = [], head in (None, START)
    for file in files:
        last: dict[str, Any] | None = None
        rows, first, truncated = 0, None, 0
        for row in _rows(file):
            rows, first, last = rows + 1, first or row["at"], row
            truncated += row.get("event") == "truncated"
            found = found or row["hash"] == head
        chains.append(
            Chain(file, rows, first, last["at"] if last else None, last["hash"] if last else START, truncated)
        )
    if not found:
        raise ValueError(f"{path}: no row has the hash {head}: rows at the end, or a whole file, were removed")
    return chains


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file in order, each proved; ValueError names the first line that does not fit."""
    seq, prev, torn, torn_from = 0, START, b"", 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("is not whole: its writer was interrupted, or the end was cut off")
                row = _parse(line[:-1])
            except ValueError as error:
                if _is_json(line):
                    raise ValueError(f"{path}: line {number}: {error}") from None
                torn, torn_from = torn + line, torn_from or number
                continue
            where = f"{path}: line {number}"
            if torn:
                if row.get("event") != "truncated" or not _says(row, torn):
                    raise ValueError(
                        f"{path}: line {torn_from}: is no whole row, and the row behind it does not say why"
                    )
                torn, torn_from = b"", 0
            if row["seq"] != seq + 1:
                raise ValueError(
                    f"{where}: is row {row['seq']} where row {seq + 1} should be: rows were removed or moved"
                )
            if row["prev"] != prev:
                raise ValueError(f"{where}: does not follow the row before it: one of them was replaced or put in")
            seq, prev = row["seq"], row["hash"]
            yield row
    if torn:
        raise ValueError(
            f"{path}: line {torn_from}: is not whole: its writer was interrupted (starting the gateway notes it), or "
            "the end was cut off"
        )


def _says(note: Mapping[str, Any], torn: bytes) -> bool:
    """Whether a `truncated` row describes these bytes, the new line that closes them apart."""
    return any((note.get("bytes"), note.get("sha256")) == (len(left), sha256_bytes(left)) for left in (torn, torn[:-1]))
