"""The training loop gives the same curve however fast it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medforge.config import StageConfig
from tests.unit.train.runs import PLAIN, QUIET, changed, close, figures, replaced, train


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
