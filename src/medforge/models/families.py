"""The Qwen-VL families: what differs between them, in one place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medforge.files import read_json
from medforge.stages import REGEX

_LANGUAGE = {
    "language_attention": r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    # never a bare gate_proj: Qwen2.5-VL's vision tower has layers of that name too
    "language_mlp": r".*language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}


@dataclass(frozen=True)
class Family:
    """One family. `box_space` tells how it writes boxes: special tokens or JSON, 0–1000 or resized pixels."""

    name: str
    model_type: str
    model_class: str
    processor_class: str
    patch_size: int
    box_space: Literal["tokens-1000", "json-pixels", "json-1000"]
    targets: dict[str, str]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "qwen2-vl",
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLProcessor",
            14,
            "tokens-1000",
            {"vision_merger": r".*visual\.merger\.mlp\.(0|2)"}
            | {"vision_tower": r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"}
            | _LANGUAGE,
        ),
        Family(
            "qwen2.5-vl",
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLProcessor",
            14,
            "json-pixels",
            {"vision_merger": r".*visual\.merger\.mlp\.(0|2)"}
            | {"vision_tower": r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"}
            | _LANGUAGE,
        ),
        Family(
            "qwen3-vl",
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLProcessor",
            16,
            "json-1000",
            {"vision_merger": r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"}
            | {"vision_tower": r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"}
            | _LANGUAGE,
        ),
    )
}


def family_of(folder: Path) -> Family:
    """The family of the model in `folder`, by `model_type` in its config.json.

    Raises ValueError when there is no config.json or the model is of another kind.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json: is not a JSON object")
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ValueError(f"{folder}/config.json: model_type {model_type!r} is not one of {known}")


def lora_targets(model: Any, family: Family, tune: Sequence[str]) -> dict[str, str]:
    """The linear layers that `tune` names, in the model's own order, each with the entry of `tune` that named it.

    An entry is a part of the family or ``re:<regular expression>`` over whole layer names; the first that matches a
    layer takes it. Raises ValueError with the model's layer kinds when an entry matches nothing.
    """
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets: dict[str, str] = {}
    for entry in tune:
        pattern = re.compile(entry.removeprefix(REGEX) if entry.startswith(REGEX) else family.targets[entry])
        found = [name for name in linear if pattern.fullmatch(name)]
        if not found:
            kinds = sorted({re.sub(r"\d+", "N", name) for name in linear})
            raise ValueError(f"{entry}: no linear layer of this {family.name} matches; it has {', '.join(kinds)}")
        for name in found:
            targets.setdefault(name, entry)
    return {name: targets[name] for name in linear if name in targets}
