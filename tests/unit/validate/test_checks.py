from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from PIL import Image

from medforge.records import Box, Turn
from medforge.validate import statistics
from medforge.validate.checks import Checked, Repeats, check_sample, normalised
from medforge.validate.leakage import Holdings, report


@dataclass
class Fake:
    """What a fake encoder returns."""

    length: int = 20
    image_tokens: int = 4
    answer_tokens: int = 2


def check(sample: Any, fake: Fake | Exception | None = None, size: tuple[int, int] = (64, 48)) -> Checked:
    def load(_: Any) -> list[Image.Image]:
        return [Image.new("RGB", size) for _ in sample.images]

    def encode(*_: Any) -> Fake:
        if isinstance(fake, Exception):
            raise fake
        return fake or Fake()

    return check_sample(sample, load, encode, max_length=20)


def test_a_sound_sample(make_sample: Any) -> None:
    assert check(make_sample()[0]) == Checked((), 20, 4, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"turns": (Turn("user", "<image>Q"), Turn("assistant", " "))}, "empty-answer"),
        ({"turns": (Turn("user", "<image>"), Turn("assistant", "A"))}, "empty-question"),
        ({"turns": (Turn("user", "Q"), Turn("assistant", "A"))}, "image-marks"),
        ({"boxes": (Box("x", (0.5, 0, 0.4, 1)),)}, "box-range"),
        ({"boxes": (Box("x", (0, 0, 1, 1), image=1),)}, "box-reference"),
        ({"turns": (Turn("user", "<image>Q"), Turn("assistant", "<|box:0|>"))}, "box-reference"),
    ],
)
def test_a_breach_of_the_contract_is_not_encoded(make_sample: Any, changes: dict[str, Any], reason: str) -> None:
    checked = check(make_sample(**changes)[0], AssertionError("was encoded"))
    assert [name for name, _ in checked.problems] == [reason]
    assert checked.length is None


@pytest.mark.parametrize(
    ("fake", "reason", "detail"),
    [
        (ValueError("too elongated"), "not-encodable", "too elongated"),
        (Fake(image_tokens=0), "image-tokens", "0 image tokens for 1 images"),
        (Fake(answer_tokens=0), "no-answer-tokens", "not one token"),
        (Fake(length=21), "too-long", "21 tokens (4 of images), limit 20"),
    ],
)
def test_what_the_encoder_shows(make_sample: Any, fake: Any, reason: str, detail: str) -> None:
    ((name, text),) = check(make_sample()[0], fake).problems
    assert name == reason
    assert detail in text


def test_image_of_another_size(make_sample: Any) -> None:
    assert check(make_sample()[0], size=(48, 64)).problems == (("image-size", "image 0 is 48x64, noted as 64x48"),)


def test_unreadable_image(make_sample: Any) -> None:
    def load(_: Any) -> list[Image.Image]:
        raise ValueError("image file is truncated")

    checked = check_sample(make_sample()[0], load, lambda *_: Fake(), 20)
    assert checked.problems == (("unreadable-image", "image file is truncated"),)


def test_a_mistake_in_the_program_is_no_reject(make_sample: Any) -> None:
    with pytest.raises(TypeError):
        check(make_sample()[0], TypeError("a bug"))


def test_repeats_and_conflicts(make_sample: Any) -> None:
    def asked(number: int, question: str, answer: str, **changes: Any) -> Any:
        turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
        return replace(make_sample(number, image=changes.pop("image", 0))[0], id=str(number), turns=turns, **changes)

    repeats = Repeats()
    assert repeats.add(asked(1, "Is it large?", "Yes")) is None
    assert repeats.add(asked(2, "is  it large", "yes.")) == (
        "duplicate",
        "the same images, question and answer as sample 1",
    )
    assert repeats.add(asked(3, "Is it large?", "Yes", image=1)) is None
    assert repeats.add(asked(4, "Is it large?", "Yes", split="test")) is None
    assert repeats.conflicts == []
    assert repeats.add(asked(5, "Is it large?", "No")) is None
    assert [(c["first"], c["second"], c["second_answer"]) for c in repeats.conflicts] == [("1", "5", "no")]
    assert repeats.add(asked(6, "Is it large?", "no")) is not None


def test_normalised() -> None:
    assert normalised(" The  LEFT lung. ") == "the left lung"
    assert normalised("有吗？") == "有吗"


def test_leakage(make_sample: Any) -> None:
    samples = [
        make_sample(0, image=1, study_id="a")[0],
        make_sample(1, image=2, study_id="b")[0],
        make_sample(2, image=3, study_id="c")[0],
        make_sample(3, image=1, study_id="x", split="test")[0],
        make_sample(4, image=4, study_id="b", split="test")[0],
    ]
    held = Holdings.of(samples)
    (pair,) = report(samples, held, reject=False)
    assert (pair["splits"], pair["shared_images"], pair["shared_studies"]) == (["train", "test"], 1, 1)
    assert pair["samples"] == {"train": 2, "test": 2}
    assert "data.split=by-study" in pair["advice"]
    assert "data.shared_images=reject to drop the 2 train samples" in pair["advice"]
    assert [held.shares(s, "test") for s in samples[:3]] == ["image", "study", None]
    (pair,) = report(samples, held, reject=True)
    assert (pair["rejected"], pair["advice"]) == (2, None)
    (pair,) = report(samples[2:], Holdings.of(samples[2:]), reject=False)
    assert (pair["shared_images"], pair["samples"], pair["advice"]) == (0, {"train": 0, "test": 0}, None)


def test_statistics() -> None:
    assert statistics([]) is None
    assert statistics([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
    assert statistics(range(100, 0, -1)) == {"min": 1, "median": 50, "p95": 95, "max": 100}
