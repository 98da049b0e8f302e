"""Batches, against the library's own generation of one prompt alone and plain forward passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from medforge.models.encode import Encoded, collate
from medforge.models.families import FAMILIES
from medforge.models.generate import generate, pooled
from medforge.models.heads import to_xyxy
from serving.predictor.generation import Done, Event, Generation, Job, Piece, Request, Sampling, Token, _draw
from tests.unit.predictor.examples import answered, end_of, prompts, text_of

LIMIT = 12


def tokens_alone(generation: Generation, prompt: Encoded, limit: int = LIMIT) -> list[int]:
    """The greedy tokens after a prompt, by the model alone."""
    import torch

    batch = collate([prompt], generation.encoder.image_id, generation.encoder.pad_id)
    del batch["labels"]
    with torch.no_grad():
        ids = generation.model.generate(
            **batch, max_new_tokens=limit, do_sample=False, eos_token_id=generation.encoder.end_id
        )
    found: list[int] = ids[0, prompt.length :].tolist()
    return found


def logprobs_of(generation: Generation, prompt: Encoded, tokens: list[int]) -> Any:
    """ln p of the whole vocabulary before each of `tokens`, by one forward pass: [tokens, vocabulary]."""
    import numpy as np
    import torch

    ids = np.concatenate([prompt.input_ids, np.asarray(tokens, np.int64)])
    whole = replace(prompt, input_ids=ids, labels=np.full_like(ids, -100))
    batch = collate([whole], generation.encoder.image_id, generation.encoder.pad_id)
    del batch["labels"]
    with torch.no_grad():
        logits = generation.model(**batch).logits[0, prompt.length - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_request_is_answered_alone(generations: dict[str, Generation], family: str) -> None:
    generation = generations[family]
    made = prompts(generation)
    limits = (LIMIT, 3, LIMIT)
    told = answered(generation, [Job(prompt, limit) for prompt, limit in zip(made, limits, strict=True)])
    for prompt, limit, events in zip(made, limits, told, strict=True):
        (alone,) = generate(generation.model, generation.encoder, [prompt], limit)
        assert text_of(events) == alone.text
        assert end_of(events) == Done("stop" if alone.ended else "length", alone.tokens)
    assert len({text_of(events) for events in told}) == 3


def test_an_answer_ends_with_the_end_token(generation: Generation) -> None:
    prompt = prompts(generation)[0]
    tokens = tokens_alone(generation, prompt)
    end = next(token for number, token in enumerate(tokens) if number >= 2 and token not in tokens[:number])
    generation.encoder.end_id = end
    (events,) = answered(generation, [Job(prompt, LIMIT)])
    assert end_of(events) == Done("stop", tokens.index(end))
    assert text_of(events) == generation.encoder.tokenizer.decode(tokens[: tokens.index(end)]).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward_pass(generations: dict[str, Generation], family: str) -> None:
    generation = generations[family]
    made = prompts(generation)
    jobs = [Job(prompt, 5, Sampling(top_logprobs=top)) for prompt, top in zip(made, (3, 0, 1), strict=True)]
    for prompt, job, events in zip(made, jobs, answered(generation, jobs), strict=True):
        tokens = tokens_alone(generation, prompt, 5)
        noted = [token for event in events if isinstance(event, Piece) for token in event.tokens]
        expected = logprobs_of(generation, prompt, tokens)
        vocabulary = generation.vocabulary
        kept = [token for token in tokens if token != generation.encoder.end_id]
        assert [token.data for token in noted] == [vocabulary.data(token) for token in kept]
        for row, (number, token) in zip(expected, zip(kept, noted, strict=True), strict=False):
            assert token.logprob == pytest.approx(float(row[number]), abs=1e-3)
            assert len(token.top) == job.sampling.top_logprobs
            likeliest = row.topk(len(token.top))
            assert [value for _, value in token.top] == pytest.approx(likeliest.values.tolist(), abs=1e-3)
            if token.top:
                assert token.top[0][0] == token.data == vocabulary.data(int(likeliest.indices[0]))


def test_nothing_is_noted_for_who_does_not_ask(generation: Generation) -> None:
    made = prompts(generation)[:2]
    first, second = answered(generation, [Job(made[0], 4), Job(made[1], 4, Sampling(top_logprobs=0))])
    assert all(event.tokens == () for event in first if isinstance(event, Piece))
    assert sum(len(event.tokens) for event in second if isinstance(event, Piece)) == end_of(second).completion_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_read_the_state_of_the_prompt_and_of_the_claim(
    generations: dict[str, Generation], family: str
) -> None:
    generation = generations[family]
    made = prompts(generation)
    claimed: list[str] = []

    def claim(answer: str) -> Encoded | None:
        claimed.append(answer)
        return made[0]

    jobs = [
        Job(made[0], 4, region=True, claim=lambda _: made[1]),
        Job(made[1], 6, region=True, claim=claim),
        Job(made[2], 2, region=True, claim=lambda _: None),
    ]
    told = answered(generation, jobs)
    assert generation.heads is not None
    states = pooled(generation.model, generation.encoder, made[:2])
    boxes = to_xyxy(generation.heads.region(states)).clamp(0, 1).tolist()
    fits = generation.heads.match(states).sigmoid().tolist()
    first, second, third = map(end_of, told)
    assert first.region == pytest.approx(boxes[0], abs=1e-4) and second.region == pytest.approx(boxes[1], abs=1e-4)
    assert boxes[0] != pytest.approx(boxes[1], abs=1e-3) and fits[0] != pytest.approx(fits[1], abs=1e-3)
    assert first.match == pytest.approx(fits[1], abs=1e-4) and second.match == pytest.approx(fits[0], abs=1e-4)
    assert third.region is None and third.match is None  # no image, and nothing to claim
    assert claimed == [text_of(told[1])]
    assert first.region is not None and 0 <= first.region[0] <= first.region[2] <= 1


def test_generation_stops_when_nobody_wants_it(generation: Generation, passes: Callable[[], int]) -> None:
    made = prompts(generation)
    generation.encoder.end_id = -1  # no answer ends by itself
    first, second = Request(Job(made[0], 60)), Request(Job(made[2], 60, claim=lambda _: made[0]))
    told: list[tuple[Request, Event]] = []

    def tell(events: list[tuple[Request, Event]]) -> None:
        told.extend(events)
        first.cancelled = passes() >= 3
        second.cancelled = passes() >= 6

    generation.run([first, second], tell)
    assert 6 <= passes() <= 12
    assert not any(isinstance(event, Done) for _, event in told)


def test_a_request_that_is_cancelled_leaves_the_others_alone(generation: Generation) -> None:
    made = prompts(generation)
    (alone,) = generate(generation.model, generation.encoder, [made[0]], LIMIT)
    wanted, unwanted = Request(Job(made[0], LIMIT)), Request(Job(made[1], LIMIT))
    unwanted.cancelled = True
    told: list[tuple[Request, Event]] = []
    generation.run([unwanted, wanted], told.extend)
    assert {request for request, _ in told} == {wanted}
    assert text_of([event for _, event in told]) == alone.text


def test_an_answer_ends_before_its_stop_string(generation: Generation) -> None:
    made = prompts(generation)
    whole = [text_of(events) for events in answered(generation, [Job(prompt, LIMIT) for prompt in made])]
    stop = whole[0].split()[-1][-2:]
    assert whole[0].index(stop) > 2
    told = answered(generation, [Job(made[0], LIMIT, Sampling(stop=(stop, "never"))), Job(made[1], LIMIT)])
    assert text_of(told[0]) == whole[0][: whole[0].index(stop)].strip()
    assert end_of(told[0]).finish_reason == "stop" and end_of(told[0]).completion_tokens < LIMIT
    assert text_of(told[1]) == whole[1]


def test_the_same_seed_says_the_same(generation: Generation) -> None:
    made = prompts(generation)
    generation.encoder.end_id = -1

    def say(seed: int | None, temperature: float = 1.0) -> str:
        jobs = [Job(made[0], LIMIT, Sampling(temperature=temperature, seed=seed)), Job(made[1], LIMIT)]
        first, second = answered(generation, jobs)
        assert text_of(second) == greedy[1]  # greedy rows are not touched
        return text_of(first)

    greedy = [text_of(events) for events in answered(generation, [Job(prompt, LIMIT) for prompt in made[:2]])]
    assert say(1) == say(1)
    assert len({say(1), say(2), say(3), greedy[0]}) == 4
    assert say(None) != say(None)
    assert say(5, temperature=1e-9) == greedy[0]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Hand-worked: probabilities 0.5, 0.3, 0.2; at temperature 2 they go as their square roots."""
    import torch

    scores = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)

    def draw(**sampling: float) -> dict[int, float]:
        drawn = Counter(_draw(scores, Sampling(**sampling), generator) for _ in range(4000))  # type: ignore[arg-type]
        return {token: count / 4000 for token, count in sorted(drawn.items())}

    roots = [math.sqrt(share) for share in (0.5, 0.3, 0.2)]
    assert draw(temperature=1) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2}, abs=0.04)
    assert draw(temperature=2) == pytest.approx({n: root / sum(roots) for n, root in enumerate(roots)}, abs=0.04)
    assert draw(temperature=1, top_p=0.6) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.04)
    assert draw(temperature=1, top_p=0.4) == draw(temperature=1, top_p=0.0) == {0: 1.0}


def test_probabilities_of_drawn_tokens_are_the_models_own(generation: Generation) -> None:
    prompt = prompts(generation)[2]
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=3, top_logprobs=2)
    (events,) = answered(generation, [Job(prompt, 6, sampling)])
    noted: list[Token] = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    data = {generation.vocabulary.data(number): number for number in range(len(generation.encoder.tokenizer))}
    tokens = [data[token.data] for token in noted]
    expected = logprobs_of(generation, prompt, tokens)
    assert [token.logprob for token in noted] == pytest.approx(
        [float(row[token]) for row, token in zip(expected, tokens, strict=True)], abs=1e-3
    )


def test_what_the_model_raises_is_raised_and_leaves_no_hook(generation: Generation) -> None:
    prompt = prompts(generation)[0]

    def claim(answer: str) -> Encoded | None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        generation.run([Request(Job(prompt, 2, claim=claim))], lambda events: None)
    assert not generation.model.model._forward_hooks
