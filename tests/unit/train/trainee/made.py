"""Trainees and the steps that they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from medforge.models.encode import Encoder
from medforge.models.heads import TaskHeads
from medforge.models.rows import Item
from medforge.stages import HeadsConfig
from medforge.train.features import Features
from medforge.train.trainee import Goal, Trainee, Work
from tests.unit.models.passes import PICTURES, Case, about, batches

BOX = (0.1, 0.2, 0.6, 0.9)
S = {"language": 0.3, "region": -0.7, "match": 0.9}  # log-variances


def new_heads(region: bool = True, match: bool = True) -> TaskHeads:
    torch.manual_seed(1)
    heads = TaskHeads(128, region, match)
    for name, parameter in heads.log_variance.items():
        parameter.data.fill_(S[name])
    return heads


def works(encoder: Encoder, features: Features, items: Sequence[Item], **how: Any) -> list[Work]:
    """The micro-batches of a step, ready to run."""
    cut = batches(encoder, items, **how)
    return [
        Work(number, batch, features.ready(batch, lambda name: encoder.see([PICTURES[name]]).pixel_values))
        for number, batch in enumerate(cut)
    ]


def totals_of(step: Sequence[Work]) -> dict[str, float]:
    return {name: sum(work.counts[name] for work in step) for name in step[0].counts}


def trainee_of(
    model: Any,
    heads: TaskHeads | None,
    features: Features,
    config: HeadsConfig | None,
    dtype: str,
    answer_logits: bool = True,
) -> Trainee:
    return Trainee(model, heads, features, config, dtype, torch.device("cpu"), answer_logits)


def run(trainee: Trainee, step: Sequence[Work]) -> tuple[float, dict[str, float], dict[str, Any]]:
    """One step: the sum of the shares, the sums of the losses, and the gradients of all that has one."""
    totals, value, sums = totals_of(step), 0.0, Counter[str]()
    for work in step:
        share, losses = trainee(work, totals, once=work.number == 0)
        share.backward()
        value += float(share.detach())
        sums.update({name: float(loss) for name, loss in losses.items()})
    found = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
    trainee.zero_grad(set_to_none=True)
    return value, dict(sums), found


def tagged(cases: Sequence[Case], boxes: Sequence[int] = ()) -> list[Item]:
    """The cases' items, those in `boxes` with a box."""
    return [replace(one.item, tag=Goal(number, BOX if number in boxes else None)) for number, one in enumerate(cases)]


QUESTIONS = [
    ("a", "Is there a nodule?", "no"),
    ("b", "Which organ is this?", "the liver"),
    ("a", "Where?", "upper lobe"),
]


QUESTIONS = [
    ("a", "Is there a nodule?", "no"),
    ("b", "Which organ is this?", "the liver"),
    ("a", "Where?", "upper lobe"),
]


def claim(encoder: Encoder, number: int, answer: str, fits: bool) -> Item:
    image, question, right = QUESTIONS[number]
    made = about((image,), question, right)
    encoded = encoder.encode_claim(made, encoder.measure(made.images), answer)
    return Item(encoded, (image,), Goal(number, fits=fits))
