"""What a stage tunes: LoRA on the layers that it names, or those layers themselves; its parameter groups; its files.

A stage's folder in the stack holds a peft adapter, or, for `method: full`, the tuned layers' own weights in
`weights.safetensors`, by the names of the model's state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.files import read_json, write_json
from medforge.models.families import Family, lora_targets
from medforge.models.load import FULL_WEIGHTS
from medforge.stages import StageConfig

if TYPE_CHECKING:
    import torch

_HEADS = "heads."
_MODEL = "model."


def attach(model: Any, family: Family, stage: StageConfig) -> tuple[Any, dict[str, str]]:
    """Make the stage's layers trainable and all else frozen. Returns the model and {layer: entry of `tune`}.

    What is trained is float32, also where the frozen weights are bfloat16: its updates would be lost in rounding.
    Raises ValueError for an entry that matches nothing, or the output layer where it is the word embedding too.
    """
    targets = lora_targets(model, family, stage.tune)
    if "lm_head" in targets and model.lm_head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"stage {stage.name!r}: tune: lm_head shares its weights with the word embedding in this model, and would "
            "change it along; leave it out"
        )
    model.requires_grad_(False)
    if stage.method == "full":
        for name in targets:
            model.get_submodule(name).float().requires_grad_(True)
        return model, targets
    from peft import LoraConfig, get_peft_model

    lora = stage.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=list(targets),
    )
    return get_peft_model(model, config), targets


def parameter_groups(trainee: Any, targets: Mapping[str, str], stage: StageConfig) -> list[dict[str, Any]]:
    """AdamW's groups, each with its peak learning rate, weight decay and the names of its parameters.

    Biases and norms take no weight decay; the heads come last, with their own rate.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainee.named_parameters():
        if not parameter.requires_grad or name.startswith(_HEADS):
            continue
        entry = next(targets[layer] for layer in _layers(name) if layer in targets)
        rate = stage.learning_rates.get(entry, stage.learning_rate)
        decay = stage.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    found = list(groups.values())
    if trainee.heads is not None:
        from medforge.models.heads import parameter_groups as head_groups

        assert stage.heads is not None
        names = {id(parameter): name for name, parameter in trainee.named_parameters()}
        for group in head_groups(trainee.heads, stage.heads.learning_rate, stage.weight_decay):
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
            if group["params"]:
                found.append(group | {"names": [names[id(parameter)] for parameter in group["params"]]})
    return found


def _layers(name: str) -> list[str]:
    """The names that a parameter's layer may have in the stock model, without peft's wrapper and its own parts."""
    plain = name.removeprefix(_MODEL).removeprefix("base_model.model.")
    parts = plain.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def save(trainee: Any, weights: Mapping[str, torch.Tensor], stage: StageConfig, folder: Path) -> None:
    """Write the adapter with `weights` (by the trainee's parameter names), so that the same give the same bytes."""
    from safetensors.torch import save_file

    from medforge.models.heads import TaskHeads, save_heads

    folder.mkdir(parents=True, exist_ok=True)
    own = {name.removeprefix(_MODEL): tensor for name, tensor in weights.items() if not name.startswith(_HEADS)}
    if stage.method == "full":
        save_file({name: tensor.contiguous() for name, tensor in sorted(own.items())}, folder / FULL_WEIGHTS)
    else:
        trainee.model.save_pretrained(folder, state_dict=own)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        settings = read_json(folder / "adapter_config.json")
        settings["base_model_name_or_path"] = None  # peft puts the path on this machine
        settings["target_modules"] = sorted(settings["target_modules"])  # a set, in each process's own order
        write_json(folder / "adapter_config.json", settings)
    if trainee.heads is not None:
        heads = TaskHeads(trainee.heads.hidden, *kinds(trainee.heads))
        state = {name.removeprefix(_HEADS): tensor for name, tensor in weights.items() if name.startswith(_HEADS)}
        heads.load_state_dict(state)
        save_heads(heads, folder)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors makes 0600


def kinds(heads: Any) -> tuple[bool, bool]:
    """Which heads there are: region, match."""
    return heads.region_head is not None, heads.match_head is not None
