"""The training loop: rates, which step is kept, and that steps are prepared ahead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from medforge.train import loop
from tests.unit.train.runs import PLAIN, QUIET, about, at_step, changed, checkpoints, copy_samples, figures, train

# learning rates


def rates(schedule: str, warmup: float, steps: int) -> list[float]:
    stage = changed(schedule=schedule, warmup=warmup)
    return [loop.factor(stage, step, steps) for step in range(steps)]


def test_learning_rates_by_hand() -> None:
    assert rates("linear", 0.4, 5) == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    assert rates("constant", 0.4, 5) == pytest.approx([1 / 2, 1, 1, 1, 1])
    half = math.cos(math.pi / 4)
    assert rates("cosine", 0.0, 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert rates("cosine", 0.03, 1) == rates("constant", 0.0, 1) == [1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rates_are_those_of_transformers(schedule: str) -> None:
    """One step ahead while it warms up: there the first step has the rate 0 and does nothing."""
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, 3, 20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(schedule, 3 / 20, 20)
    assert ours[3:] == pytest.approx(expected[3:])
    assert ours[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_rates_reach_the_optimizer(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """AdamW's first step moves each weight by its rate. B starts at zero, so that it is then the rate itself."""
    from safetensors.torch import load_file

    stage = changed(QUIET, learning_rates={"language_mlp": 1e-3}, warmup=0.5, evaluate_every=1)
    adapter = train(tmp_path, base, phantoms, stage)
    curve = figures(adapter, "learning_rate")
    assert list(curve.values()) == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    short = train(tmp_path / "short", base, phantoms, changed(stage, steps=1))
    weights = load_file(short / "adapter_model.safetensors")
    for part, rate in (("visual", 2e-3), ("language_model", 1e-3)):
        for name, tensor in weights.items():
            if "lora_B" in name and part in name:
                assert float(tensor.abs().max()) == pytest.approx(rate, rel=1e-2)


# the best step


@pytest.mark.parametrize("name", ["loss", "accuracy", "region_iou", "match_auroc"])
def test_the_figure_that_names_the_best_step(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each figure is best at a step of its own; where two steps are as good, the first is kept."""
    from medforge.train.validation import Validation

    scripted = {
        "loss": [3.0, 2.0, 1.0, 1.5],
        "accuracy": [0.5, 0.25, 0.5, 0.0],
        "region_iou": [0.0, 0.25, 0.25, 0.125],
        "match_auroc": [0.5, 0.25, 0.75, 0.875],
    }
    best = {"loss": 3, "accuracy": 1, "region_iou": 2, "match_auroc": 4}[name]
    rows = iter(dict(zip(scripted, values, strict=True)) for values in zip(*scripted.values(), strict=True))
    monkeypatch.setattr(Validation, "run", lambda *_: next(rows))
    told = about(train(tmp_path, base, phantoms, changed(PLAIN, heads={}, evaluate_every=1, best_by=name)))
    assert (told["best_by"], told["best_step"]) == (name, best)
    assert told["validation"] == {key: values[best - 1] for key, values in scripted.items()}
    assert checkpoints(tmp_path) == sorted({best, 3, 4})


def test_a_figure_that_validation_cannot_give(tmp_path: Path, base: Path, phantoms: Path) -> None:
    """It is told before a weight is read, and no step is taken for nothing."""
    few = copy_samples(phantoms, tmp_path / "few", lambda s: s.split == "train" or s.answer_type == "open")
    stage = changed(PLAIN, best_by="closed_accuracy")
    (tmp_path / "base").mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "base" / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"best_by is closed_accuracy, which its 6 .*they give loss, .*open_accuracy"):
        train(tmp_path, tmp_path / "base", few, stage)


def test_steps_are_prepared_ahead(tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps at most, in other threads, and none past the end."""
    import threading

    prepared: list[tuple[int, bool]] = []
    prepare = loop.Ahead.prepare

    def noted(self: Any, step: int, chosen: list[int]) -> Any:
        prepared.append((step, threading.current_thread() is threading.main_thread()))
        return prepare(self, step, chosen)

    monkeypatch.setattr(loop.Ahead, "prepare", noted)
    furthest: list[int] = []
    taken = at_step(monkeypatch, lambda step: furthest.append(max(number for number, _ in prepared) - step))
    train(tmp_path / "two", base, phantoms, QUIET)
    assert sorted(number for number, _ in prepared) == [0, 1, 2, 3]
    assert not any(main for _, main in prepared)
    assert max(furthest) <= 1
    assert taken == [1, 2, 3, 4]
    prepared.clear()
    train(tmp_path / "none", base, phantoms, changed(QUIET, speed={"workers": 0}))
    assert prepared == [(0, True), (1, True), (2, True), (3, True)]
