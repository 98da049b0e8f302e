"""Text that grows by tokens, against the tokenizer and a plain reading of the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.predictor.text import Text, Vocabulary


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))


def test_the_bytes_of_any_tokens_are_what_the_tokenizer_decodes(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    everything = list(range(len(tokenizer)))
    for ids in (everything, everything[::-1], everything[::7], *([token] for token in everything)):
        joined = b"".join(vocabulary.data(token) for token in ids).decode("utf-8", "replace")
        assert joined == tokenizer.decode(ids, skip_special_tokens=False)
    assert vocabulary.data(len(tokenizer) + 5) == b""


def test_no_character_is_cut_in_two(tokenizer: Any) -> None:
    said = "左肺上叶有结节 — 12 mm, naïve 😀 é"
    ids = tokenizer.encode(said, add_special_tokens=False)
    vocabulary, text = Vocabulary(tokenizer), Text()
    assert len(ids) > len(said)  # characters of several tokens
    pieces = [text.push(vocabulary.data(token)) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + text.close() == said == text.answer


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first; of those, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text("ab \n肺", max_size=20)


@given(letters, st.lists(st.text("ab \n肺", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5)))
def test_stop_strings_never_get_out_however_the_bytes_come(said: str, stops: list[str], sizes: list[int]) -> None:
    data, text, pieces = said.encode(), Text(stops), []
    expected, stopped = cut(said, stops)
    while data and not text.stopped:
        size = sizes.pop() if sizes else 1
        pieces.append(text.push(data[:size]))
        data = data[size:]
    pieces.append(text.close())
    assert "".join(pieces) == text.answer == expected.strip()
    assert text.stopped == stopped
    assert text.push(b"more") == "" or not stopped


def test_bytes_that_are_no_character_are_told_at_the_end() -> None:
    text = Text()
    assert text.push(b"a\xe8\x82") == "a"
    assert text.close() == "\ufffd"
    assert text.answer == "a\ufffd"
    assert (text := Text()).push(b"\xff b") == "\ufffd b"


def test_text_is_handed_out_at_once_when_nothing_holds_it() -> None:
    text = Text(["END"])
    assert [text.push(part) for part in (b" ", b"yes", b" ", b"E", b"x", b"E", b"N", b"D")] == [
        "", "yes", "", "", " Ex", "", "", "",
    ]  # fmt: skip
    assert text.stopped and text.answer == "yes Ex"
