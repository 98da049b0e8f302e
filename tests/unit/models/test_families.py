"""Families by config.json, and the layers that LoRA tunes in each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from medforge.models.families import FAMILIES, family_of, lora_targets
from medforge.models.load import load_model
from medforge.stages import PARTS


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, Any]:
    return {family: load_model(folder, "float32") for family, folder in tiny_models.items()}


def expected(family: str, config: Any, part: str) -> set[str]:
    """The layers of a part, written out by the configuration's numbers."""
    layers = [f"model.language_model.layers.{n}" for n in range(config.text_config.num_hidden_layers)]
    if part == "language_attention":
        return {f"{layer}.self_attn.{kind}_proj" for layer in layers for kind in "qkvo"}
    if part == "language_mlp":
        return {f"{layer}.mlp.{kind}_proj" for layer in layers for kind in ("gate", "up", "down")}
    if part == "vision_tower":
        mlp = {
            "qwen2-vl": ("fc1", "fc2"),
            "qwen2.5-vl": ("gate_proj", "up_proj", "down_proj"),
            "qwen3-vl": ("linear_fc1", "linear_fc2"),
        }[family]
        blocks = [f"model.visual.blocks.{n}" for n in range(config.vision_config.depth)]
        return {f"{b}.{layer}" for b in blocks for layer in ("attn.qkv", "attn.proj", *(f"mlp.{n}" for n in mlp))}
    if family != "qwen3-vl":
        return {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    mergers = ["merger"] + [
        f"deepstack_merger_list.{n}" for n in range(len(config.vision_config.deepstack_visual_indexes))
    ]
    return {f"model.visual.{merger}.linear_fc{n}" for merger in mergers for n in (1, 2)}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_exactly_its_layers(models: dict[str, Any], family: str, part: str) -> None:
    model = models[family]
    found = lora_targets(model, FAMILIES[family], [part])
    assert set(found) == expected(family, model.config, part)
    assert set(found.values()) == {part}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_parts_are_all_linear_layers_but_the_head(models: dict[str, Any], family: str) -> None:
    """None is in two parts, and none is forgotten."""
    import torch

    model = models[family]
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    parts = [set(lora_targets(model, FAMILIES[family], [part])) for part in PARTS]
    assert sum(len(part) for part in parts) == len(set().union(*parts))
    assert set().union(*parts) == {name for name in linear if name != "lm_head"}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_tower_and_the_language_model_never_mix(models: dict[str, Any], family: str) -> None:
    """Qwen2.5-VL's tower has layers named gate_proj, up_proj and down_proj as the language model has."""
    tower = lora_targets(models[family], FAMILIES[family], ["vision_tower"])
    language = lora_targets(models[family], FAMILIES[family], ["language_attention", "language_mlp"])
    assert all(name.startswith("model.visual.blocks.") for name in tower)
    assert all(name.startswith("model.language_model.") for name in language)
    assert any("gate_proj" in name for name in tower) == (family == "qwen2.5-vl")


def test_the_layers_are_in_the_models_order(models: dict[str, Any]) -> None:
    model, family = models["qwen3-vl"], FAMILIES["qwen3-vl"]
    forward, backward = (lora_targets(model, family, tune) for tune in (PARTS, PARTS[::-1]))
    assert list(forward) == list(backward) == [name for name, _ in model.named_modules() if name in forward]
    assert forward == backward
    assert len(lora_targets(model, family, ["vision_merger", "language_attention", "language_mlp"])) == 12 + 9 + 4


def test_a_regular_expression_names_whole_layers(models: dict[str, Any]) -> None:
    model, family = models["qwen3-vl"], FAMILIES["qwen3-vl"]
    entry = r"re:model\.language_model\.layers\.[12]\.self_attn\.q_proj"
    layers = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in (1, 2)]
    assert lora_targets(model, family, [entry]) == dict.fromkeys(layers, entry)
    with pytest.raises(ValueError, match="re:q_proj: no linear layer"):  # a part of a name is not a name
        lora_targets(model, family, ["re:q_proj"])


def test_the_first_entry_that_names_a_layer_takes_it(models: dict[str, Any]) -> None:
    model, family = models["qwen3-vl"], FAMILIES["qwen3-vl"]
    queries = r"re:.*language_model.*q_proj"
    for tune in ([queries, "language_attention"], ["language_attention", queries]):
        found = lora_targets(model, family, tune)
        assert set(found) == set(lora_targets(model, family, ["language_attention"]))
        assert {entry for name, entry in found.items() if name.endswith("q_proj")} == {tune[0]}
        assert {entry for name, entry in found.items() if not name.endswith("q_proj")} == {"language_attention"}


@pytest.mark.parametrize("entry", ["re:.*norm", "re:model", "re:.*embed_tokens"])
def test_what_is_no_linear_layer_is_not_found(models: dict[str, Any], entry: str) -> None:
    """The message lists what there is instead."""
    match = rf"{re.escape(entry)}: no linear layer of this qwen3-vl matches; it has .*self_attn\.q_proj"
    with pytest.raises(ValueError, match=match) as caught:
        lora_targets(models["qwen3-vl"], FAMILIES["qwen3-vl"], ["vision_merger", entry])
    assert r"model.language_model.layers.N.mlp.gate_proj" in str(caught.value)
    assert "layers.0" not in str(caught.value)


def test_peft_adapts_the_layers_that_are_named(models: dict[str, Any], tiny_models: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(tiny_models["qwen2.5-vl"], "float32")
    targets = list(lora_targets(model, FAMILIES["qwen2.5-vl"], ["vision_merger", "language_mlp"]))
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
