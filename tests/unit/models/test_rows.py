"""Rows: positions against the models' own, and which items stand in which row and micro-batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medforge.models.encode import IGNORE, Encoded, Encoder
from medforge.models.families import FAMILIES
from medforge.models.rows import PADDING, Item, collate_rows, cut, make_row, positions
from tests.unit.models.passes import MERGE, PIXELS, case, some_cases

IMAGE, PAD = 7, 0


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, Any]:
    from medforge.models.load import load_model

    return {family: load_model(folder, "float32").cpu() for family, folder in tiny_models.items()}


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(base, *PIXELS)


def item(text: str, images: tuple[str, ...] = ("i",), grid: tuple[int, int] = (2, 4)) -> Item:
    """An item from letters: ``#`` an image, capitals are an answer's tokens."""
    ids: list[int] = []
    labels: list[int] = []
    for letter in text:
        count = grid[0] * grid[1] // MERGE**2 if letter == "#" else 1
        ids += [IMAGE if letter == "#" else ord(letter)] * count
        labels += [ord(letter) if letter.isupper() else IGNORE] * count
    grids = np.asarray([[1, *grid]] * text.count("#"), np.int64).reshape(-1, 3)
    encoded = Encoded(
        np.asarray(ids), np.asarray(labels), np.zeros((0, 8), np.float32), grids, ids.count(IMAGE), ((8, 8),)
    )
    return Item(encoded, images if "#" in text else (), text)


# --- positions

parts = st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 6), st.integers(1, 6)))


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=60, deadline=None)
@given(layout=st.lists(parts, min_size=1, max_size=7))
def test_positions_are_the_models_own(models: dict[str, Any], family: str, layout: list[int | tuple[int, int]]) -> None:
    """Text of some length and images of some grid, in any order."""
    import torch

    model = models[family].model
    image_id = model.config.image_token_id
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for part in layout:
        if isinstance(part, int):
            ids += [5] * part
        else:  # <|vision_start|> and <|vision_end|> always stand around an image
            ids += [1, *[image_id] * (part[0] * part[1]), 2]
            grids.append((1, part[0] * MERGE, part[1] * MERGE))
    tokens = torch.tensor([ids])
    expected, _ = model.get_rope_index(
        input_ids=tokens,
        mm_token_type_ids=(tokens == image_id).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones_like(tokens),
    )
    found = positions(np.asarray(ids), np.asarray(grids, np.int64).reshape(-1, 3), image_id, MERGE)
    np.testing.assert_array_equal(found, expected[:, 0].numpy())


def test_positions_by_hand() -> None:
    """Two tokens, an image of 2 x 3 tokens, one token: the text goes on at the image's start + 3."""
    ids = np.asarray([1, 1, *[IMAGE] * 6, 1])
    found = positions(ids, np.asarray([[1, 4, 6]]), IMAGE, MERGE)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


# --- one row


def letters(ids: np.ndarray) -> str:
    return "".join("#" if number == IMAGE else chr(number) for number in ids)


def test_a_row_by_hand() -> None:
    row = make_row([item("s#abcYE."), item("s#abdNOE."), item("s#axqr")], IMAGE, MERGE)
    # the prefix ends where the third differs; an answer's last token is predicted and never read
    assert letters(row.ids) == "s##a" + "bcY" + "bdNO" + "xqr"
    assert row.segments.tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    assert letters(row.targets) == "YENOE"
    assert row.predict.tolist() == [5, 6, 8, 9, 10]
    assert row.taps.tolist() == [5, 8, 13]
    # the image is one row of two tokens: the text after it goes on at 1 + 2; each branch at where the prefix ended
    after = [3, *(4, 5, 6), *(4, 5, 6, 7), *(4, 5, 6)]
    assert row.positions.tolist() == [[0, 1, 1, *after], [0, 1, 1, *after], [0, 1, 2, *after]]


def test_a_single_item_is_a_row_of_its_own() -> None:
    row = make_row([item("qaYE..")], IMAGE, MERGE)
    assert letters(row.ids) == "qaY"
    assert (row.predict.tolist(), letters(row.targets), row.taps.tolist()) == ([1, 2], "YE", [1])
    assert row.segments.tolist() == [1, 1, 1]


def test_every_answer_of_a_conversation_is_predicted_and_the_last_prompt_is_tapped() -> None:
    row = make_row([item("s#aYE.bNOE.")], IMAGE, MERGE)
    assert letters(row.ids) == "s##aYE.bNO"
    assert letters(row.targets) == "YENOE"
    assert letters(row.ids[row.predict]) == "aYbNO"
    assert letters(row.ids[row.taps]) == "b"


def test_the_same_item_twice_has_two_branches() -> None:
    """What carries loss or is pooled stands in its own branch, also where the prefix could go on."""
    row = make_row([item("s#aqYE.")] * 2, IMAGE, MERGE)
    assert letters(row.ids) == "s##a" + "qY" + "qY"
    assert letters(row.targets) == "YEYE"


@pytest.mark.parametrize(
    ("text", "end"), [("abYE.", 1), ("abYE.cNE", 5), ("abc", 2), ("aYEbNE..", 3), ("#abYE", 3), ("YE", -1)]
)
def test_the_prompts_end(text: str, end: int) -> None:
    assert item(text).prompt_end == end


# --- micro-batches

texts = st.tuples(st.sampled_from(["s#", "s#abc", "t#abc", ""]), st.text("abcdef", min_size=1, max_size=9)).map(
    lambda pair: pair[0] + pair[1] + "YE."
)


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(st.tuples(texts, st.sampled_from("ijk")), min_size=1, max_size=12),
    tokens=st.integers(4, 60),
    share=st.booleans(),
    buckets=st.booleans(),
    packed=st.booleans(),
)
def test_cut_keeps_every_item_once_and_the_bound(
    drawn: list[tuple[str, str]], tokens: int, share: bool, buckets: bool, packed: bool
) -> None:
    items = [
        Item(item(text).encoded, (image,) if "#" in text else (), number) for number, (text, image) in enumerate(drawn)
    ]
    found = cut(items, IMAGE, MERGE, tokens, share, buckets, packed)
    assert sorted(one.tag for rows in found for row in rows for one in row.items) == list(range(len(items)))
    for rows in found:
        lengths = [row.length for row in rows]
        size = sum(lengths) if packed else len(rows) * max(lengths)
        assert size <= tokens or (len(rows) == 1 and len(rows[0].items) == 1)
        for row in rows:
            assert {one.images for one in row.items} == {row.images}
            assert len(row.items) == 1 or (share and row.images)
    if buckets:
        flat = [row.length for rows in found for row in rows]
        assert flat == sorted(flat, reverse=True)
    again = cut(items, IMAGE, MERGE, tokens, share, buckets, packed)
    assert [[row.items for row in rows] for rows in again] == [[row.items for row in rows] for rows in found]


def test_a_too_long_item_stands_alone() -> None:
    items = [item("abcdefghYE"), item("aYE"), item("bYE")]
    found = cut(items, IMAGE, MERGE, 6, share=True, buckets=False, packed=False)
    assert [[one.tag for row in rows for one in row.items] for rows in found] == [["abcdefghYE"], ["aYE", "bYE"]]


def test_a_row_ends_where_the_tokens_do() -> None:
    """s##a is shared; each branch adds three tokens, of which the last is only predicted."""
    items = [item(f"s#a{letter}qYE") for letter in "bcdef"]
    found = cut(items, IMAGE, MERGE, 14, share=True, buckets=True, packed=False)
    assert [[len(row.items) for row in rows] for rows in found] == [[2], [2], [1]]
    assert all(row.length <= 14 for rows in found for row in rows)


def test_rows_of_like_length_stand_together() -> None:
    items = [item("a" * length + "YE") for length in (3, 30, 4, 29)]
    lengths = [[row.length for row in rows] for rows in cut(items, IMAGE, MERGE, 64, False, True, False)]
    assert lengths == [[31, 30], [5, 4]]
    lengths = [[row.length for row in rows] for rows in cut(items, IMAGE, MERGE, 64, False, False, False)]
    assert lengths == [[4, 31], [5, 30]]


def test_questions_of_an_image_are_one_row(encoder: Encoder) -> None:
    """The encoder's own samples: which share, which never do."""
    items = [replace(one.item, tag=number) for number, one in enumerate(some_cases(encoder))]
    (rows,) = cut(items, encoder.image_id, MERGE, 100_000, True, False, False)
    assert [[one.tag for one in row.items] for row in rows] == [[0, 2, 5, 7], [1], [3, 6], [4]]
    assert [row.images for row in rows] == [("a",), ("b",), ("a", "b"), ()]
    for row in rows:
        assert (row.ids == encoder.image_id).sum() == row.items[0].encoded.image_tokens  # once, not once an item
    alone = cut(items, encoder.image_id, MERGE, 100_000, False, False, False)
    assert all(len(row.items) == 1 for rows in alone for row in rows)


def test_an_image_after_differing_text_is_not_shared(encoder: Encoder) -> None:
    """The prefix that both have does not hold the image, so there is nothing to share."""
    one, other = (case(encoder, ("a",), "What is shown?", "a lung").item for _ in range(2))
    ids = other.encoded.input_ids.copy()
    ids[1] = int(ids[1]) + 1  # before the image
    changed = Item(Encoded(**(vars(other.encoded) | {"input_ids": ids})), other.images)
    (rows,) = cut([one, changed], encoder.image_id, MERGE, 100_000, True, True, False)
    assert [len(row.items) for row in rows] == [1, 1]


# --- as tensors


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_by_hand(packed: bool) -> None:
    rows = [make_row([item("s#abYE"), item("s#cNE")], IMAGE, MERGE), make_row([item("qxY")], IMAGE, MERGE)]
    batch = collate_rows(rows, IMAGE, PAD, packed)
    first, second = "s##" + "abY" + "cN", "qx"
    ids = [letters(line.numpy()).replace(chr(PAD), "_") for line in batch.input_ids]
    assert ids == ([first + second] if packed else [first, second + "______"])
    assert batch.branched
    assert batch.real_tokens == 10
    flat = batch.input_ids.flatten()
    assert letters(flat[batch.predict].numpy()) == "bYcNx"
    assert letters(batch.targets.numpy()) == "YENEY"
    assert letters(flat[batch.taps].numpy()) == "bcx"
    assert letters(flat[batch.image_mask.flatten()].numpy()) == "##"
    assert [one.tag for one in batch.items] == ["s#abYE", "s#cNE", "qxY"]
    assert (batch.images, batch.grid.tolist()) == (("i",), [[1, 2, 4]])
    assert [batch.position_ids[axis].flatten()[batch.segments.flatten() != PADDING].tolist() for axis in (0, 2)] == [
        [0, 1, 1, 3, 4, 5, 3, 4, 0, 1],
        [0, 1, 2, 3, 4, 5, 3, 4, 0, 1],
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_who_sees_whom_by_hand(packed: bool) -> None:
    rows = [make_row([item("s#abYE"), item("s#cNE")], IMAGE, MERGE), make_row([item("qxY")], IMAGE, MERGE)]
    visible = collate_rows(rows, IMAGE, PAD, packed).visible
    assert visible is not None
    first = ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxx...x.", "xxx...xx"]
    if packed:
        expected = [[line + ".." for line in first] + ["." * 8 + "x.", "." * 8 + "xx"]]
    else:  # padding sees itself, so that no softmax is over nothing
        padding = [".." + "x" * n + "." * (6 - n) for n in range(1, 7)]
        expected = [first, ["x.......", "xx......", *padding]]
    assert [["".join(".x"[int(v)] for v in line) for line in lines] for lines in visible[:, 0]] == expected


def test_single_items_need_no_mask_of_their_own() -> None:
    rows = [make_row([item("abYE")], IMAGE, MERGE), make_row([item("s#aYE")], IMAGE, MERGE)]
    assert collate_rows(rows, IMAGE, PAD).visible is None
    assert collate_rows(rows[:1], IMAGE, PAD, packed=True).visible is None
    assert collate_rows(rows, IMAGE, PAD, packed=True).visible is not None


def test_a_batch_moves_with_all_its_tensors() -> None:
    import torch

    batch = collate_rows([make_row([item("s#abYE"), item("s#cNE")], IMAGE, MERGE)], IMAGE, PAD)
    moved = batch.to("meta")
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {name for name in tensors if getattr(moved, name).device.type == "meta"} == tensors
    assert (moved.items, moved.images, moved.branched) == (batch.items, batch.images, batch.branched)
