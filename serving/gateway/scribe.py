"""The audit log's writer, a process of its own: rows go to it as lines of JSON, and it tells which are on the disk.

A thread would have to take Python's lock from whoever answers, several times for each write, and wait for it longer
than for the disk. What comes while one write is on its way is the next one.

The process outlasts the gateway's signals, so that what drains is still written, and ends when the gateway has ended,
however that came. Where it ends first, what waits fails, and another is started with the next row.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from medforge.audit import AuditLog, checked

_START_SECONDS, _STOP_SECONDS = 20.0, 10.0
_APART = 1.0  # seconds between the starts of processes that do not live
_MOST = 1 << 20  # bytes that are read at once: some thousand rows
_encode = msgspec.json.encode


class _Told(msgspec.Struct):
    """What the process tells: first of itself (`path`), then of the oldest `rows` rows that it was sent."""

    head: str = ""
    path: str = ""
    rows: int = 0
    error: str | None = None


_told = msgspec.json.Decoder(_Told)
_row = msgspec.json.Decoder(dict[str, Any])


class Scribe(asyncio.Protocol):
    """The gateway's end of it; made and used on the event loop.

    `path` is the file that is written to, `head` the hash of its last row, `refused` counts the rows that could not be
    written since the last that was.
    """

    def __init__(self, folder: Path, fsync: bool) -> None:
        self._folder, self._fsync = folder, fsync
        self.path, self.head, self.refused = folder, "", 0
        self._process: subprocess.Popen[bytes] | None = None
        self._opened: asyncio.Transport | None = None
        self._transport: asyncio.Transport | None = None  # the same, from the process's first word to its end
        self._starting = asyncio.Lock()
        self._started = -_APART
        self._begun: asyncio.Future[_Told] | None = None
        self._waiting: deque[tuple[asyncio.Future[None], bool]] = deque()  # and whether the row is a request's
        self._rest = b""
        self._probing = self._closed = False

    async def start(self) -> None:
        """Start the process. ValueError if the log cannot be gone on with; see AuditLog."""
        await asyncio.to_thread(self._reap)
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._begun = loop.create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "serving.gateway.scribe", str(self._folder), str(int(self._fsync))]
            self._process = subprocess.Popen(  # noqa: S603  our own program
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # wherever it was started
            )
        transport, _ = await loop.create_unix_connection(lambda: self, sock=ours)
        try:
            told = await asyncio.wait_for(self._begun, _START_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            transport.close()
            reason = str(error) or "it says nothing"
            raise ValueError(f"{self._folder}: the audit log's writer does not start: {reason}") from None
        if told.error is not None:
            transport.close()
            raise ValueError(told.error)

    async def write(self, entry: Mapping[str, Any]) -> None:
        """Return when the row is on the disk. OSError if it cannot be written: only a killed process can have left it.

        None values are left out. ValueError names a field that FIELDS lacks or a value that is no number or short name.
        A caller that is cancelled meanwhile does not undo the row.
        """
        await self._write(checked(entry))

    async def probe(self) -> bool:
        """Whether rows can be written. After a failure that is found out by writing one.

        Whoever sends nothing more because nothing was written would otherwise never learn that there is room again.
        """
        if self.refused and not self._probing:
            self._probing = True
            try:
                await self._write({"event": "resumed", "refused": self.refused})
            except OSError:
                return False
            finally:
                self._probing = False
        return not self.refused

    async def close(self) -> None:
        """Let the process write what it was sent, and end."""
        self._closed = True
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            await asyncio.to_thread(self._reap)

    async def _write(self, row: dict[str, Any]) -> None:
        if self._transport is None:
            await asyncio.shield(self._start_again())  # a caller that hangs up leaves none half started
        if self._transport is None:
            raise OSError(f"{self.path}: the audit log's writer has ended")
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((done, "event" not in row))
        self._transport.write(_encode(row) + b"\n")
        await done

    async def _start_again(self) -> None:
        async with self._starting:
            if self._transport is not None:
                return
            try:
                if self._closed:
                    raise OSError(f"{self.path}: the audit log is closed")
                if time.monotonic() - self._started < _APART:
                    raise OSError(f"{self.path}: the audit log's writer has ended; another is started in a moment")
                await self.start()
            except (OSError, ValueError) as error:
                self.refused += 1
                raise OSError(str(error)) from error

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open; the process has said nothing yet."""
        self._opened = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """What the process tells."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            told = _told.decode(line)
            if self._begun is not None and not self._begun.done():
                if told.error is None:
                    self.path, self.head, self._transport = Path(told.path), told.head, self._opened
                self._begun.set_result(told)
                continue
            if told.error is None:
                self.head, self.refused = told.head, 0
            self._settle(told.rows, None if told.error is None else OSError(told.error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended, or `close` was called."""
        self._transport, self._rest = None, b""
        error = OSError(f"{self.path}: the audit log's writer has ended")
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(error)
        self._settle(len(self._waiting), error)

    def _settle(self, rows: int, error: OSError | None) -> None:
        """Tell those who wait for the oldest rows."""
        for _ in range(rows):
            done, counts = self._waiting.popleft()
            if error is not None and counts:
                self.refused += 1
            if done.done():  # the caller has hung up; the row is kept all the same
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def _reap(self) -> None:
        """Wait for the end of a process whose socket is closed."""
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # a disk that hangs
            self._process.kill()
            self._process.wait()
        self._process = None


def main(folder: str, fsync: str, descriptor: str) -> int:
    """The process: write what comes until the other end is closed. Returns 1 where the log cannot be gone on with."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as connection:
        try:
            log = AuditLog(Path(folder), fsync=fsync == "1")
        except (OSError, ValueError) as error:
            _tell(connection, _Told(error=str(error)))
            return 1
        _tell(connection, _Told(log.head, str(log.path)))
        rest = b""
        while data := connection.recv(_MOST):
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                _tell(connection, _keep(log, [_row.decode(line) for line in lines]))
        log.close()
    return 0


def _keep(log: AuditLog, rows: list[dict[str, Any]]) -> _Told:
    try:
        log.write(rows)
    except OSError as error:
        return _Told(rows=len(rows), error=str(error))
    return _Told(log.head, rows=len(rows))


def _tell(connection: socket.socket, told: _Told) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody listens any more; what was sent is kept
        connection.sendall(_encode(told) + b"\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
