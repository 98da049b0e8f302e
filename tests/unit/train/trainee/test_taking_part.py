"""The trainee: what each item takes part in, and what the heads see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medforge.models.encode import Encoder
from medforge.models.generate import pooled
from medforge.models.heads import to_xyxy
from medforge.models.rows import Item
from medforge.stages import HeadsConfig
from medforge.train.features import Features
from medforge.train.trainee import Trainee, Work
from tests.unit.models.passes import PICTURES, Case, about, case, distance, stock
from tests.unit.train.trainee.made import QUESTIONS, new_heads, run, tagged, totals_of, trainee_of, works

# --- what an item takes part in


def test_claims_carry_neither_language_nor_region(
    encoder: Encoder, model: Any, features: Features, asked: list[Case], multi: list[Item]
) -> None:
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    with_claims = run(trainee, works(encoder, features, multi))[1]
    without = run(trainee, works(encoder, features, tagged(asked, (0, 2))))[1]
    assert with_claims["language"] == pytest.approx(without["language"], rel=1e-5)
    assert with_claims["region"] == pytest.approx(without["region"], rel=1e-5)
    (work,) = works(encoder, features, multi[3:])
    assert work.counts == {"language": 0, "region": 0, "match_true": 1, "match_false": 2}


def test_only_a_claims_truth_decides_its_loss(
    encoder: Encoder, model: Any, features: Features, multi: list[Item]
) -> None:
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    turned = [
        replace(one, tag=replace(one.tag, fits=not one.tag.fits)) if one.tag.fits is not None else one for one in multi
    ]
    one, other = (run(trainee, works(encoder, features, items))[1] for items in (multi, turned))
    assert one["match"] != pytest.approx(other["match"], rel=1e-2)
    assert {**one, "match": 0} == pytest.approx({**other, "match": 0})


def test_an_item_without_a_box_has_no_region_gradient(
    encoder: Encoder, model: Any, features: Features, asked: list[Case]
) -> None:
    """The region loss of three items of which one has a box is that one's alone."""
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    together = run(trainee, works(encoder, features, tagged(asked, (1,))))
    alone = run(trainee, works(encoder, features, [tagged(asked, (1,))[1]]))
    assert together[1]["region"] == pytest.approx(alone[1]["region"], rel=1e-5)
    own = [name for name in alone[2] if "region_head" in name]
    assert len(own) == 6
    assert distance({name: together[2][name] for name in own}, {name: alone[2][name] for name in own}) < 1e-5


# --- what the heads see


def outputs_of(trainee: Trainee, step: Sequence[Work]) -> dict[Any, tuple[Any, Any]]:
    """Boxes and scores by the item's goal and whether it is a claim."""
    found = {}
    with torch.no_grad():
        for work in step:
            _, _, outputs = trainee(work, totals_of(step), outputs=True)
            for one, *values in zip(work.batch.items, outputs["boxes"], outputs["scores"], strict=True):
                found[(one.tag.index, one.tag.fits)] = tuple(values)
    return found


def test_the_heads_say_of_each_item_what_they_say_of_its_prompt(
    encoder: Encoder, model: Any, features: Features, multi: list[Item]
) -> None:
    heads = new_heads()
    trainee = trainee_of(model, heads, features, HeadsConfig(), "float32")
    found = outputs_of(trainee, works(encoder, features, multi, tokens=130))
    assert len(found) == len(multi)
    prompts = []
    for number, (image, question, right) in enumerate(QUESTIONS):
        prompts.append(encoder.encode_prompt(about((image,), question, right), [PICTURES[image]]))
        assert (number, None) in found
    states = pooled(stock(model), encoder, prompts)
    boxes = to_xyxy(heads.region(states)).tolist()
    for number, box in enumerate(boxes):
        np.testing.assert_allclose(found[(number, None)][0], box, atol=1e-5)
        x1, y1, x2, y2 = box
        assert x1 < x2
        assert y1 < y2


def test_neither_answer_nor_neighbours_nor_padding_reach_the_heads(
    encoder: Encoder, model: Any, features: Features, multi: list[Item]
) -> None:
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    expected = outputs_of(trainee, works(encoder, features, multi))
    other = [case(encoder, (i,), question, "something else, and at greater length") for i, question, _ in QUESTIONS]
    changed = tagged(other, (0, 2))
    for items, how in (
        (changed + multi[3:], {}),
        (multi[:1], {}),
        (multi[2:5], {"share": False}),
        (multi, {"packed": True}),
        (multi, {"buckets": False, "tokens": 1}),
    ):
        for key, (box, score) in outputs_of(trainee, works(encoder, features, items, **how)).items():
            np.testing.assert_allclose(box, expected[key][0], atol=1e-5, err_msg=str(key))
            assert score == pytest.approx(expected[key][1], abs=1e-4)


def test_without_heads_there_is_nothing_to_say(
    encoder: Encoder, model: Any, features: Features, asked: list[Case]
) -> None:
    trainee = trainee_of(model, None, features, None, "float32")
    (work,) = works(encoder, features, tagged(asked))
    assert trainee(work, totals_of([work]), outputs=True)[2] == {"boxes": [None] * 3, "scores": [None] * 3}
