"""Task heads: boxes and losses against hand-worked values, closed forms and torch; saving; learning."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medforge.files import tree_digest
from medforge.models.heads import (
    TaskHeads,
    giou,
    join,
    load_heads,
    load_task_model,
    match_loss,
    parameter_groups,
    penalty,
    region_loss,
    save_heads,
    task_weights,
    to_xyxy,
)
from medforge.models.load import stack

HIDDEN = 16
EACH = {"language": 1.0, "region": 2.0, "match": 0.5}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def heads() -> TaskHeads:
    return TaskHeads(HIDDEN, region=True, match=True)


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# the heads


def test_the_heads_give_boxes_and_logits(heads: TaskHeads) -> None:
    pooled = 100 * torch.randn(7, HIDDEN)
    found = heads.region(pooled)
    assert found.shape == (7, 4)
    assert 0 <= found.min() < found.max() <= 1
    assert heads.match(pooled).shape == (7,)
    assert heads.region(pooled[:0]).shape == (0, 4)
    assert heads.match(pooled[:0]).shape == (0,)


def test_only_the_heads_asked_for_are_there() -> None:
    region, match = TaskHeads(HIDDEN, region=True, match=False), TaskHeads(HIDDEN, region=False, match=True)
    assert list(region.log_variance) == ["language", "region"]
    assert list(match.log_variance) == ["language", "match"]
    assert all(value.shape == (1,) and value.item() == 0.0 for value in match.log_variance.values())
    pooled = torch.randn(2, HIDDEN)
    with pytest.raises(AssertionError, match="no match head"):
        region.match(pooled)
    with pytest.raises(AssertionError, match="no region head"):
        match.region(pooled)


def test_the_heads_count_in_float32_whatever_autocast_says(heads: TaskHeads) -> None:
    pooled = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    box, logit = heads.region(pooled.float()), heads.match(pooled.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
        assert heads.region(pooled).dtype == heads.match(pooled).dtype == torch.float32
        assert torch.equal(heads.region(pooled), box)
        assert torch.equal(heads.match(pooled), logit)


@pytest.mark.parametrize("task", ["region", "match"])
def test_the_gradient_reaches_the_head_asked_for_and_the_model(heads: TaskHeads, task: str) -> None:
    pooled = torch.randn(6, HIDDEN, requires_grad=True)
    if task == "region":
        loss = region_loss(heads.region(pooled), torch.tensor([[0.1, 0.2, 0.5, 0.6]]).expand(6, 4)).sum()
    else:
        loss = match_loss(heads.match(pooled), torch.tensor([1, 0, 1, 0, 1, 0]), 10.0, 2.0)[0].sum()
    loss.backward()
    assert pooled.grad is not None
    assert (pooled.grad.abs().sum(-1) > 0).all()
    for name, parameter in heads.named_parameters():
        if name.startswith(f"{task}_head."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_region_head_learns_a_box_that_the_hidden_state_holds() -> None:
    """The state is a linear image of the box, with an offset and noise of its own."""
    heads = TaskHeads(64, region=True, match=False)
    low = 0.6 * torch.rand(1200, 2)
    target = torch.cat([low, low + 0.1 + 0.3 * torch.rand(1200, 2)], dim=1)
    pooled = 2 * torch.randn(64) + target @ torch.randn(4, 64) + 0.03 * torch.randn(1200, 64)
    train, held_out = slice(0, 1000), slice(1000, 1200)

    def overlap() -> float:
        with torch.no_grad():
            return giou(to_xyxy(heads.region(pooled[held_out])), target[held_out]).mean().item()

    before = overlap()
    optimizer = torch.optim.AdamW(parameter_groups(heads, 5e-3, 0.0))
    for _ in range(300):
        optimizer.zero_grad()
        region_loss(heads.region(pooled[train]), target[train]).mean().backward()
        optimizer.step()
    assert before < 0.2
    assert overlap() > 0.8  # the GIoU is at most the IoU


# the region


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),  # overlap: I 1, U 7, C 9
        ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),  # apart: I 0, U 2, C 3
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),  # one in the other: I 4, U 16, C 16
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),  # side by side: I 0, U 2, C 2
        ((0, 0, 1, 1), (1, 1, 2, 2), -1 / 2),  # corner to corner: I 0, U 2, C 4
        ((0, 0, 2, 1), (1, 0, 1, 1), 0.0),  # a line in a box
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),  # no area at all
    ],
)
def test_giou_is_as_worked_out_by_hand(one: tuple[int, ...], other: tuple[int, ...], expected: float) -> None:
    assert giou(boxes(one), boxes(other)).tolist() == pytest.approx([expected])
    assert giou(boxes(one, other), boxes(other, one)).tolist() == pytest.approx([expected] * 2)


_PLACE, _SIZE = st.floats(0, 0.9), st.floats(1e-3, 1)
_BOX = st.tuples(_PLACE, _PLACE, _SIZE, _SIZE).map(lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3]))


@given(_BOX, _BOX, st.floats(0.1, 10))
def test_giou_is_a_similarity(one: tuple[float, ...], other: tuple[float, ...], scale: float) -> None:
    a, b = boxes(one), boxes(other)
    value = giou(a, b).item()
    assert -1 <= value <= 1
    assert giou(b, a).item() == value
    assert giou(a, a).item() == pytest.approx(1)
    assert giou(scale * a, scale * b).item() == pytest.approx(value, abs=1e-9)  # a change of units changes nothing
    shared = max(0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0, min(one[3], other[3]) - max(one[1], other[1])
    )
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    assert value <= shared / (areas - shared) + 1e-9  # at most the IoU


def test_the_region_loss_is_as_worked_out_by_hand() -> None:
    """The prediction is (0.25, 0.25, 0.75, 0.75). The second target: I 1/16, U 7/16, C 9/16, its centre is off by 1/4
    both ways; the third is the left half of the prediction: centre 1/8 off, width 1/4 off, IoU 1/2."""
    predicted = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).expand(3, 4)
    target = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.75]])
    expected = [0.0, 5 * 0.5 + 2 * (1 - (1 / 7 - 2 / 9)), 5 * 0.375 + 2 * 0.5]
    assert region_loss(predicted, target).tolist() == pytest.approx(expected, abs=1e-6)


def test_boxes_apart_are_drawn_together() -> None:
    """GIoU has a gradient where IoU is 0 everywhere: the centre moves towards the target."""
    predicted = torch.tensor([[0.2, 0.5, 0.1, 0.1]], requires_grad=True)
    (1 - giou(to_xyxy(predicted), torch.tensor([[0.7, 0.45, 0.8, 0.55]]))).sum().backward()
    assert predicted.grad is not None
    assert predicted.grad[0, 0] < 0


# the match


def test_the_focal_loss_is_as_worked_out_by_hand() -> None:
    """p = 0.9: -ln 0.9 = 0.1053605, times 0.1² is 0.001053605 (a hundredth, as the paper says); p = 0.2 (logit -ln 4):
    -ln 0.2 = 1.6094379, times 0.8² is 1.0300403; the positives count ten times."""
    nine, two = math.log(9), math.log(4)
    losses, weights = match_loss(torch.tensor([nine, -nine, -two, two]), torch.tensor([1, 0, 1, 0]), 10.0, 2.0)
    assert losses.tolist() == pytest.approx([0.01053605, 0.001053605, 10.300403, 1.0300403], rel=1e-5)
    assert weights.tolist() == [10, 1, 10, 1]


def test_without_focus_and_weight_it_is_the_cross_entropy() -> None:
    logits, targets = 3 * torch.randn(50), (torch.rand(50) < 0.4).float()
    losses, weights = match_loss(logits, targets, 1.0, 0.0)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert weights.tolist() == [1.0] * 50


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_match_loss_is_finite_for_extreme_logits(gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4]).repeat(2).requires_grad_()
    losses, _ = match_loss(logits, torch.tensor([0] * 5 + [1] * 5), 10.0, gamma)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert losses[4] == 1e4  # as sure as can be, and wrong


def test_a_missed_match_pulls_harder_than_a_false_alarm() -> None:
    """At mirrored logits the gradients are in the ratio of the weight."""
    for weight in (1.0, 4.0, 10.0):
        logits = torch.tensor([-1.5, 1.5], requires_grad=True)  # a missed match and a false alarm
        match_loss(logits, torch.tensor([1, 0]), weight, 2.0)[0].sum().backward()
        assert logits.grad is not None
        missed, alarm = logits.grad.tolist()
        assert missed < 0 < alarm
        assert -missed / alarm == pytest.approx(weight)


def test_the_penalty_on_missed_matches_buys_recall() -> None:
    """Two Gaussians at -1 and 1 with variance 1: the log-odds are 2x, and a weight w adds ln w. The threshold of the
    optimum is x = -ln(w)/2 and its recall Phi(1 + ln(w)/2): 0.841, 0.955 and 0.984 for w of 1, 4 and 10."""
    rng = np.random.default_rng(0)
    targets = torch.arange(4000) % 2
    x = torch.from_numpy(rng.standard_normal(4000)).float() + 2 * targets - 1
    recalls, alarms = [], []
    for weight in (1.0, 4.0, 10.0):
        line = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([line], max_iter=50, line_search_fn="strong_wolfe")

        def closure(weight: float = weight, line: torch.Tensor = line, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            losses, weights = match_loss(line[0] * x + line[1], targets, weight, 0.0)
            mean = losses.sum() / weights.sum()
            mean.backward()
            return mean

        optimizer.step(closure)
        said = (line[0] * x + line[1]).detach() > 0
        recalls.append(said[targets == 1].float().mean().item())
        alarms.append(said[targets == 0].float().mean().item())
    assert recalls == pytest.approx([0.841, 0.955, 0.984], abs=0.015)
    assert recalls[0] < recalls[1] < recalls[2]
    assert alarms[0] < alarms[1] < alarms[2]  # the price


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_penalty_moves_the_threshold_with_the_focus_too(gamma: float) -> None:
    """With the slope held at 1, the intercept, and with it the recall, rises with the weight."""
    rng = np.random.default_rng(1)
    targets = torch.arange(1000) % 2
    x = torch.from_numpy(rng.standard_normal(1000)).float() + 2 * targets - 1
    shifts = []
    for weight in (1.0, 3.0, 10.0):
        grid = torch.linspace(-4, 4, 161)
        losses, weights = match_loss(x[None] + grid[:, None], targets[None].expand(161, -1), weight, gamma)
        shifts.append(grid[(losses.sum(1) / weights.sum(1)).argmin()].item())
    assert shifts[0] < shifts[1] < shifts[2]


# joining the tasks


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def set_log_variance(heads: TaskHeads, **values: float) -> None:
    with torch.no_grad():
        for name, value in values.items():
            heads.log_variance[name].fill_(value)


def test_the_joined_loss_is_as_worked_out_by_hand(heads: TaskHeads) -> None:
    """exp(-ln 2) 3 + ln 2 / 2, half of exp(ln 4) 0.5 - ln 4 / 2, and exp(0) 0.25 + 0: 1.5 + 1 + 0.25 - ln 2 / 2."""
    set_log_variance(heads, language=math.log(2), region=-math.log(4))
    losses = scalars(language=3.0, region=0.5, match=0.25)
    joined = join(losses, heads, "uncertainty", {})
    assert joined.shape == ()
    assert joined.dtype == torch.float32
    assert joined.item() == pytest.approx(2.75 - math.log(2) / 2)
    assert join(losses, heads, "fixed", EACH).item() == pytest.approx(3.0 + 1.0 + 0.125)


def test_the_best_log_variance_is_the_closed_form(heads: TaskHeads) -> None:
    """d/ds (exp(-s) L + s/2) = 0 at s = ln 2L, and of the region at s = ln L."""
    losses = scalars(language=2.0, region=0.3, match=0.05)
    optimizer = torch.optim.SGD(heads.log_variance.parameters(), lr=0.5)
    for _ in range(500):
        optimizer.zero_grad()
        join(losses, heads, "uncertainty", {}).backward()
        optimizer.step()
    found = {name: value.item() for name, value in heads.log_variance.items()}
    assert found == pytest.approx({"language": math.log(4), "region": math.log(0.3), "match": math.log(0.1)}, abs=1e-3)


def test_an_absent_task_drops_out_with_its_gradient(heads: TaskHeads) -> None:
    set_log_variance(heads, language=0.5, region=1.0, match=2.0)
    joined = join(scalars(language=1.0, match=0.5), heads, "uncertainty", {})
    expected = math.exp(-0.5) + 0.25 + 0.5 * math.exp(-2) + 1.0
    assert joined.item() == pytest.approx(expected)
    joined.backward()
    assert heads.log_variance["region"].grad is None
    assert heads.log_variance["language"].grad is not None
    assert heads.log_variance["match"].grad is not None
    assert penalty(heads, set()).item() == 0.0


@pytest.mark.parametrize(("start", "bound"), [(9.0, 5.0), (-9.0, -5.0)])
def test_a_log_variance_beyond_its_bounds_counts_as_the_bound_and_comes_back(
    heads: TaskHeads, start: float, bound: float
) -> None:
    losses = scalars(language=1.0, region=1.0)
    set_log_variance(heads, language=bound, region=bound)
    at_bound = join(losses, heads, "uncertainty", {}).item()
    set_log_variance(heads, language=start, region=start)
    assert join(losses, heads, "uncertainty", {}).item() == pytest.approx(at_bound)
    optimizer = torch.optim.Adam(heads.log_variance.parameters(), lr=0.1, betas=(0.9, 0.9))
    for _ in range(300):
        optimizer.zero_grad()
        join(losses, heads, "uncertainty", {}).backward()
        optimizer.step()
    assert heads.log_variance["language"].item() == pytest.approx(math.log(2), abs=0.02)
    assert heads.log_variance["region"].item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("weighting", ["uncertainty", "fixed"])
@pytest.mark.parametrize("start", [0.7, 6.0])
def test_shares_of_micro_batches_add_up_to_the_whole_step(heads: TaskHeads, weighting: Any, start: float) -> None:
    """Three micro-batches, of which one has no region and one no claim, against all at once."""
    set_log_variance(heads, language=start, region=-0.4, match=1.3)
    trunk = torch.nn.Linear(8, HIDDEN)
    x, target = torch.randn(12, 8), torch.tensor([[0.1, 0.2, 0.5, 0.6]]).expand(12, 4)
    fits = torch.tensor([1, 0] * 6)
    in_region, in_match = torch.arange(12) < 8, (torch.arange(12) < 4) | (torch.arange(12) >= 8)
    trained = [*trunk.parameters(), *heads.parameters()]

    def sums(rows: slice) -> dict[str, torch.Tensor]:
        pooled = trunk(x[rows])
        found = {"language": pooled.square().sum()}
        if in_region[rows].any():
            found["region"] = region_loss(heads.region(pooled), target[rows])[in_region[rows]].sum()
        if in_match[rows].any():
            losses, _ = match_loss(heads.match(pooled), fits[rows], 10.0, 2.0)
            found["match"] = losses[in_match[rows]].sum()
        return found

    totals = {"language": 12.0, "region": 8.0, "match": float((1 + 9 * fits[in_match]).sum())}

    def gradients() -> list[torch.Tensor | None]:
        found = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        return found

    whole = join({task: loss / totals[task] for task, loss in sums(slice(0, 12)).items()}, heads, weighting, EACH)
    whole.backward()
    expected = gradients()

    value = 0.0
    for first in (0, 4, 8):
        shares = {task: loss / totals[task] for task, loss in sums(slice(first, first + 4)).items()}
        factors = task_weights(heads, weighting, EACH, set(shares))
        part = torch.stack([factors[task] * share for task, share in shares.items()]).sum()
        part.backward()
        value += part.item()
    if weighting == "uncertainty":
        once = penalty(heads, set(totals))
        once.backward()
        value += once.item()
    assert value == pytest.approx(whole.item(), rel=1e-6)
    found = gradients()
    torch.testing.assert_close(
        [g for g in found if g is not None], [g for g in expected if g is not None], rtol=1e-4, atol=1e-6
    )
    assert [g is None for g in found] == [g is None for g in expected]
    learned = [p.grad is None and g is not None for p, g in zip(trained, found, strict=True)]
    assert sum(learned) == len(trained) - (0 if weighting == "uncertainty" else 3)  # fixed leaves the three s alone


def test_a_fixed_weight_that_is_missing_is_told(heads: TaskHeads) -> None:
    with pytest.raises(ValueError, match="weights: has none for match;"):
        task_weights(heads, "fixed", {"language": 1.0}, {"match", "language"})
    with pytest.raises(AssertionError, match="region"):
        task_weights(TaskHeads(HIDDEN, region=False, match=True), "uncertainty", {}, {"region"})


def test_log_variances_biases_and_norms_take_no_decay(heads: TaskHeads) -> None:
    groups = parameter_groups(heads, 0.1, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(heads.parameters()))
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    decayed = sorted(names[id(p)] for group in groups if group["weight_decay"] for p in group["params"])
    assert decayed == [f"{task}_head.{layer}.weight" for task in ("match", "region") for layer in (1, 3)]
    set_log_variance(heads, language=1.5, match=-1.5)
    before = {name: parameter.clone() for name, parameter in heads.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # no gradient: only decay moves anything
    moved = sorted(name for name, parameter in heads.named_parameters() if not torch.equal(parameter, before[name]))
    assert moved == decayed
    torch.testing.assert_close(heads.get_parameter("region_head.1.weight"), 0.95 * before["region_head.1.weight"])


# files


def test_heads_come_back_as_they_were(tmp_path: Path, heads: TaskHeads) -> None:
    set_log_variance(heads, language=0.5, region=-1.0, match=2.0)
    save_heads(heads, tmp_path / "one")
    loaded = load_heads(tmp_path / "one")
    assert loaded is not None
    pooled = torch.randn(3, HIDDEN)
    assert torch.equal(loaded.region(pooled), heads.region(pooled))
    assert torch.equal(loaded.match(pooled), heads.match(pooled))
    assert {name: value.item() for name, value in loaded.log_variance.items()} == {
        "language": 0.5,
        "region": -1.0,
        "match": 2.0,
    }
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_heads(loaded, tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "heads/heads.json").read_text()) == {
        "schema_version": 1,
        "hidden": HIDDEN,
        "region": True,
        "match": True,
    }


@pytest.mark.parametrize(("region", "match"), [(True, False), (False, True)])
def test_one_head_alone_comes_back_alone(tmp_path: Path, region: bool, match: bool) -> None:
    save_heads(TaskHeads(8, region, match), tmp_path)
    loaded = load_heads(tmp_path)
    assert loaded is not None
    assert (loaded.hidden, loaded.region_head is not None, loaded.match_head is not None) == (8, region, match)


def test_other_users_may_read_the_files(tmp_path: Path, heads: TaskHeads) -> None:
    before = os.umask(0o077)
    try:
        save_heads(heads, tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.rglob("*"))] == [0o755, 0o644, 0o644]


def test_loaded_heads_can_be_trained_and_loading_draws_nothing(tmp_path: Path, heads: TaskHeads) -> None:
    save_heads(heads, tmp_path)
    state = torch.get_rng_state()
    loaded = load_heads(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded is not None
    optimizer = torch.optim.SGD(parameter_groups(loaded, 0.1, 0.0))
    loaded.match(torch.randn(4, HIDDEN)).sum().backward()
    optimizer.step()
    again = load_heads(tmp_path)
    assert again is not None
    assert not torch.equal(*(one.get_parameter("match_head.3.weight") for one in (loaded, again)))


def test_a_folder_without_heads_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_heads(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"heads\.json: is empty"),
        ("{", r"heads\.json: line 1"),
        ("[]", r"heads\.json: is no heads\.json of schema_version 1"),
        ('{"schema_version": 2, "hidden": 16, "region": true, "match": true}', "schema_version 1, but"),
        ('{"schema_version": 1, "hidden": 16, "region": true}', r"heads\.json: field match is null"),
        ('{"schema_version": 1, "hidden": true, "region": true, "match": true}', r"field hidden is true"),
        ('{"schema_version": 1, "hidden": 0, "region": true, "match": true}', r"field hidden is 0"),
        ('{"schema_version": 1, "hidden": 16, "region": 1, "match": true}', r"field region is 1"),
        ('{"schema_version": 1, "hidden": 8, "region": true, "match": true}', r"heads\.safetensors: tensor .*\(8,\)"),
        ('{"schema_version": 1, "hidden": 10000000000, "region": true, "match": true}', r"field hidden is 1000"),
        (
            '{"schema_version": 1, "hidden": 16, "region": true, "match": false}',
            r"tensor log_variance\.match: expected none",
        ),
    ],
)
def test_a_broken_description_is_told(tmp_path: Path, heads: TaskHeads, content: str, message: str) -> None:
    save_heads(heads, tmp_path)
    (tmp_path / "heads").mkdir(exist_ok=True)
    (tmp_path / "heads/heads.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_heads(tmp_path)


def test_broken_weights_are_told(tmp_path: Path, heads: TaskHeads) -> None:
    save_heads(heads, tmp_path)
    path = tmp_path / "heads/heads.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"heads\.safetensors: is not a whole safetensors file"):
            load_heads(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"heads\.safetensors: no such file"):
        load_heads(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "heads/heads.json").unlink()
    with pytest.raises(ValueError, match=r"heads\.json: no such file"):
        load_heads(tmp_path)


def test_weights_that_do_not_fit_or_are_not_finite_are_told(tmp_path: Path, heads: TaskHeads) -> None:
    from safetensors.torch import load_file, save_file

    save_heads(heads, tmp_path)
    path = tmp_path / "heads/heads.safetensors"
    tensors = load_file(path)
    name = "match_head.1.weight"
    for broken, message in (
        (
            {key: value for key, value in tensors.items() if key != name},
            r"match_head\.1\.weight: expected .*found none",
        ),
        (tensors | {"extra": torch.zeros(1)}, r"extra: expected none"),
        (tensors | {name: tensors[name].double()}, r"match_head\.1\.weight: expected .*float64"),
        (tensors | {name: tensors[name] * float("nan")}, r"match_head\.1\.weight: has values that are not finite"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_heads(tmp_path)


# the model with its heads


def test_the_heads_of_the_last_adapter_that_has_some_are_taken(base: Path, adapters: Path, tmp_path: Path) -> None:
    """Else those of the model's folder. Nothing else of the model changes by a heads file beside it."""
    from medforge.models.load import load_model

    shutil.copytree(base, tmp_path / "model")
    shutil.copytree(adapters, tmp_path / "stack")
    folder, (see, say) = tmp_path / "model", stack(tmp_path / "stack")
    with pytest.raises(ValueError, match=r"model: neither it nor an adapter has heads \(heads/heads\.json\)"):
        load_task_model(folder, "float32", [see, say])

    def shift(place: Path, value: float) -> None:
        heads = TaskHeads(128, region=True, match=False)
        set_log_variance(heads, language=value)
        save_heads(heads, place)

    shift(folder, 1.0)
    loaded = load_task_model(folder, "bfloat16")
    assert loaded.heads.log_variance["language"].item() == 1.0
    assert {p.dtype for p in loaded.heads.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert load_task_model(folder, "float32", [see, say]).heads.log_variance["language"].item() == 1.0
    shift(see, 2.0)
    loaded = load_task_model(folder, "float32", [see, say])
    assert loaded.heads.log_variance["language"].item() == 2.0
    plain = load_model(base, "float32", stack(adapters)).state_dict()
    found = loaded.model.state_dict()
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    shift(say, 3.0)
    assert load_task_model(folder, "float32", [see, say]).heads.log_variance["language"].item() == 3.0


def test_heads_of_another_model_are_told(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for family in tiny_models:
        shutil.copytree(tiny_models[family], tmp_path / family)
        save_heads(TaskHeads(127, region=True, match=True), tmp_path / family)
        with pytest.raises(ValueError, match=r"heads\.json: hidden is 127, but the model of .* has 128"):
            load_task_model(tmp_path / family, "float32")
