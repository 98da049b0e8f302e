"""The training loop: rates, guards, what is said of a lack of memory, which step is kept, and the same curve however
fast it goes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medforge.config import StageConfig
from medforge.files import read_json, tree_digest
from medforge.train import loop
from tests.unit.train.runs import (
    about,
    at_step,
    changed,
    checkpoint,
    checkpoints,
    close,
    copy_samples,
    figures,
    train,
)

# no random numbers, so that another way to compute the same gives the same
PLAIN = changed(lora={"r": 4, "alpha": 8}, steps=4, batch_size=8, evaluate_every=2, learning_rate=2e-3)
QUIET = changed(PLAIN, evaluate_every=4, generate_samples=0)


Act = Callable[[Any, Any, int, tuple[float, float]], tuple[float, float]]


def replaced(patch: pytest.MonkeyPatch, act: Act) -> None:
    """Let `act` see the parts, the micro-batches and the number of each step, and say what its loss and norm are."""
    one_step = loop.one_step

    def new(parts: Any, works: Any, seed: int, step: int, rates: list[float]) -> tuple[float, float]:
        return act(parts, works, step + 1, one_step(parts, works, seed, step, rates))

    patch.setattr(loop, "one_step", new)


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


# what stops a run


def test_a_loss_that_is_not_a_number(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step at an absurd rate ruins the weights, so that the second has no loss."""
    seen: dict[int, set[str]] = {}

    def look(parts: Any, works: Any, step: int, found: tuple[float, float]) -> tuple[float, float]:
        items = [item for work in works for item in work.batch.items]
        seen[step] = {parts.samples.samples[item.tag.index].id for item in items}
        return found

    replaced(monkeypatch, look)
    stage = changed(PLAIN, learning_rate=1e30, warmup=0.0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"stage 'see': step 2: the loss is nan .*bad-step-00000002.json") as error:
        train(tmp_path, base, phantoms, stage)
    assert "learning_rate" in str(error.value)
    path = tmp_path / "work" / "bad-step-00000002.json"
    assert str(path) in str(error.value)
    told = read_json(path)
    assert (told["step"], told["loss"], told["norm"]) == (2, None, None)
    assert set(told["samples"]) == seen[2] != seen[1]
    assert len(told["samples"]) == 8
    assert checkpoints(tmp_path) == [1]
    assert not (tmp_path / "out").exists()


def test_a_bad_step_leaves_the_last_checkpoint_as_it_was(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run again without the cause of it, the stage goes on from there."""
    whole = train(tmp_path / "whole", base, phantoms, QUIET)
    stage, folder, before = changed(QUIET, checkpoint_every=2), tmp_path / "broken", []

    def poison(parts: Any, works: Any, step: int, found: tuple[float, float]) -> tuple[float, float]:
        if step == 3:
            before.append(tree_digest(checkpoint(folder, 2)))
            return math.nan, 1.0
        return found

    with monkeypatch.context() as patch:
        replaced(patch, poison)
        with pytest.raises(ValueError, match="step 3: the loss is nan and the gradient's norm 1"):
            train(folder, base, phantoms, stage)
    assert checkpoints(folder) == [2]
    assert [tree_digest(checkpoint(folder, 2))] == before
    adapter = train(folder, base, phantoms, stage)
    assert figures(adapter, "loss") == figures(whole, "loss")


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medforge.train.parallel import Engine

    call, one_step = Engine.__call__, loop.one_step

    def steep(self: Any, *args: Any, **rest: Any) -> Any:
        share, *others = call(self, *args, **rest)
        return share * math.inf, *others

    def looked(parts: Any, *args: Any) -> tuple[float, float]:
        before = {name: p.detach().clone() for name, p in parts.engine.parameters.items()}
        found = one_step(parts, *args)
        assert all(bool((before[name] == p).all()) for name, p in parts.engine.parameters.items())
        return found

    monkeypatch.setattr(Engine, "__call__", steep)
    monkeypatch.setattr(loop, "one_step", looked)
    with pytest.raises(ValueError, match=r"step 1: the loss is [\d.]+ and the gradient's norm (nan|inf)"):
        train(tmp_path, base, phantoms, QUIET)
    told = read_json(tmp_path / "work" / "bad-step-00000001.json")
    assert told["loss"] > 1 and told["norm"] is None


def test_an_exploding_loss(tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_USUAL", 3)

    def explode(parts: Any, works: Any, step: int, found: tuple[float, float]) -> tuple[float, float]:
        return (found[0] * (12 if step == 4 else 1), found[1])

    replaced(monkeypatch, explode)
    with pytest.raises(
        ValueError, match=r"step 4: the loss is \d+\.?\d*, 1[123] times the usual \d.*bad-step-00000004"
    ):
        train(tmp_path, base, phantoms, QUIET)
    assert read_json(tmp_path / "work" / "bad-step-00000004.json")["loss"] > 50


def guarded(tmp_path: Path, losses: list[float], loss: float, norm: float = 1.0, rank: int = 0) -> None:
    samples = SimpleNamespace(samples=[SimpleNamespace(id=name) for name in "abcd"])
    plan = SimpleNamespace(step=lambda number: [3, 1])
    parts: Any = SimpleNamespace(work=tmp_path, world=SimpleNamespace(rank=rank), samples=samples, plan=plan)
    loop.guard(parts, changed(), loop.State(losses=losses), 6, loss, norm)


def test_what_counts_as_exploding(tmp_path: Path) -> None:
    """Ten times the median of the last 50 losses, and never less than 10 nats: a small loss may well double."""
    high, low = [3.0] * 49 + [100.0], [0.01] * 50
    guarded(tmp_path, high, 30.0)
    guarded(tmp_path, low, 9.9)
    guarded(tmp_path, high[:-1], 1e6)  # too few to know what is usual
    assert list(tmp_path.iterdir()) == []
    for losses, loss in ((high, 30.1), (low, 10.1)):
        with pytest.raises(ValueError, match="times the usual"):
            guarded(tmp_path, losses, loss)
    told = json.loads((tmp_path / "bad-step-00000007.json").read_text())
    assert told == {"step": 7, "loss": 10.1, "norm": 1.0, "samples": ["d", "b"], "recent_losses": [0.01] * 10}


def test_only_the_first_process_writes_the_bad_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inf"):
        guarded(tmp_path, [], math.inf, rank=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("heads", [None, {}], ids=["language", "heads"])
def test_a_validation_that_is_not_finite(
    tmp_path: Path, base: Path, phantoms: Path, heads: dict[str, Any] | None
) -> None:
    """Weights can be ruined by the very step before a validation; no checkpoint of them may be the best."""
    stage = changed(PLAIN, learning_rate=1e30, warmup=0.0, evaluate_every=1, heads=heads)
    with pytest.raises(ValueError, match=r"stage 'see': step 1: the validation's loss is nan.*learning_rate"):
        train(tmp_path, base, phantoms, stage)
    assert checkpoints(tmp_path) == []


# memory


def raising(error: Callable[[], object]) -> Callable[..., Any]:
    def step(*_: object) -> None:
        error()

    return step


def cuda_is_full() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …")


def cpu_is_full() -> None:
    import torch

    torch.empty(1 << 55)  # PyTorch's own error


@pytest.mark.parametrize("error", [cuda_is_full, cpu_is_full])
def test_out_of_memory_names_the_setting_and_its_value(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], None]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", raising(error))
        pattern = (
            r"stage 'see': out of memory while training on (\d+) tokens .*lower micro_tokens from 8192 to (\d+)\. "
            r"\(.*llocate"
        )
        with pytest.raises(ValueError, match=pattern) as raised:
            train(tmp_path / "one", base, phantoms, QUIET)
    assert "\n" not in str(raised.value)
    told = re.search(pattern, str(raised.value))
    assert told is not None
    held, advised = int(told[1]), int(told[2])
    assert advised == held // 2
    sizes: list[int] = []

    def look(parts: Any, works: Any, step: int, found: tuple[float, float]) -> tuple[float, float]:
        sizes.extend(work.batch.input_ids.numel() for work in works)
        return found

    replaced(monkeypatch, look)
    train(tmp_path / "two", base, phantoms, changed(QUIET, micro_tokens=advised))
    assert max(sizes) <= advised


def test_out_of_memory_with_one_long_sample(
    tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No smaller micro-batch would help: the sample itself has to be smaller."""
    monkeypatch.setattr(loop, "one_step", raising(cuda_is_full))
    with pytest.raises(ValueError, match=r"one sample alone has \d+ tokens: halve max_pixels, or set speed.checkpoint"):
        train(tmp_path, base, phantoms, changed(QUIET, micro_tokens=16))


def test_other_errors_pass(tmp_path: Path, base: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "one_step", raising(fail))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        train(tmp_path, base, phantoms, QUIET)


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


# speed


def run_of(folder: Path, base: Path, dataset: Path, stage: StageConfig) -> tuple[Path, list[dict[str, Any]]]:
    """Train, and note of each step how it was computed."""
    seen: list[dict[str, Any]] = []

    def look(parts: Any, works: Any, step: int, found: tuple[float, float]) -> tuple[float, float]:
        batches, module = [work.batch for work in works], parts.engine.module
        seen.append(
            {
                "rows": sum(len(batch.images) for batch in batches),  # each row runs its one image
                "items": sum(len(batch.items) for batch in batches),
                "lines": max(len(batch.input_ids) for batch in batches),
                "cells": sum(batch.input_ids.numel() for batch in batches),
                "micro": len(batches),
                "answer_logits": module.answer_logits,
                "checkpointing": module.stock.model.language_model.layers[0].gradient_checkpointing,
                "towers": any(
                    getattr(part, "gradient_checkpointing", False) for part in module.stock.model.visual.modules()
                ),
                "cached": module.features.cache is not None,
                "order": [item.tag.index for batch in batches for item in batch.items],
            }
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        replaced(patch, look)
        return train(folder, base, dataset, stage), seen


SWITCHES: dict[str, dict[str, Any]] = {
    "share_prefix": {"share_prefix": False},
    "cache_features": {"cache_features": "on"},
    "answer_logits": {"answer_logits": False},
    "length_buckets": {"length_buckets": False},
    "packing": {"packing": "on"},
    "checkpoint_activations": {"checkpoint_activations": "on"},
    "workers": {"workers": 0},
    "micro_tokens": {},
    "all": {
        "share_prefix": False,
        "cache_features": "off",
        "answer_logits": False,
        "length_buckets": False,
        "workers": 0,
    },
}
FAST = changed(PLAIN, heads={}, steps=3, evaluate_every=3, micro_tokens=256, speed={"cache_features": "off"})


@pytest.fixture(scope="module")
def fast(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], phantoms: Path
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """A run of each family with what is fast on a processor."""
    folder = tmp_path_factory.mktemp("fast")
    return {family: run_of(folder / family, path, phantoms, FAST) for family, path in tiny_models.items()}


CASES = [("qwen3-vl", name) for name in SWITCHES]
MAIN = ("share_prefix", "cache_features", "packing", "micro_tokens")
CASES += [(family, name) for family in ("qwen2-vl", "qwen2.5-vl") for name in MAIN]


@pytest.mark.parametrize(("family", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_no_means_to_be_fast_changes_the_curve(
    tmp_path: Path, tiny_models: dict[str, Path], phantoms: Path, fast: Any, family: str, name: str
) -> None:
    changes: dict[str, Any] = {"speed": {"cache_features": "off"} | SWITCHES[name]}
    if name == "micro_tokens":
        changes["micro_tokens"] = 48
    adapter, seen = run_of(tmp_path, tiny_models[family], phantoms, changed(FAST, **changes))
    reference, usual = fast[family]
    for figure in ("loss", "grad_norm", "eval_loss", "eval_region_iou", "eval_match_auroc"):
        close(figures(adapter, figure), figures(reference, figure), 1e-4)
    assert all(sorted(a["order"]) == sorted(b["order"]) for a, b in zip(seen, usual, strict=True))
    # and it was computed in another way
    first, before = seen[0], usual[0]
    assert before["items"] > before["rows"] and before["lines"] > 1
    if name in ("share_prefix", "all"):
        assert first["rows"] == first["items"] == before["items"]
    if name == "cache_features":
        assert first["cached"] and not before["cached"]
        assert list((tmp_path / "work" / "features").rglob("*.safetensors"))
    if name in ("answer_logits", "all"):
        assert before["answer_logits"] and not first["answer_logits"]
    if name in ("length_buckets", "all"):
        assert sum(step["cells"] for step in seen) > sum(step["cells"] for step in usual)
    if name == "packing":
        assert first["lines"] == 1
    if name == "checkpoint_activations":
        assert first["checkpointing"] and not before["checkpointing"] and not first["towers"]
    if name == "micro_tokens":
        assert first["micro"] > 2 * before["micro"]


def test_questions_per_image_decides_the_order_and_sharing_does_not(tmp_path: Path, base: Path, phantoms: Path) -> None:
    orders = []
    for number, speed in enumerate(
        ({"questions_per_image": 1}, {"questions_per_image": 2}, {"questions_per_image": 2})
    ):
        stage = changed(QUIET, speed=speed | {"share_prefix": number != 2})
        orders.append([step["order"] for step in run_of(tmp_path / str(number), base, phantoms, stage)[1]])
    sets = [[sorted(step) for step in order] for order in orders]
    assert sets[0] != sets[1] == sets[2]


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
