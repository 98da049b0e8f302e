"""uvicorn's HTTP, with two limits that it lacks: how large a request's head may be, and how long it may take to come.

Without them one client without a key fills the memory with a header that never ends, and a few thousand half-sent
heads ("slowloris") take every connection.

And bodies are handed on in larger pieces than they come in: an image of 200 KB comes in five to ten, each of which
would wake the application. Most requests are one piece.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MOST_BYTES = 64 << 10
MOST_SECONDS = 10.0
PIECE = 1 << 20  # bytes of a body that are collected before the application is told of them


class _TooLarge(Exception):  # noqa: N818  the parser turns it into the end of the request
    """The head has more bytes than a head may have."""


class BoundedProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=BoundedProtocol)`."""

    _in_head = True
    _bytes = _seen = 0
    _timer: asyncio.TimerHandle | None = None
    _pieces: list[bytes]
    _held = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its first head has to come in time."""
        super().connection_made(transport)
        self._pieces = []
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes have come. The parser keeps those of an unfinished head, so they are counted here."""
        self._bytes += len(data)
        super().data_received(data)
        if self._in_head and self._bytes > MOST_BYTES:
            self._refuse(431)

    def on_message_begin(self) -> None:
        """A request begins; on a connection that is kept alive, not the first."""
        super().on_message_begin()
        if not self._in_head:
            self._begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is whole."""
        self._seen += len(name) + len(value)
        if self._seen > MOST_BYTES:
            raise _TooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._forget_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body has come."""
        self._pieces.append(body)
        self._held += len(body)
        if self._held >= PIECE:
            self._hand_on()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._hand_on()
        super().on_message_complete()

    def _hand_on(self) -> None:
        if self._pieces:
            body = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            self._pieces, self._held = [], 0
            if self.cycle is not None and not self.cycle.body:
                self.cycle.body = b""  # type: ignore[assignment]  # bytes pass through unchanged, a bytearray copies twice
            super().on_body(body)

    def _begin(self) -> None:
        self._in_head, self._bytes, self._seen = True, 0, 0
        self._forget_timer()
        self._timer = self.loop.call_later(MOST_SECONDS, self._refuse, 408)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int) -> None:
        """Say why, and hang up: where the request ends cannot be known."""
        self._forget_timer()
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
