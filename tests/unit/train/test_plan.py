"""The plan: which samples a step takes, whatever the process, the order of asking, or the place of an interruption."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medforge.stages import StageConfig
from medforge.train.plan import Plan


def plan(
    groups: Sequence[Hashable],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    **changes: Any,
) -> Plan:
    """A plan of samples whose image is in `groups`; tokens are refused where no lengths are given."""
    settings = {"name": "x", "tune": ["vision_merger"], "batch_size": 4, "speed": {"questions_per_image": 1}}
    settings |= {} if "steps" in changes or "epochs" in changes else {"steps": 5}
    stage = StageConfig.model_validate(settings | changes)

    def tokens(index: int) -> int:
        assert lengths is not None, "the plan reads a sample without need"
        return lengths[index]

    return Plan(stage, groups, weights if weights is not None else [1.0] * len(groups), seed, tokens)


def whole(found: Plan) -> list[list[int]]:
    return [found.step(number) for number in range(found.steps)]


# --- the order


def test_the_order_follows_from_the_seed_and_the_epoch_alone() -> None:
    groups = [number // 3 for number in range(30)]
    one, same, other = (
        plan(groups, seed=seed, epochs=3, batch_size=8, speed={"questions_per_image": 2}) for seed in (1, 1, 2)
    )
    assert whole(one) == whole(same) != whole(other)
    epochs = [one.epoch(number).tolist() for number in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # neither batch size nor the number of steps has a say in it
    assert plan(groups, seed=1, batch_size=16, steps=2, speed={"questions_per_image": 2}).epoch(1).tolist() == epochs[1]


def test_the_order_is_the_same_on_every_machine() -> None:
    """numpy's default_rng is stable over platforms and versions by its documented policy: no process's hash takes part.

    The figures are numpy's own permutation of an epoch, drawn here as the docstring tells.
    """
    found = plan(["image"] * 6, seed=3)
    assert found.epoch(2).tolist() == np.random.default_rng([3, 2]).permutation(6).tolist()


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    batch=st.integers(1, 9),
    run=st.integers(1, 8),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_sample_stands_once_in_an_epoch(held: list[int], batch: int, run: int, epochs: int, seed: int) -> None:
    groups = [image for image, count in enumerate(held) for _ in range(count)]
    found = plan(groups, seed=seed, epochs=epochs, batch_size=batch, speed={"questions_per_image": run})
    taken = list(itertools.chain(*whole(found)))
    for number in range(epochs):
        epoch = taken[number * len(groups) : (number + 1) * len(groups)]
        assert sorted(epoch) == list(range(len(groups)))
    assert found.steps == math.ceil(epochs * len(groups) / batch)
    assert len(taken) == found.taken == found.steps * batch
    assert all(len(step) == batch for step in whole(found))


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "steps"),
    [(10, 4, 1, 3), (10, 4, 2, 5), (10, 5, 2, 4), (10, 4, 0.5, 2), (10, 4, 0.01, 1), (3, 8, 1, 1), (7, 2, 1.5, 5)],
)
def test_the_steps_of_epochs(count: int, batch: int, epochs: float, steps: int) -> None:
    assert plan(list(range(count)), epochs=epochs, batch_size=batch).steps == steps


def test_steps_are_taken_as_they_are_given() -> None:
    found = plan(list(range(3)), steps=7, batch_size=2)
    assert (found.steps, found.taken) == (7, 14)
    assert Counter(itertools.chain(*whole(found)))[0] in (4, 5)  # 14 of 3 samples


@settings(max_examples=60, deadline=None)
@given(data=st.data(), by_tokens=st.booleans(), seed=st.integers(0, 9))
def test_any_order_of_asking_gives_the_same_steps(data: st.DataObject, by_tokens: bool, seed: int) -> None:
    """A resumed run asks for a late step first."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=15))
    changes: dict[str, Any] = {"steps": 12, "speed": {"questions_per_image": 3}}
    changes |= {"batch_tokens": 50} if by_tokens else {}
    weights = [1.0 + (number % 2) / 2 for number in range(len(lengths))]
    groups = [number // 4 for number in range(len(lengths))]
    expected = whole(plan(groups, weights, seed, lengths, **changes))
    asked = data.draw(st.permutations(range(12)))
    found = plan(groups, weights, seed, lengths, **changes)
    assert {number: found.step(number) for number in asked} == dict(enumerate(expected))
    (late,) = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=1))
    assert plan(groups, weights, seed, lengths, **changes).step(late) == expected[late]


# --- questions of one image


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(1, 20), min_size=1, max_size=10),
    batch=st.integers(1, 40),
    most=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_runs_are_of_one_image_and_short(held: list[int], batch: int, most: int, seed: int) -> None:
    """An epoch falls into runs: at most `questions_per_image`, and a fourth of a step, so that it mixes four images."""
    groups = [image for image, count in enumerate(held) for _ in range(count)]
    found = plan(groups, seed=seed, batch_size=batch, speed={"questions_per_image": most})
    longest = max(1, min(most, batch // 4))
    assert found.run == longest
    order = [groups[index] for index in found.epoch(0).tolist()]
    for image, run in itertools.groupby(order):
        count = len(list(run))
        assert count <= longest or held[image] > longest  # two runs of an image may fall together
    # each image's samples come in as few runs as they can, so that as many as may be share a row
    if longest > 1:
        groups_found = Counter(image for image, _ in itertools.groupby(order))
        assert all(groups_found[image] <= math.ceil(count / longest) for image, count in enumerate(held))


@pytest.mark.parametrize(("batch", "questions", "run"), [(32, 8, 8), (16, 8, 4), (8, 8, 2), (4, 8, 1), (2, 8, 1)])
def test_a_step_mixes_at_least_four_images(batch: int, questions: int, run: int) -> None:
    """Where no image has more questions than a run."""
    groups = [image for image in range(40) for _ in range(run)]
    found = plan(groups, batch_size=batch, epochs=1, speed={"questions_per_image": questions})
    assert found.run == run
    for step in whole(found):
        assert len({groups[index] for index in step}) >= min(4, batch)


def test_runs_are_drawn_anew_each_epoch() -> None:
    groups = ["a"] * 8 + ["b"] * 8 + ["c"] * 8 + ["d"] * 8
    found = plan(groups, batch_size=16, speed={"questions_per_image": 4})
    runs = [{frozenset(epoch[start : start + 4]) for start in range(0, 32, 4)} for epoch in map(found.epoch, range(2))]
    assert runs[0] != runs[1]


def test_with_tokens_the_runs_are_as_asked() -> None:
    groups = ["a"] * 8 + ["b"] * 8
    found = plan(groups, lengths=[1] * 16, batch_tokens=16, speed={"questions_per_image": 8})
    assert found.run == 8


def test_the_rows_of_an_epoch_are_counted() -> None:
    groups = ["a"] * 5 + ["b"] * 4 + ["c"]
    assert plan(groups, batch_size=16, speed={"questions_per_image": 4}).rows_in_epoch() == 2 + 1 + 1
    assert plan(groups, speed={"questions_per_image": 1}).rows_in_epoch() == 10
    # weights count: c is taken nine times
    assert plan(groups, [1.0] * 9 + [9.0], batch_size=16, speed={"questions_per_image": 4}).rows_in_epoch() == 2 + 1 + 3


# --- weights


@settings(max_examples=80, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=20))
def test_an_epoch_takes_each_sample_by_its_weight(weights: list[float]) -> None:
    total = sum(weights)
    groups = list(range(len(weights)))
    if sum(map(math.floor, weights)) + round(sum(w - math.floor(w) for w in weights)) == 0:
        with pytest.raises(ValueError, match="stage 'x': mix: the weights leave no sample for an epoch; raise them"):
            plan(groups, weights)
        return
    found = plan(groups, weights)
    assert abs(found.epoch_size - total) <= 0.5 + 1e-9
    for number in range(3):
        taken = Counter(found.epoch(number).tolist())
        assert sum(taken.values()) == found.epoch_size
        for index, weight in enumerate(weights):
            assert math.floor(weight) <= taken[index] <= math.ceil(weight)


def test_fractions_are_drawn_anew_each_epoch_and_evenly() -> None:
    """A fourth of 80 samples: 20 in each epoch, and after 400 epochs each about a quarter of the time."""
    found = plan(list(range(100)), [1.0] * 20 + [0.25] * 80)
    assert found.epoch_size == 40
    epochs = [found.epoch(number).tolist() for number in range(400)]
    drawn = [frozenset(index for index in epoch if index >= 20) for epoch in epochs]
    assert {len(part) for part in drawn} == {20}
    assert len(set(drawn)) > 390
    counts = Counter(itertools.chain(*drawn))
    # binomial(400, 1/4): mean 100, standard deviation 8.7
    assert all(60 < counts[index] < 140 for index in range(20, 100))


def test_greater_fractions_are_drawn_more_often() -> None:
    found = plan(list(range(40)), [0.8] * 20 + [1.2] * 20)
    counts = Counter(itertools.chain(*(found.epoch(number).tolist() for number in range(300))))
    # binomial(300, 1/5) about 240 and 360: standard deviation 6.9
    assert all(abs(counts[index] - (240 if index < 20 else 360)) < 35 for index in range(40))
    assert sum(counts[index] for index in range(20)) / 20 / 300 == pytest.approx(0.8, abs=0.01)


@pytest.mark.filterwarnings("error")
def test_weights_that_add_up_to_a_whole_but_for_rounding_are_whole() -> None:
    """Ten views of 0.1 sum to 0.9999999999999999: such a sample is taken once, and has no fraction to be drawn by."""
    nearly = sum([0.1] * 10)
    assert nearly < 1
    found = plan(list(range(8)), [nearly] * 4 + [0.5] * 4)
    assert found.epoch_size == 6
    for number in range(20):
        taken = Counter(found.epoch(number).tolist())
        assert [taken[index] for index in range(4)] == [1, 1, 1, 1]


# --- tokens instead of samples


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    most=st.integers(16, 100),
    epochs=st.sampled_from([0.5, 1, 2]),
)
def test_a_step_holds_as_many_tokens_as_fit(lengths: list[int], most: int, epochs: float) -> None:
    found = plan(list(range(len(lengths))), lengths=lengths, batch_tokens=most, epochs=epochs)
    steps = whole(found)
    following = [*itertools.chain(*steps[1:]), *found.step(found.steps)]
    for number, step in enumerate(steps):
        size = sum(lengths[index] for index in step)
        assert step
        assert size <= most or len(step) == 1  # a sample that is too long alone is a step of its own
        rest = (steps[number + 1] if number + 1 < len(steps) else found.step(found.steps))[0]
        assert size + lengths[rest] > most
    assert following
    assert len(list(itertools.chain(*steps))) == found.taken
    wanted = max(1, round(epochs * len(lengths)))
    assert found.taken >= wanted > found.taken - len(steps[-1])


def test_lengths_are_not_asked_without_need() -> None:
    """They cost an encoding each: `plan` refuses the question where no lengths are given."""
    assert len(plan(list(range(10)), epochs=2).step(1)) == 4
