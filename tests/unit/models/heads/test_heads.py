"""Task heads: boxes and losses against hand-worked values, closed forms and torch; learning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medforge.models.heads import (
    TaskHeads,
    giou,
    match_loss,
    parameter_groups,
    region_loss,
    to_xyxy,
)
from tests.unit.models.heads.made import HIDDEN


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
