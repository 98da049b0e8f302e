"""The Qwen-VL families: what differs between them, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medforge.config import Part
from medforge.files import read_json

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
            {"vision_merger": r".*visual\.merger\.mlp\.(0|2)"} | _LANGUAGE,
        ),
        Family(
            "qwen2.5-vl",
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLProcessor",
            14,
            "json-pixels",
            {"vision_merger": r".*visual\.merger\.mlp\.(0|2)"} | _LANGUAGE,
        ),
        Family(
            "qwen3-vl",
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLProcessor",
            16,
            "json-1000",
            {"vision_merger": r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"} | _LANGUAGE,
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


def lora_targets(model: Any, family: Family, parts: list[Part]) -> list[str]:
    """The names of the linear layers of `parts`, in the model's own order.

    Raises ValueError with the model's layer kinds when a part matches nothing.
    """
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets: list[str] = []
    for part in parts:
        pattern = re.compile(family.targets[part])
        found = [name for name in linear if pattern.fullmatch(name)]
        if not found:
            kinds = sorted({re.sub(r"\d+", "N", name) for name in linear})
            raise ValueError(f"{part}: no linear layer of this {family.name} matches; it has {', '.join(kinds)}")
        targets += found
    return targets
