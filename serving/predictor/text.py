"""Tokens as text while they come: no character is ever cut in two, and no part of a stop string gets out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any


def _byte_table() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and after.

    (GPT-2's encoder.py, `bytes_to_unicode`, which all Qwen tokenizers use.)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_table()


class Vocabulary:
    """The bytes of each token of a byte-level tokenizer. Joined and decoded they are what the tokenizer decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def data(self, token: int) -> bytes:
        """The bytes of one token; none for an id beyond the tokenizer's own (models' tables are padded)."""
        if token not in self._known:
            text = self._tokenizer.convert_ids_to_tokens(token) or ""
            plain = all(character in _BYTES for character in text)
            self._known[token] = bytes(_BYTES[character] for character in text) if plain else text.encode()
        return self._known[token]


class Text:
    """An answer that grows. White space at its ends is not part of it, as in `medforge.models.generate.decode`."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._raw = ""
        self._sent = 0
        self._begun = False

    @property
    def answer(self) -> str:
        """The whole answer so far, up to a stop string: what the pieces make when they are joined."""
        return self._raw.strip()

    def push(self, data: bytes) -> str:
        """Take a token's bytes. Returns the text that is now certain; nothing after a stop string is."""
        return self._grow(self._decoder.decode(data))

    def close(self) -> str:
        """Returns what was held back: a stop string that was not completed, bytes that were no whole character."""
        rest = self._grow(self._decoder.decode(b"", final=True))
        return rest + self._release(len(self._raw))

    def _grow(self, text: str) -> str:
        if self.stopped:
            return ""
        begin = max(0, len(self._raw) - self._longest + 1)
        self._raw += text
        found = [(place + len(stop), place) for stop in self._stop if (place := self._raw.find(stop, begin)) >= 0]
        if found:  # the one that was complete first, however the text was cut into tokens
            self.stopped = True
            self._raw = self._raw[: min(found)[1]]
            return self._release(len(self._raw))
        return self._release(len(self._raw) - max(map(self._begins, self._stop), default=0))

    def _begins(self, stop: str) -> int:
        """How many characters at the end may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._raw))
        return next((n for n in range(longest, 0, -1) if self._raw.endswith(stop[:n])), 0)

    def _release(self, end: int) -> str:
        """What is new before `end`. White space waits until something follows it."""
        end = len(self._raw[:end].rstrip())
        if end <= self._sent:
            return ""
        piece = self._raw[self._sent : end]
        self._sent = end
        if not self._begun:
            self._begun, piece = True, piece.lstrip()
        return piece
