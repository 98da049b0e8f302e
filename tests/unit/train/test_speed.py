"""Which means to be fast are on, and why; that activations computed twice change nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medforge.models.encode import Encoder
from medforge.models.load import load_model
from medforge.stages import SpeedConfig, StageConfig
from medforge.train import speed as module
from medforge.train.speed import Facts, Speed, activation_bytes, checkpoint_language, decide, free_disk, free_memory
from tests.unit.models.passes import PIXELS, adapted, batches, distance, gradients, row_losses, some_cases, stock

GB = 10**9
FACTS = Facts(
    device="cpu",
    dtype="float32",
    tower_tuned=False,
    merger_tuned=False,
    images=100,
    visits=3.0,
    feature_bytes=1 * GB,
    activation_bytes=1 * GB,
    memory_bytes=8 * GB,
    disk_bytes=100 * GB,
    questions_per_row=2.5,
)
GPU = replace(FACTS, device="cuda", dtype="bfloat16")


def stage(**speed: Any) -> StageConfig:
    return StageConfig.model_validate({"name": "say", "tune": ["vision_merger"], "steps": 10, "speed": speed})


def why(found: Speed, name: str) -> str:
    (decision,) = [one for one in found.decisions if one.name == name]
    return decision.why


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has liger-kernel."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else None)


@pytest.fixture
def no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)


# --- what of the tower is frozen, and kept


@pytest.mark.parametrize(
    ("tower", "merger", "features"),
    [(False, False, "after"), (False, True, "before"), (True, False, None), (True, True, None)],
)
def test_the_frozen_part_follows_from_what_is_tuned(tower: bool, merger: bool, features: str | None) -> None:
    found = decide(stage(), replace(FACTS, tower_tuned=tower, merger_tuned=merger))
    assert found.features == features
    assert found.cache == (features is not None)


@pytest.mark.parametrize(
    ("change", "on", "reason"),
    [
        ({}, True, "100 images, each run 3.0 times; 1 GB after the merger, 20 GB allowed"),
        ({"visits": 2.0}, True, "each run 2.0 times"),
        ({"visits": 1.9}, False, "too seldom to pay for the writing"),
        ({"feature_bytes": 20 * GB}, True, "20 GB allowed"),
        ({"feature_bytes": 21 * GB}, False, "too large"),
        ({"disk_bytes": 3 * GB}, True, "1.5 GB allowed"),  # half of what is free
        ({"disk_bytes": 1 * GB}, False, "0.5 GB allowed: too large"),
        ({"merger_tuned": True}, True, "1 GB before the merger"),
        ({"tower_tuned": True}, False, "the stage tunes the vision tower"),
        ({"images": 0, "visits": 3.0}, False, "0 images"),
    ],
)
def test_when_features_are_kept(change: dict[str, Any], on: bool, reason: str) -> None:
    found = decide(stage(), replace(FACTS, **change))
    assert (found.cache, reason in why(found, "cache_features")) == (on, True)


def test_the_size_that_is_allowed_can_be_set() -> None:
    assert decide(stage(cache_gigabytes=0.9), FACTS).cache is False
    assert decide(stage(cache_gigabytes=40), replace(FACTS, feature_bytes=39 * GB)).cache is True


def test_keeping_features_can_be_forced_and_forbidden() -> None:
    seldom = replace(FACTS, visits=1.0, feature_bytes=99 * GB)
    assert decide(stage(cache_features="on"), seldom).cache is True
    assert decide(stage(cache_features="off"), FACTS).cache is False
    assert why(decide(stage(cache_features="off"), FACTS), "cache_features").startswith("set to off; ")


# --- switches


@pytest.mark.parametrize(
    ("setting", "field", "facts", "expected"),
    [
        # (auto, on, off); None: `on` is refused
        ("packing", "packed", FACTS, (False, True, False)),
        ("packing", "packed", GPU, (True, True, False)),
        ("flex_attention", "flex", FACTS, (False, None, False)),
        ("flex_attention", "flex", GPU, (True, True, False)),
        ("fused_kernels", "fused", FACTS, (False, None, False)),
        ("fused_kernels", "fused", GPU, (True, True, False)),
        ("compile", "compile", FACTS, (False, True, False)),
        ("compile", "compile", GPU, (False, True, False)),
        ("checkpoint_activations", "checkpoint", FACTS, (False, True, False)),
        ("checkpoint_activations", "checkpoint", replace(FACTS, activation_bytes=5 * GB), (True, True, False)),
        ("checkpoint_activations", "checkpoint", replace(GPU, activation_bytes=5 * GB), (True, True, False)),
    ],
    ids=lambda value: getattr(value, "device", None) or str(value),
)
def test_each_switch(liger: None, setting: str, field: str, facts: Facts, expected: tuple[bool | None, ...]) -> None:
    for value, on in zip(("auto", "on", "off"), expected, strict=True):
        if on is None:
            with pytest.raises(ValueError, match=rf"stage 'say': speed\.{setting}: on.*; set auto or off"):
                decide(stage(**{setting: value}), facts)
            continue
        found = decide(stage(**{setting: value}), facts)
        assert getattr(found, field) is on, value
        assert why(found, setting).startswith(f"set to {value}; ") == (value != "auto")


def test_a_cache_of_a_tuned_tower_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"stage 'say': speed\.cache_features: on, but the stage tunes the vision tower"
    ):
        decide(stage(cache_features="on"), replace(FACTS, tower_tuned=True))


def test_fused_kernels_need_their_package(no_liger: None) -> None:
    assert decide(stage(), GPU).fused is False
    assert "liger-kernel is not installed" in why(decide(stage(), GPU), "fused_kernels")
    with pytest.raises(ValueError, match=r"speed\.fused_kernels: on, but liger-kernel is not installed"):
        decide(stage(fused_kernels="on"), GPU)


def test_fused_kernels_need_a_gpu(liger: None) -> None:
    with pytest.raises(ValueError, match=r"speed\.fused_kernels: on, but they are kernels for GPUs"):
        decide(stage(fused_kernels="on"), FACTS)


def test_flex_attention_follows_packing(liger: None) -> None:
    assert decide(stage(packing="off"), GPU).flex is False
    unchecked = SpeedConfig.model_construct(**(SpeedConfig().model_dump() | {"flex_attention": "on", "packing": "off"}))
    with pytest.raises(ValueError, match=r"speed\.flex_attention: on needs packing"):
        decide(stage().model_copy(update={"speed": unchecked}), GPU)


@pytest.mark.parametrize(("steps", "device", "on"), [(500, "cuda", False), (501, "cuda", True), (501, "cpu", False)])
def test_only_long_runs_on_a_gpu_are_compiled(steps: int, device: str, on: bool) -> None:
    config = stage().model_copy(update={"steps": steps})
    assert decide(config, replace(GPU, device=device)).compile is on


@pytest.mark.parametrize(("need", "on"), [(6 * GB, False), (6 * GB + 1, True)])
def test_activations_are_computed_twice_where_memory_is_short(need: int, on: bool) -> None:
    facts = replace(FACTS, activation_bytes=need, memory_bytes=10 * GB)
    found = decide(stage(), facts)
    assert found.checkpoint is on
    assert "activations of 8192 tokens take 6.00 GB of 10.0 GB" in why(found, "checkpoint_activations")


@pytest.mark.parametrize("name", ["share_prefix", "answer_logits", "length_buckets"])
def test_what_is_plainly_on_can_be_switched_off(name: str) -> None:
    assert getattr(decide(stage(), FACTS), name) is True
    assert getattr(decide(stage(**{name: False}), FACTS), name) is False


# --- what is told


def test_every_decision_is_explained(liger: None) -> None:
    for facts in (FACTS, GPU, replace(FACTS, tower_tuned=True)):
        found = decide(stage(), facts)
        lines = found.explain().splitlines()
        assert len(lines) == len(found.decisions)
        told = {}
        for line in lines:
            match = re.fullmatch(r"(\w+) +(on |off)  (\S.*)", line)
            assert match, line
            told[match[1]] = match[2].strip() == "on"
        # every setting but the two that are numbers of others is told, and says what training will do
        settings = set(SpeedConfig.model_fields) - {"questions_per_image", "cache_gigabytes", "workers"}
        assert set(told) == settings | {"bfloat16"}
        fields = {"cache_features": "cache", "packing": "packed", "flex_attention": "flex", "fused_kernels": "fused"}
        fields["checkpoint_activations"] = "checkpoint"
        for name in settings:
            assert told[name] == getattr(found, fields.get(name, name)), name
        assert told["bfloat16"] == (facts.dtype == "bfloat16")
    assert "2.5 samples share an image's row" in decide(stage(), FACTS).explain()


# --- measures


def test_activation_bytes_by_hand() -> None:
    text = type("Text", (), {"num_hidden_layers": 2, "hidden_size": 10, "intermediate_size": 30})
    assert activation_bytes(text, 5, 4) == 2 * 5 * 4 * (10 * 10 + 4 * 30)


def test_what_is_free_is_asked_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    import torch

    folders: list[Path] = []

    def usage(folder: Path) -> Any:
        folders.append(folder)
        return SimpleNamespace(free=3 * GB)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * GB))
    assert free_disk(tmp_path / "not" / "yet") == 3 * GB
    assert folders == [tmp_path]  # what is not there yet will be on the disk of the folder above it
    assert free_memory(torch.device("cpu")) == 5 * GB


# --- activations computed twice


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_activations_computed_twice_change_nothing(tiny_models: dict[str, Path], family: str) -> None:
    encoder = Encoder(tiny_models[family], *PIXELS)
    (batch,) = batches(encoder, [one.item for one in some_cases(encoder)])
    model = adapted(load_model(tiny_models[family], "float32").cpu(), family).train()
    runs: list[str] = []
    core = stock(model)
    core.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append("language"))
    core.model.visual.blocks[1].mlp.register_forward_pre_hook(lambda *_: runs.append("tower"))
    found = []
    for _ in range(2):
        loss = row_losses(core, encoder, batch).sum()
        loss.backward()
        found.append((float(loss.detach()), gradients(model), sorted(runs)))
        runs.clear()
        checkpoint_language(core.model.language_model.layers)
    (loss, expected, once), (again, recomputed, twice) = found
    assert again == pytest.approx(loss, rel=1e-6)
    assert distance(recomputed, expected) < 1e-6
    assert once == ["language", "tower"]
    assert twice == ["language", "language", "tower"]  # and the tower is left alone
