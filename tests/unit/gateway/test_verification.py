"""From tokens and texts to decisions, by hand-worked examples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from medforge.stages import RefusalConfig
from serving.gateway import api
from serving.gateway.answers import Capabilities, Token
from serving.gateway.images import Picture
from serving.gateway.regions import MAX_PIXELS, MIN_PIXELS, regions, smart_resize, text_boxes
from serving.gateway.settings import Settings
from serving.gateway.verification import (
    confidence,
    decide,
    falls_short,
    is_refusal,
    is_undecided,
    read_finding,
    yes_probability,
)


def token(text: str, probability: float = 0.9, **top: float) -> Token:
    return Token(text, math.log(probability), {name: math.log(value) for name, value in top.items()})


def picture(width: int, height: int, sent: tuple[int, int] | None = None) -> Picture:
    out = api.ImageOut(sha256="0" * 64, format="png", width=width, height=height)
    return Picture(out, b"", "image/png", sent or (width, height), {})


def test_confidence_is_the_geometric_mean() -> None:
    assert confidence([token("a", 0.9), token("b", 0.4)]) == pytest.approx(0.6)  # sqrt(0.36)
    assert confidence([token("a", 1.0)]) == 1.0
    assert confidence([]) is None
    assert confidence([Token("a", 1e-9, {})]) == 1.0  # rounding of a server is no probability above 1


def test_the_probability_of_yes() -> None:
    first = Token("Yes", math.log(0.6), {"Yes": math.log(0.6), " yes": math.log(0.1), "No": math.log(0.3)})
    assert yes_probability([first, token(".")]) == pytest.approx(0.7)
    first = Token(
        "否", math.log(0.5), {"否": math.log(0.5), "没有": math.log(0.2), "是": math.log(0.1), "有": math.log(0.2)}
    )
    assert yes_probability([first]) == pytest.approx(0.3)
    assert yes_probability([token("\n", 1.0), token("NO", 0.8, NO=0.8, YES=0.2)]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "tokens", [[], [token("\n")], [token("The", 0.95, The=0.95, Yes=0.02, No=0.03)], [token("yes")]]
)
def test_no_probability_where_the_word_is_neither_or_stands_alone(tokens: list[Token]) -> None:
    assert yes_probability(tokens) is None


@pytest.mark.parametrize(
    "text",
    [
        RefusalConfig().answer,
        RefusalConfig().answer_zh,
        "I'm sorry, but I can't help with that.",
        "I am unable to determine the diagnosis from this image.",
        "It cannot be determined from the image provided.",
        "As an AI language model, I do not give diagnoses.",
        "I can’t tell.",
        "There is insufficient information in the image.",
        "抱歉，我不能回答这个问题。",
        "不能确定。",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "No evidence of pneumothorax.",
        "The heart is normal. The left costophrenic angle cannot be assessed.",
        "A small effusion cannot be excluded.",
        "left lung",
        "没有",
        "右肺有结节。",
        "Cardiomegaly is seen; it cannot be determined whether it is new. " + "The lungs are clear. " * 20,
    ],
)
def test_what_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "present"), [("Yes.", True), ("yes, on the left", True), ("no", False), ("没有", False), ("是", True)]
)
def test_findings_are_read(text: str, present: bool) -> None:
    finding = read_finding("lesion", text, [])
    assert finding == api.Finding(name="lesion", present=present, probability=None)


@pytest.mark.parametrize("text", ["", "lesion", "It cannot be excluded.", "不确定"])
def test_findings_that_cannot_be_read(text: str) -> None:
    assert read_finding("lesion", text, []) is None


@pytest.mark.parametrize(
    ("present", "probability", "undecided"),
    [
        (True, 0.59, True),
        (True, 0.61, False),
        (False, 0.41, True),
        (False, 0.39, False),
        (False, 0.9, True),
        (True, 0.2, True),
        (True, None, False),
    ],
)
def test_the_margin(present: bool, probability: float | None, undecided: bool) -> None:
    assert is_undecided(api.Finding(name="x", present=present, probability=probability), 0.1) is undecided


def test_what_is_unknown_does_not_pass() -> None:
    score = api.Score(value=0.5, threshold=0.5, source="head")
    assert not falls_short(score, 0.5)
    assert falls_short(score, 0.51)
    assert falls_short(None, 0.01)
    assert not falls_short(None, 0.0)


def test_decisions_in_their_order(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path, confidence_threshold=0.6)
    good = api.Score(value=0.9, threshold=0.5, source="head")
    bad = api.Score(value=0.1, threshold=0.5, source="head")
    yes = api.Finding(name="x", present=True, probability=0.9)
    half = api.Finding(name="x", present=True, probability=0.52)
    assert decide("left lung", "stop", "ask", None, good, good, settings) is None
    assert decide("I cannot tell.", "stop", "ask", None, bad, bad, settings) == "model-refused"
    assert decide("left", "content_filter", "ask", None, good, good, settings) == "model-refused"
    assert decide(" ", "stop", "ask", None, good, good, settings) == "unreadable"
    assert decide("The lungs are", "length", "report", None, good, good, settings) == "unreadable"
    assert decide("perhaps", "stop", "finding", None, good, good, settings) == "unreadable"
    assert decide("Yes, there is", "length", "finding", yes, good, good, settings) is None
    assert decide("left", "stop", "ask", None, bad, bad, settings) == "low-match"
    assert decide("left", "stop", "ask", None, None, good, settings) == "low-match"
    assert decide("left", "stop", "ask", None, good, bad, settings) == "low-confidence"
    assert decide("left", "stop", "ask", None, good, None, settings) == "low-confidence"
    assert decide("yes", "stop", "finding", half, good, good, settings) == "undecided"


@pytest.mark.parametrize("limits", [(MIN_PIXELS, MAX_PIXELS), (4 * 28 * 28, 1280 * 28 * 28), (65_536, 262_144)])
@pytest.mark.parametrize("factor", [28, 32])
def test_smart_resize_is_that_of_transformers(factor: int, limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    sides = (1, 2, 13, 14, 27, 28, 29, 42, 56, 70, 98, 100, 223, 512, 640, 1023, 2048, 4000)
    for width in sides:
        for height in sides:
            if max(width, height) / min(width, height) > 200:
                with pytest.raises(ValueError, match="200 times"):
                    smart_resize((width, height), factor, *limits)
            else:
                expected = reference(height, width, factor, *limits)
                assert smart_resize((width, height), factor, *limits) == expected[::-1], (width, height)


def test_text_boxes_by_family() -> None:
    shown = picture(1000, 500)
    tokens = "<|box_start|>(100,200),(500,600)<|box_end|>"
    document = '{"bbox_2d": [98, 98, 490, 294], "label": "lesion"}'
    two = Capabilities("m", family="qwen2-vl")
    assert text_boxes(tokens, two, shown) == [(0.1, 0.2, 0.5, 0.6)]
    assert text_boxes(document, two, shown) == []
    # 1000 x 500 is seen as 1008 x 504: 36 and 18 times 28
    assert smart_resize((1000, 500), 28, MIN_PIXELS, MAX_PIXELS) == (1008, 504)
    assert text_boxes(document, Capabilities("m", family="qwen2.5-vl"), shown) == [
        pytest.approx((98 / 1008, 98 / 504, 490 / 1008, 294 / 504))
    ]
    assert text_boxes(document, Capabilities("m", family="qwen3-vl"), shown) == [(0.098, 0.098, 0.49, 0.294)]
    assert text_boxes(document, Capabilities("m"), shown) == []


def test_pixels_are_those_of_the_image_as_it_was_sent() -> None:
    found = regions([(0.1, 0.2, 0.5, 0.6)], "lesion", "head", picture(4000, 1000, sent=(2048, 512)))
    assert found == [
        api.Region(label="lesion", image=0, box=(0.1, 0.2, 0.5, 0.6), pixels=(400, 200, 2000, 600), source="head")
    ]


def test_boxes_are_cut_and_bad_ones_left_out() -> None:
    boxes = [(-0.5, 0.0, 0.5, 2.0), (0.5, 0.5, 0.4, 0.6), (0.2, 0.2, 0.2, 0.4), (1.5, 1.5, 2, 2), (-0.5, 0, 0.5, 1)]
    found = regions(boxes, "x", "text", picture(10, 10))
    assert [region.box for region in found] == [(0.0, 0.0, 0.5, 1.0)]  # the last is the first once more
