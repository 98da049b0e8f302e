"""The tasks' losses, joined: against hand-worked values and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medforge.models.heads import (
    TaskHeads,
    join,
    match_loss,
    parameter_groups,
    penalty,
    region_loss,
    task_weights,
)
from tests.unit.models.heads.made import EACH, HIDDEN, set_log_variance

# joining the tasks


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


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
