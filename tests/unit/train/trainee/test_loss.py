"""The trainee: a step's loss by hand, however it is cut into micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medforge.models.encode import Encoder
from medforge.models.heads import TaskHeads, match_loss, region_loss
from medforge.models.load import load_model
from medforge.models.rows import Item
from medforge.stages import HeadsConfig
from medforge.train.features import Features
from medforge.train.trainee import normalisers
from tests.unit.models.passes import (
    PICTURES,
    Case,
    about,
    adapted,
    case,
    distance,
    gradients,
    some_cases,
    stock,
    stock_loss,
)
from tests.unit.train.trainee.made import BOX, QUESTIONS, S, new_heads, run, tagged, totals_of, trainee_of, works

# --- language only


@pytest.mark.parametrize("how", [{}, {"share": False}, {"tokens": 150}, {"packed": True}], ids=str)
def test_without_heads_the_loss_is_the_mean_over_the_answers_tokens(
    encoder: Encoder, model: Any, features: Features, how: dict[str, Any]
) -> None:
    cases = some_cases(encoder)
    trainee = trainee_of(model, None, features, None, "float32")
    step = works(encoder, features, tagged(cases), **how)
    tokens = sum(one.whole.answer_tokens for one in cases)
    value, sums, found = run(trainee, step)
    total = sum(stock_loss(stock(model), encoder, [one.whole]) for one in cases)
    (total / tokens).backward()
    expected = {f"model.{name}": gradient for name, gradient in gradients(model).items()}
    assert totals_of(step) == {"language": tokens, "region": 0, "match_true": 0, "match_false": 0}
    assert value == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    assert sums == {"language": pytest.approx(float(total.detach()), rel=1e-5)}
    assert distance(found, expected) < 1e-5


def test_the_share_is_scaled(encoder: Encoder, model: Any, features: Features, asked: list[Case]) -> None:
    trainee = trainee_of(model, None, features, None, "float32")
    (work,) = works(encoder, features, tagged(asked))
    with torch.no_grad():
        whole, none = (trainee(work, totals_of([work]), scale)[0] for scale in (1.0, 0.0))
        more = trainee(work, totals_of([work]) | {"language": 4 * totals_of([work])["language"]})[0]
    assert (float(none), float(more)) == (0.0, pytest.approx(float(whole) / 4))


def test_logits_everywhere_change_nothing(encoder: Encoder, model: Any, features: Features, asked: list[Case]) -> None:
    (work,) = works(encoder, features, tagged(asked))
    found = [run(trainee_of(model, None, features, None, "float32", only), [work]) for only in (True, False)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert distance(found[0][2], found[1][2]) < 1e-5


def test_a_text_in_a_stage_of_vision_alone_adds_no_gradient(base: Path, encoder: Encoder) -> None:
    """Nothing that is tuned takes part in it; its step must go on nevertheless."""
    from medforge.models.tower import Tower

    merger = adapted(load_model(base, "float32").cpu(), "qwen3-vl", ["vision_merger"])
    features = Features(Tower(stock(merger)), "before", None)
    items = tagged([case(encoder, (), "What is a CT?", "Computed tomography")])
    value, _, found = run(trainee_of(merger, None, features, None, "float32"), works(encoder, features, items))
    assert value > 0
    assert found == {}


def test_bfloat16_is_near(base: Path, encoder: Encoder, asked: list[Case]) -> None:
    """Frozen weights of bfloat16, adapters and heads of float32."""
    from medforge.models.tower import Tower

    values = []
    for dtype in ("float32", "bfloat16"):
        model = adapted(load_model(base, dtype).cpu(), "qwen3-vl")
        features = Features(Tower(stock(model)), None, None)
        trainee = trainee_of(model, new_heads(), features, HeadsConfig(), dtype)
        step = works(encoder, features, tagged(asked, (0,)))
        value, sums, found = run(trainee, step)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
        values.append((value, sums["language"], sums["region"]))
    np.testing.assert_allclose(values[1], values[0], rtol=0.05)


# --- with heads


def by_hand(model: Any, encoder: Encoder, heads: TaskHeads, asked: list[Case], factors: dict[str, float]) -> Any:
    """The loss of `multi` from its definition, with the stock model and each prompt alone."""
    core = stock(model)
    language = sum(stock_loss(core, encoder, [one.whole]) for one in asked) / sum(o.whole.answer_tokens for o in asked)

    def state(number: int, answer: str | None) -> Any:
        image, question, right = QUESTIONS[number]
        made = about((image,), question, right)
        images = [PICTURES[image]]
        prompt = encoder.encode_prompt(made, images) if answer is None else encoder.encode_claim(made, images, answer)
        from medforge.models.encode import collate

        batch = collate([prompt], encoder.image_id, encoder.pad_id)
        batch.pop("labels")
        return core.model(**batch).last_hidden_state[:, -1]

    boxes = torch.cat([heads.region(state(number, None)) for number in (0, 2)])
    region = region_loss(boxes, torch.tensor([BOX, BOX])).sum() / 2
    claims = [(0, "no", 1.0), (1, "lung", 0.0), (2, "lower lobe", 0.0)]
    logits = torch.cat([heads.match(state(number, answer)) for number, answer, _ in claims])
    weighed, _ = match_loss(logits, torch.tensor([fits for _, _, fits in claims]), 10.0, 2.0)
    match = weighed.sum() / (10 * 1 + 2)  # one that fits, two that do not
    return factors["language"] * language + factors["region"] * region + factors["match"] * match


def test_the_tasks_are_joined_as_their_definition_says(
    encoder: Encoder, model: Any, features: Features, asked: list[Case], multi: list[Item]
) -> None:
    heads = new_heads()
    trainee = trainee_of(model, heads, features, HeadsConfig(), "float32")
    step = works(encoder, features, multi)
    tokens = sum(one.whole.answer_tokens for one in asked)
    assert totals_of(step) == {"language": tokens, "region": 2, "match_true": 1, "match_false": 2}
    value, _, found = run(trainee, step)
    halves = {"language": 1.0, "region": 0.5, "match": 1.0}
    factors = {task: halves[task] * torch.exp(-heads.log_variance[task][0]) for task in S}
    penalty = sum(heads.log_variance[task][0] for task in S) / 2
    expected = by_hand(model, encoder, heads, asked, factors) + penalty
    expected.backward()
    wanted = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(found, wanted) < 2e-5
    trainee.zero_grad(set_to_none=True)


@pytest.mark.parametrize("weights", [{"region": 3.0, "match": 0.5, "language": 2.0}, {"match": 0.5}, {}], ids=str)
def test_fixed_weights_are_one_where_they_are_not_named(
    encoder: Encoder, model: Any, features: Features, asked: list[Case], multi: list[Item], weights: dict[str, float]
) -> None:
    heads = new_heads()
    config = HeadsConfig.model_validate({"weighting": "fixed", "weights": weights})
    value, _, found = run(trainee_of(model, heads, features, config, "float32"), works(encoder, features, multi))
    with torch.no_grad():
        expected = by_hand(model, encoder, heads, asked, {"language": 1.0, "region": 1.0, "match": 1.0} | weights)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert not [name for name in found if "log_variance" in name]


@pytest.mark.parametrize("how", [{"tokens": 120}, {"tokens": 1}, {"share": False}, {"packed": True}], ids=str)
@pytest.mark.parametrize("weighting", ["uncertainty", "fixed"])
def test_a_step_is_the_same_however_it_is_cut(
    encoder: Encoder, model: Any, features: Features, multi: list[Item], how: dict[str, Any], weighting: str
) -> None:
    """Also where a micro-batch lacks a task, and with the penalty counted once."""
    config = HeadsConfig.model_validate({"weighting": weighting})
    trainee = trainee_of(model, new_heads(), features, config, "float32")
    (whole,) = works(encoder, features, multi)
    expected = run(trainee, [whole])
    step = works(encoder, features, multi, **how)
    if "tokens" in how:
        assert len(step) > 1
    value, sums, found = run(trainee, step)
    assert value == pytest.approx(expected[0], rel=1e-5)
    assert sums == pytest.approx(expected[1], rel=1e-5)
    assert distance(found, expected[2]) < 2e-5


def test_an_absent_task_drops_out(encoder: Encoder, model: Any, features: Features, asked: list[Case]) -> None:
    """Neither its weight nor its term of the penalty takes part."""
    heads = new_heads()
    trainee = trainee_of(model, heads, features, HeadsConfig(), "float32")
    value, sums, found = run(trainee, works(encoder, features, tagged(asked)))
    tokens = sum(one.whole.answer_tokens for one in asked)
    assert set(sums) == {"language"}
    assert value == pytest.approx(np.exp(-S["language"]) * sums["language"] / tokens + S["language"] / 2, rel=1e-5)
    own = {name for name in found if name.startswith("heads.")}
    assert own == {"heads.log_variance.language"}


def test_a_single_head_is_enough(encoder: Encoder, model: Any, features: Features, asked: list[Case]) -> None:
    config = HeadsConfig(match=False)
    trainee = trainee_of(model, new_heads(match=False), features, config, "float32")
    (work,) = works(encoder, features, tagged(asked, (1,)))
    _, sums, found = run(trainee, [work])
    assert set(sums) == {"language", "region"}
    assert any("region_head" in name for name in found)
    _, _, outputs = trainee(work, totals_of([work]), outputs=True)
    assert len(outputs["boxes"]) == 3
    assert outputs["scores"] == [None] * 3


@pytest.mark.parametrize("kind", [None, "before"])
def test_in_step_everything_takes_part_and_nothing_changes(
    encoder: Encoder, model: Any, multi: list[Item], kind: Any
) -> None:
    """ZeRO-3 gathers weights while they run: a micro-batch without images or boxes has to run them nevertheless."""
    from medforge.models.tower import Tower

    features = Features(Tower(stock(model)), kind, None)
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    text = tagged([case(encoder, (), "What is a CT?", "Computed tomography")])
    step = works(encoder, features, [*multi, *text], tokens=1)
    alone = next(work for work in step if not work.batch.images)
    totals, found = totals_of(step), []
    for trainee.in_step in (False, True):
        share, _ = trainee(alone, totals)
        share.backward()
        found.append((float(share.detach()), {n: p.grad for n, p in trainee.named_parameters() if p.grad is not None}))
        trainee.zero_grad(set_to_none=True)
    trainee.in_step = False
    (value, own), (same, everything) = found
    assert same == value
    assert set(own) < set(everything) == {name for name, p in trainee.named_parameters() if p.requires_grad}
    assert all(torch.equal(everything[name], own[name]) for name in own)
    assert all(float(everything[name].abs().max()) == 0 for name in everything.keys() - own)
    assert run(trainee, step)[0] == pytest.approx(run(trainee, works(encoder, features, [*multi, *text]))[0], rel=1e-5)


def test_normalisers_by_hand() -> None:
    totals = {"language": 40.0, "region": 3.0, "match_true": 2.0, "match_false": 5.0}
    assert normalisers(totals, HeadsConfig()) == {"language": 40, "region": 3, "match": 25}
    assert normalisers(totals | {"match_true": 0, "match_false": 0}, HeadsConfig(missed_weight=2))["match"] == 0


def test_a_tuned_model_needs_no_wrapper(base: Path, encoder: Encoder, asked: list[Case]) -> None:
    """`method: full`: the Hugging Face model itself."""
    from medforge.models.tower import Tower

    plain = load_model(base, "float32").cpu()
    features = Features(Tower(plain), None, None)
    trainee = trainee_of(plain, None, features, None, "float32")
    assert trainee.stock is plain
    (work,) = works(encoder, features, tagged(asked))
    value, _, _ = run(trainee, [work])
    tokens = sum(one.whole.answer_tokens for one in asked)
    with torch.no_grad():
        expected = sum(float(stock_loss(plain, encoder, [one.whole])) for one in asked) / tokens
    assert value == pytest.approx(expected, rel=1e-5)


def test_a_trainee_can_be_copied(encoder: Encoder, model: Any, features: Features, asked: list[Case]) -> None:
    """Nothing in a forward pass is left behind in it."""
    trainee = trainee_of(model, new_heads(), features, HeadsConfig(), "float32")
    before = copy.deepcopy(trainee.state_dict())
    run(trainee, works(encoder, features, tagged(asked, (0,))))
    after = trainee.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
