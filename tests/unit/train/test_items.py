"""The items of a step: what each sample brings, and the claims that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge.dataset import Dataset
from medforge.models.claims import claimable, contradicts, opposite
from medforge.models.encode import Encoder
from medforge.models.generate import region_target
from medforge.stages import HeadsConfig
from medforge.train.data import Samples
from tests.unit.models.examples import SIZE

torch = pytest.importorskip("torch")

from medforge.train.trainee import Goal, items_of  # noqa: E402


@pytest.fixture(scope="module")
def samples(phantoms: Path, base: Path) -> Samples:
    dataset = Dataset.open(phantoms)
    return Samples(dataset, dataset.samples("train"), Encoder(base, SIZE**2, SIZE**2))


def test_without_heads_the_items_are_the_samples(samples: Samples) -> None:
    items = items_of(samples, [5, 2, 2], None, 0)
    assert [one.tag for one in items] == [Goal(5), Goal(2), Goal(2)]
    assert all(one.encoded is samples.item(one.tag.index).encoded for one in items)
    assert items_of(samples, [5, 2], HeadsConfig(region=False, match=True), 0)[0].tag == Goal(5)


def test_boxes_are_the_samples(samples: Samples) -> None:
    indexes = list(range(40))
    items = items_of(samples, indexes, HeadsConfig(match=False), 0)
    assert [one.tag.box for one in items] == [region_target(samples.samples[index]) for index in indexes]
    assert {one.tag.fits for one in items} == {None}
    assert any(one.tag.box for one in items)
    assert not all(one.tag.box for one in items)


def test_claims_are_right_or_certainly_wrong(samples: Samples) -> None:
    indexes = list(range(0, 80, 2))
    items = items_of(samples, indexes, HeadsConfig(), 3)
    assert [one.tag.index for one in items[: len(indexes)]] == indexes
    claims = items[len(indexes) :]
    chosen = [samples.samples[index] for index in indexes]
    assert len({one.tag.index for one in claims}) == len(claims) > 20
    decode = samples.encoder.tokenizer.decode
    for one in claims:
        sample = samples.samples[one.tag.index]
        assert claimable(sample)
        assert (one.tag.box, one.encoded.answer_tokens) == (None, 0)
        assert one.images == samples.images(one.tag.index)
        said = str(decode(one.encoded.input_ids)).rpartition("Proposed answer: ")[2].partition("<|im_end|>")[0]
        if one.tag.fits:
            assert said == sample.answer
        else:
            others = [other for other in chosen if other.answer == said and contradicts(sample, other)]
            assert others or said == opposite(sample.answer)
    truths = [one.tag.fits for one in claims]
    assert 0.2 < sum(truths) / len(truths) < 0.8


def test_claims_follow_from_the_seed(samples: Samples) -> None:
    def told(seed: int) -> list[tuple[Any, list[int]]]:
        items = items_of(samples, list(range(60)), HeadsConfig(), seed)
        return [(one.tag, one.encoded.input_ids.tolist()) for one in items]

    assert told(1) == told(1)
    assert told(1) != told(2)


def test_the_truth_is_not_told_by_the_kind_of_question(samples: Samples) -> None:
    """A question that can only be claimed rightly gets no claim: the head would learn the question."""
    items = items_of(samples, [0], HeadsConfig(), 0)
    lonely = [one for one in items if one.tag.fits is not None]
    sample = samples.samples[0]
    assert opposite(sample.answer) is None  # the case: an open answer and none to swap it with
    assert lonely == []
