"""What stops a run of training: losses and gradients that are not finite, a loss that explodes, a lack of memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medforge.files import read_json, tree_digest
from medforge.train import loop
from tests.unit.train.runs import PLAIN, QUIET, changed, checkpoint, checkpoints, figures, replaced, train


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
