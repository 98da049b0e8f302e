"""The stage's samples: views, refusals, what is kept in memory, and what the model gets to see."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medforge.dataset import Dataset
from medforge.models.encode import Encoder
from medforge.records import Box, ImageRef, Sample
from medforge.stages import RefusalConfig, StageConfig, ViewConfig
from medforge.train.data import Recent, Samples, blank, holds, refusals, select
from tests.unit.models.examples import SIZE, sample


def stage(**changes: Any) -> StageConfig:
    return StageConfig.model_validate({"name": "say", "tune": ["vision_merger"], "steps": 1, **changes})


@pytest.fixture(scope="module")
def dataset(phantoms: Path) -> Dataset:
    return Dataset.open(phantoms)


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(base, SIZE**2, SIZE**2)


# --- views


def one(answer: str = "a lung", **changes: Any) -> Sample:
    return sample([("user", "What?"), ("assistant", answer)], **changes)


@pytest.mark.parametrize(
    ("view", "inside", "outside"),
    [
        ({}, [one(), one(answer_type="closed")], []),
        ({"answer_types": ["closed"]}, [one(answer_type="closed")], [one(answer_type="open")]),
        ({"question_types": ["organ", "plane"]}, [one(question_type="plane")], [one(question_type="size")]),
        ({"languages": ["zh"]}, [one(language="zh")], [one(language="en")]),
        ({"boxes": True}, [one(boxes=(Box("x", (0, 0, 1, 1)),))], [one()]),
        ({"boxes": False}, [one()], [one(boxes=(Box("x", (0, 0, 1, 1)),))]),
        ({"min_answer_words": 3}, [one("one two three"), one("a b c d")], [one("one two"), one("onetwothree")]),
        (
            {"answer_types": ["open"], "languages": ["en"]},
            [one(answer_type="open", language="en")],
            [one(answer_type="open", language="zh"), one(answer_type="closed", language="en")],
        ),
    ],
)
def test_a_view_holds_what_meets_every_condition(
    view: dict[str, Any], inside: list[Sample], outside: list[Sample]
) -> None:
    config = ViewConfig.model_validate(view)
    assert all(holds(config, item) for item in inside)
    assert not any(holds(config, item) for item in outside)


# --- selection


def test_without_views_every_sample_is_taken_once(dataset: Dataset) -> None:
    samples, weights = select(dataset, "train", stage(), 0)
    assert samples == dataset.samples("train")
    assert weights == [1.0] * len(samples)


def test_views_add_up(dataset: Dataset) -> None:
    """A sample in two views counts by both; one in none is left out."""
    mix = [{"answer_types": ["closed"]}, {"boxes": True, "weight": 0.25}]
    samples, weights = select(dataset, "train", stage(mix=mix), 0)
    expected = {
        item.id: 1.0 * (item.answer_type == "closed") + 0.25 * bool(item.boxes) for item in dataset.samples("train")
    }
    assert {item.id: weight for item, weight in zip(samples, weights, strict=True)} == {
        name: weight for name, weight in expected.items() if weight
    }
    assert set(weights) == {0.25, 1.0, 1.25}
    order = [item.id for item in dataset.samples("train") if expected[item.id]]
    assert [item.id for item in samples] == order


def test_a_limit_is_drawn_from_the_views_by_the_seed(dataset: Dataset) -> None:
    config = stage(mix=[{"answer_types": ["closed"]}], samples=10)
    drawn = [select(dataset, "train", config, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for samples in drawn:
        assert len(samples) == 10
        assert all(item.answer_type == "closed" for item in samples)
    order = [item.id for item in dataset.samples("train")]
    assert [order.index(item.id) for item in drawn[2]] == sorted(order.index(item.id) for item in drawn[2])


def test_validation_has_its_own_limit_and_the_same_views(dataset: Dataset) -> None:
    config = stage(mix=[{"answer_types": ["closed"]}], samples=1, validation_samples=3, refusals={})
    samples, _ = select(dataset, "validation", config, 0)
    assert len(samples) == 3
    assert all(item.answer_type == "closed" and item in dataset.samples("validation") for item in samples)


def test_an_empty_view_is_told(dataset: Dataset) -> None:
    mix = [{"boxes": True}, {"languages": ["zh"], "weight": 2}]
    message = r"stage 'say': mix\.1: none of the 108 training samples in .* is {'languages': \['zh'\]}; change the view"
    with pytest.raises(ValueError, match=message):
        select(dataset, "train", stage(mix=mix), 0)
    # a validation split need not hold every view
    assert select(dataset, "validation", stage(mix=mix[1:]), 0) == ([], [])


def test_an_empty_split_is_told(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "samples", lambda _: [])
    with pytest.raises(ValueError, match=r"dataset: the train split is empty"):
        select(dataset, "train", stage(), 0)
    assert select(dataset, "validation", stage(), 0) == ([], [])


# --- refusals


def asked(number: int, language: str = "en", **changes: Any) -> Sample:
    made = sample(
        [("system", "Be brief."), ("user", f"<image>\nWhat is {number}?"), ("assistant", "a lung")],
        [Image.new("RGB", (90 + number, 50))],
        [Box("x", (0, 0, 1, 1))],
        id=f"sample-{number}",
        language=language,
        answer_type="closed",
    )
    return replace(made, **changes)


def test_refusals_ask_a_blank_image_of_the_same_size() -> None:
    samples = [asked(number, "zh" if number % 2 else "en") for number in range(10)]
    config = RefusalConfig(share=0.4, answer="Not here.", answer_zh="没有。")
    added = refusals(samples, config, 0)
    assert len(added) == 4
    by_id = {item.id: item for item in samples}
    for item in added:
        origin = by_id[item.id.removesuffix("-refusal")]
        assert item.answer == ("没有。" if origin.language == "zh" else "Not here.")
        assert [turn for turn in item.turns if turn.role != "assistant"] == list(origin.turns[:2])
        (ref,) = item.images
        assert (ref.width, ref.height) == (origin.images[0].width, origin.images[0].height)
        assert ref == blank(origin.images[0]) != origin.images[0]
        assert (item.boxes, item.answer_type, item.split) == ((), "open", origin.split)
    assert len({item.id for item in [*samples, *added]}) == 14
    assert refusals(samples, config, 0) == added != refusals(samples, config, 1)


def test_only_single_questions_about_an_image_are_refused() -> None:
    text = one(id="text")
    talk = replace(asked(1), turns=(*asked(1).turns, *asked(1).turns[1:]))
    boxed = sample(
        [("user", "<image>\nWhat is in <|box:0|>?"), ("assistant", "x")],
        [Image.new("RGB", (9, 9))],
        [Box("x", (0, 0, 1, 1))],
        id="boxed",
    )
    added = refusals([text, talk, boxed, asked(2)], RefusalConfig(share=0.99), 0)
    assert [item.id for item in added] == ["sample-2-refusal"]
    with pytest.raises(
        ValueError, match=r"^stage 'x': refusals: no training sample is a single question about an image"
    ):
        refusals([text, talk, boxed], RefusalConfig(), 0, "stage 'x': ")


def test_a_stage_takes_its_refusals_besides_its_samples(dataset: Dataset, encoder: Encoder) -> None:
    config = stage(mix=[{"answer_types": ["closed"], "weight": 2}], refusals={"share": 0.25})
    samples, weights = select(dataset, "train", config, 0)
    plain, _ = select(dataset, "train", config.model_copy(update={"refusals": None}), 0)
    assert samples[: len(plain)] == plain
    assert len(samples) == len(plain) + round(0.25 * len(plain))
    assert weights == [2.0] * len(plain) + [1.0] * (len(samples) - len(plain))
    assert len({item.id for item in samples}) == len(samples)
    # what the model sees is even grey
    held = Samples(dataset, samples, encoder)
    (picture,) = held.decoded(len(plain))
    assert picture.size == (SIZE, SIZE)
    assert picture.getcolors() == [(SIZE * SIZE, (128, 128, 128))]
    (image,) = held.images(len(plain))
    np.testing.assert_array_equal(held.pixels(image), encoder.see([picture]).pixel_values)
    assert held.item(len(plain)).encoded.image_tokens == 9


def test_the_stage_is_named_where_nothing_can_be_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "samples", lambda _: [one()])
    with pytest.raises(ValueError, match="stage 'say': refusals: "):
        select(dataset, "train", stage(refusals={}), 0)


def test_blank_images_of_one_size_are_one_image() -> None:
    refs = [ImageRef("a", 10, 20), ImageRef("b", 10, 20), ImageRef("a", 20, 10)]
    assert blank(refs[0]) == blank(refs[1]) != blank(refs[2])
    assert len(blank(refs[0]).sha256) == 64


# --- samples as the model takes them


def test_items_are_the_encoders(dataset: Dataset, encoder: Encoder) -> None:
    samples = dataset.samples("train")[:8]
    held = Samples(dataset, samples, encoder)
    assert len(held) == 8
    for index, item in enumerate(samples):
        whole = encoder.encode(item, dataset.images(item))
        found = held.item(index)
        assert (found.tag, found.images) == (index, held.images(index)) == (index, (item.images[0].sha256,))
        np.testing.assert_array_equal(found.encoded.input_ids, whole.input_ids)
        np.testing.assert_array_equal(found.encoded.labels, whole.labels)
        np.testing.assert_array_equal(held.pixels(found.images[0]), whole.pixel_values)
        (prompt,) = held.prompts([index])
        expected = encoder.encode_prompt(item, dataset.images(item))
        np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
        np.testing.assert_array_equal(prompt.pixel_values, expected.pixel_values)
        claim = held.claim(index, "perhaps", "tag")
        np.testing.assert_array_equal(
            claim.encoded.input_ids, encoder.encode_claim(item, dataset.images(item), "perhaps").input_ids
        )
        assert (claim.tag, claim.images) == ("tag", found.images)


def test_a_text_has_no_pixels(dataset: Dataset, encoder: Encoder) -> None:
    held = Samples(dataset, [one()], encoder)
    (prompt,) = held.prompts([0])
    assert (held.images(0), held.decoded(0), len(prompt.pixel_values)) == ((), [], 0)


def test_several_images_are_seen_in_their_order(dataset: Dataset, encoder: Encoder) -> None:
    refs = sorted({item.images[0].sha256: item.images[0] for item in dataset.samples("train")}.values(), key=str)[:2]
    both = sample([("user", "<image><image>\nWhich?"), ("assistant", "the first")], images=())
    for order in (refs, refs[::-1]):
        held = Samples(dataset, [replace(both, images=tuple(order))], encoder)
        (prompt,) = held.prompts([0])
        expected = [encoder.see([dataset.images(replace(both, images=(ref,)))[0]]).pixel_values for ref in order]
        np.testing.assert_array_equal(prompt.pixel_values, np.concatenate(expected))


def test_pixels_are_decoded_once(dataset: Dataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = dataset.samples("train")
    held = Samples(dataset, samples, encoder)
    seen: list[int] = []
    see = encoder.see

    def counted(images: Any) -> Any:
        seen.append(len(images))
        return see(images)

    monkeypatch.setattr(encoder, "see", counted)
    for _ in range(3):
        for index in range(7):  # seven questions about one image
            held.pixels(held.images(index)[0])
    assert seen == [1] * len({samples[index].images for index in range(7)})


def test_threads_get_what_one_gets(dataset: Dataset, encoder: Encoder) -> None:
    """Decoding shares one data set, which reads a row group at a time."""
    samples = dataset.samples("train")
    alone, shared = Samples(dataset, samples, encoder), Samples(Dataset.open(dataset.folder), samples, encoder)
    indexes = [number % len(samples) for number in range(0, 300, 7)]
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(shared.item, indexes))
        arrays = list(pool.map(lambda index: shared.pixels(shared.images(index)[0]), indexes))
    for index, item, array in zip(indexes, items, arrays, strict=True):
        np.testing.assert_array_equal(item.encoded.input_ids, alone.item(index).encoded.input_ids)
        np.testing.assert_array_equal(array, alone.pixels(alone.images(index)[0]))


# --- Recent


def test_the_longest_unused_are_dropped() -> None:
    held: Recent[str, str] = Recent(6, len)
    for key in "abc":
        held.put(key, key * 2)
    assert held.peek("a") == "aa"  # used again
    held.put("d", "dd")
    assert [held.peek(key) for key in "abcd"] == ["aa", None, "cc", "dd"]
    assert (len(held), held.held) == (3, 6)


def test_a_value_larger_than_the_limit_is_held_alone() -> None:
    held: Recent[str, str] = Recent(3, len)
    held.put("a", "a")
    held.put("b", "b" * 9)
    assert (held.peek("a"), held.peek("b"), len(held), held.held) == (None, "b" * 9, 1, 9)
    held.put("c", "c")
    assert (held.peek("b"), held.peek("c"), held.held) == (None, "c", 1)


def test_a_held_value_is_not_made_again() -> None:
    held: Recent[int, list[int]] = Recent(100, lambda _: 1)
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    assert held.get(1, make) is held.get(1, make)
    assert made == [1]
    held.put(1, [9])  # what is held stays: others may already use it
    assert held.get(1, make) == [1]


def test_many_threads_may_share_it() -> None:
    held: Recent[int, bytes] = Recent(50, len)
    wrong: list[int] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        start.wait()
        for key in rng.integers(0, 30, 400).tolist():
            if held.get(key, partial(bytes, [key] * 5)) != bytes([key]) * 5:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held.held == 5 * len(held) <= 50


# --- verifications


def test_a_stage_takes_its_verifications_besides_its_samples(dataset: Dataset) -> None:
    config = stage(verifications={"share": 0.5}, refusals={"share": 0.25})
    samples, weights = select(dataset, "train", config, 0)
    plain, _ = select(dataset, "train", config.model_copy(update={"verifications": None}), 0)
    assert samples[: len(plain)] == plain
    added = samples[len(plain) :]
    whole = len(dataset.samples("train"))
    assert len(added) == 2 * round(0.5 * whole / 2)  # of the samples, not of the refusals
    assert {item.question_type for item in added} == {"verification"}
    assert weights[len(plain) :] == [1.0] * len(added)
    held_out, _ = select(dataset, "validation", config, 0)
    assert "verification" not in {item.question_type for item in held_out}


def test_the_stage_is_named_where_no_answer_is_certainly_wrong(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "samples", lambda _: [asked(1)])
    with pytest.raises(ValueError, match="stage 'say': verifications: no wrong answer is known for certain for any"):
        select(dataset, "train", stage(verifications={}), 0)
