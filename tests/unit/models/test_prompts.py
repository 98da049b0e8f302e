"""Boxes and turns in each family's words, against hand-worked examples."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.models.families import FAMILIES, Family
from medforge.models.prompts import messages, parse_boxes, render_box
from medforge.records import Box
from tests.unit.models.examples import picture, sample

QWEN2, QWEN25, QWEN3 = FAMILIES["qwen2-vl"], FAMILIES["qwen2.5-vl"], FAMILIES["qwen3-vl"]
NODULE = Box("lung nodule", (0.1, 0.2, 0.55, 0.9))


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        # the paper's example form: 0.1 x 1000 = 100 and so on, whatever the picture's size
        (
            "qwen2-vl",
            (112, 56),
            "<|object_ref_start|>lung nodule<|object_ref_end|><|box_start|>(100,200),(550,900)<|box_end|>",
        ),
        # pixels of a picture that was resized to 4 x 28 by 2 x 28: 11.2, 11.2, 61.6, 50.4
        ("qwen2.5-vl", (112, 56), '{"bbox_2d": [11, 11, 62, 50], "label": "lung nodule"}'),
        # 20 x 28 by 30 x 28: 56, 168, 308, 756
        ("qwen2.5-vl", (560, 840), '{"bbox_2d": [56, 168, 308, 756], "label": "lung nodule"}'),
        ("qwen3-vl", (112, 56), '{"bbox_2d": [100, 200, 550, 900], "label": "lung nodule"}'),
    ],
)
def test_a_box_is_written_in_the_familys_notation(family: str, size: tuple[int, int], expected: str) -> None:
    assert render_box(NODULE, FAMILIES[family], size) == expected


def test_json_boxes_are_json() -> None:
    box = Box('a "rare" 肿块\\', (0.0, 0.0, 1.0, 1.0))
    for family in (QWEN25, QWEN3):
        assert json.loads(render_box(box, family, (280, 140))) == {
            "bbox_2d": [0, 0, 280, 140] if family is QWEN25 else [0, 0, 1000, 1000],
            "label": box.label,
        }


def test_each_box_uses_the_size_of_its_image() -> None:
    images = [picture(0), picture(1)]
    boxes = [Box("a", (0.25, 0.5, 0.5, 1.0), 1), Box("b", (0.25, 0.5, 0.5, 1.0), 0)]
    item = sample([("user", "<image><image>Where?"), ("assistant", "<|box:0|>, <|box:1|>")], images, boxes)
    answer = messages(item, QWEN25, [(112, 56), (280, 560)])[-1]["content"]
    assert answer == '{"bbox_2d": [70, 280, 140, 560], "label": "a"}, {"bbox_2d": [28, 28, 56, 56], "label": "b"}'


def test_turns_become_messages_with_the_images_in_their_places() -> None:
    item = sample(
        [
            ("system", " Be brief. "),
            ("user", "Left <image> right\n<image>"),
            ("assistant", " fine\n"),
            ("user", "And <|box:0|>?"),
        ],
        [picture(0), picture(1)],
        [NODULE],
    )
    assert messages(item, QWEN3, [(96, 96), (96, 96)]) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Left "},
                {"type": "image"},
                {"type": "text", "text": " right"},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "fine"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": 'And {"bbox_2d": [100, 200, 550, 900], "label": "lung nodule"}?'},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        (QWEN2, "<|box_start|>(100,200),(550,900)<|box_end|>", [(0.1, 0.2, 0.55, 0.9)]),
        (QWEN2, "one (100, 200) , (550,900) two (0,0),(10,20)", [(0.1, 0.2, 0.55, 0.9), (0, 0, 0.01, 0.02)]),
        (QWEN25, '[{"bbox_2d": [50, 10, 100, 40]}, {"bbox_2d": [0,0,200,100]}]', [(0.25, 0.1, 0.5, 0.4), (0, 0, 1, 1)]),
        (QWEN3, '```json\n[\n {"bbox_2d": [50.5, 10, 100, 40]}\n]\n```', [(0.0505, 0.01, 0.1, 0.04)]),
        # inverted and out of range: kept as they are, for the metrics to see
        (QWEN2, "(900,900),(100,1200)", [(0.9, 0.9, 0.1, 1.2)]),
        (QWEN25, "[300, -10, 100, 40]", [(1.5, -0.1, 0.5, 0.4)]),
        (QWEN3, "[1500, 10, -100, 40]", [(1.5, 0.01, -0.1, 0.04)]),
        # no box, or half of one, or another family's
        (QWEN2, "lung", []),
        (QWEN2, "(100,200)", []),
        (QWEN2, "[100, 200, 550, 900]", []),
        (QWEN3, "(100,200),(550,900)", []),
        (QWEN3, "[100, 200, 550]", []),
        (QWEN3, "[100, 200, 550, 900, 1]", []),
        (QWEN3, "[a, b, c, d] {}", []),
        (QWEN25, "", []),
    ],
)
def test_boxes_are_read_from_what_a_model_wrote(
    family: Family, text: str, expected: list[tuple[float, float, float, float]]
) -> None:
    found = parse_boxes(text, family, (200, 100))
    assert found == [pytest.approx(box) for box in expected]


def test_a_number_too_large_for_a_float_is_no_box() -> None:
    """A small model may repeat a digit up to its limit, and infinity is no JSON number."""
    huge = "9" * 400
    assert parse_boxes(f"[1, 2, 3, {huge}] [1, 2, 3, 4]", QWEN3, (96, 96)) == [(0.001, 0.002, 0.003, 0.004)]
    assert parse_boxes(f"(1,2),(3,{huge})", QWEN2, (96, 96)) == []


shares = st.floats(0.0, 1.0)


@given(
    family=st.sampled_from(list(FAMILIES.values())),
    corners=st.tuples(shares, shares, shares, shares),
    label=st.text(st.characters(exclude_categories=["Cs", "P", "S"]), max_size=10),
    size=st.tuples(st.integers(2, 80), st.integers(2, 80)),
)
def test_a_written_box_is_read_back_within_its_rounding(
    family: Family, corners: tuple[float, float, float, float], label: str, size: tuple[int, int]
) -> None:
    pixels = (size[0] * 28, size[1] * 28)
    text = render_box(Box(label, corners), family, pixels)
    (found,) = parse_boxes(text, family, pixels)
    steps = pixels * 2 if family is QWEN25 else (1000,) * 4
    for wanted, got, step in zip(corners, found, steps, strict=True):
        assert abs(wanted - got) <= 0.5 / step + 1e-9
