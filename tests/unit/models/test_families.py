"""Families by config.json, and the layers that LoRA tunes in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medforge.config import Part
from medforge.models.families import FAMILIES, family_of, lora_targets
from medforge.models.load import load_model


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, Any]:
    return {family: load_model(folder, "float32") for family, folder in tiny_models.items()}


def expected(family: str, config: Any, part: Part) -> set[str]:
    """The layers of a part, written out by the configuration's numbers."""
    layers = [f"model.language_model.layers.{n}" for n in range(config.text_config.num_hidden_layers)]
    if part == "language_attention":
        return {f"{layer}.self_attn.{kind}_proj" for layer in layers for kind in "qkvo"}
    if part == "language_mlp":
        return {f"{layer}.mlp.{kind}_proj" for layer in layers for kind in ("gate", "up", "down")}
    if family != "qwen3-vl":
        return {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    mergers = ["merger"] + [
        f"deepstack_merger_list.{n}" for n in range(len(config.vision_config.deepstack_visual_indexes))
    ]
    return {f"model.visual.{merger}.linear_fc{n}" for merger in mergers for n in (1, 2)}


PARTS: list[Part] = ["vision_merger", "language_attention", "language_mlp"]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_exactly_its_layers(models: dict[str, Any], family: str, part: Part) -> None:
    model = models[family]
    found = lora_targets(model, FAMILIES[family], [part])
    assert len(found) == len(set(found))
    assert set(found) == expected(family, model.config, part)


def test_the_parts_add_up_in_their_order(models: dict[str, Any]) -> None:
    model, family = models["qwen3-vl"], FAMILIES["qwen3-vl"]
    one_by_one = [name for part in reversed(PARTS) for name in lora_targets(model, family, [part])]
    assert lora_targets(model, family, PARTS[::-1]) == one_by_one
    assert len(one_by_one) == 3 * 4 + 3 * 3 + 2 * 2


def test_the_vision_towers_gate_is_left_alone(models: dict[str, Any]) -> None:
    """Qwen2.5-VL's tower has layers named gate_proj, up_proj and down_proj as the language model has."""
    model = models["qwen2.5-vl"]
    assert any(name.endswith("gate_proj") for name, _ in model.model.visual.named_modules())
    found = lora_targets(model, FAMILIES["qwen2.5-vl"], ["language_mlp", "language_attention"])
    assert not [name for name in found if "visual" in name]


def test_peft_adapts_the_layers_that_are_named(models: dict[str, Any], tiny_models: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(tiny_models["qwen2.5-vl"], "float32")
    targets = lora_targets(model, FAMILIES["qwen2.5-vl"], ["vision_merger", "language_mlp"])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names == {f"base_model.model.{name}.lora_{kind}.default.weight" for name in targets for kind in "AB"}


def test_a_part_that_matches_nothing_is_an_error() -> None:
    import torch

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])})
    with pytest.raises(ValueError, match=r"vision_merger: no linear layer of this qwen2-vl matches; it has blocks\.N$"):
        lora_targets(model, FAMILIES["qwen2-vl"], ["vision_merger"])


def test_another_familys_merger_is_not_found(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vision_merger"):
        lora_targets(models["qwen2-vl"], FAMILIES["qwen3-vl"], ["vision_merger"])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_family_is_found_by_config_json(tiny_models: dict[str, Path], family: str) -> None:
    assert family_of(tiny_models[family]).name == family


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (None, r"config\.json: no such file"),
        ("{", "not valid JSON"),
        (json.dumps({"model_type": "llama"}), "'llama' is not one of qwen2_vl, qwen2_5_vl, qwen3_vl"),
        (json.dumps({}), "None is not one of"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, config: str | None, match: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=match):
        family_of(tmp_path)
