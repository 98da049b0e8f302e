"""The base and the adapters of all stages as one model folder, with a proof that it says what they say."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medforge.config import ModelConfig
from medforge.dataset import Dataset
from medforge.files import new_folder, read_json, sha256_file, tree_digest, write_json
from medforge.models.encode import Encoder, collate
from medforge.models.load import FULL_WEIGHTS, WEIGHTS, load_model, stack

PROOF_SAMPLES = 8
# largest difference of two logits, over the largest logit: rounding, not another model
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def run(base: Path, adapters: Path, dataset: Path, out: Path, config: ModelConfig) -> dict[str, Any]:
    """Write the merged model to the folder `out`, with merge_proof.json; the proof is returned.

    The proof compares the logits of the written folder with those of the base that carries the adapters unmerged, on
    samples of `dataset`. The task heads of the last stage that has any are copied: they read the states of the model
    with all its adapters. Raises ValueError when the stack is empty or heads are broken, RuntimeError when the logits
    disagree: then nothing is left at `out`.
    """
    adapter_folders = stack(adapters)
    if not adapter_folders:
        raise ValueError(f"{adapters}: holds no adapter; a stack of `medforge train` is expected")
    with new_folder(out) as folder:
        model = load_model(base, config.dtype, adapter_folders)
        model.save_pretrained(folder)
        _copy_heads([base, *adapter_folders], folder)
        for path in sorted(base.iterdir()):
            if path.is_file() and not (folder / path.name).exists() and not any(path.match(w) for w in WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            path.chmod(0o644)
        batch = _batch(base, dataset, config)
        difference, scale, agreement = _compare(
            _logits(load_model(folder, config.dtype), batch), _unmerged(base, adapter_folders, config, batch)
        )
        proof = {
            "schema_version": 1,
            "base": tree_digest(base),
            "adapters": {path.name: tree_digest(path) for path in adapter_folders},
            "dtype": config.dtype,
            "weights": {
                path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))
            },
            "positions": len(batch["input_ids"].flatten()),
            "max_logit_difference": difference,
            "max_logit": scale,
            "tolerance": TOLERANCE[config.dtype],
            "same_best_token": agreement,
        }
        if not difference <= TOLERANCE[config.dtype] * scale:  # so that NaN fails too
            raise RuntimeError(
                f"the merged model differs from base plus adapters: logits by {difference:.3g} at a scale of "
                f"{scale:.3g}, tolerance {TOLERANCE[config.dtype]:g}; nothing was written"
            )
        write_json(folder / "merge_proof.json", proof)
    return proof


def _copy_heads(stages: Sequence[Path], folder: Path) -> None:
    """Copy the task heads of the last stage that has any into `folder`, byte for byte; nothing where none has."""
    from medforge.models.heads import ABOUT_FILE, WEIGHTS_FILE, load_heads  # a module of torch's

    for stage in reversed(stages):
        if load_heads(stage) is not None:
            for name in (ABOUT_FILE, WEIGHTS_FILE):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(stage / name, folder / name)
            return


def _batch(base: Path, dataset: Path, config: ModelConfig) -> dict[str, Any]:
    data = Dataset.open(dataset, verify=False)  # `validate` and `train` have read it
    split = "validation" if "validation" in data.splits() else data.splits()[0]
    encoder = Encoder(base, config.min_pixels, config.max_pixels)
    samples = data.samples(split)[:PROOF_SAMPLES]
    batch = collate([encoder.encode(s, data.images(s)) for s in samples], encoder.image_id, encoder.pad_id)
    del batch["labels"]
    return batch


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    import torch

    with torch.inference_mode():
        logits = model.eval()(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
    return logits.float().cpu()[batch["attention_mask"].bool()]


def _unmerged(base: Path, adapters: list[Path], config: ModelConfig, batch: dict[str, Any]) -> Any:
    """The logits of the base with its adapters beside its weights, merged as little as can be.

    Adapters that add up stand beside the base all at once. One that does not (DoRA scales what is there; a stage that
    tuned layers themselves replaces them) needs the stages before it in place, so that only the last is left beside.
    """
    from peft import PeftModel

    if not all(_adds(path) for path in adapters):
        before, last = adapters[:-1], adapters[-1]
        if (last / FULL_WEIGHTS).is_file():
            return _logits(load_model(base, config.dtype, adapters), batch)
        return _logits(PeftModel.from_pretrained(load_model(base, config.dtype, before), str(last)), batch)
    names = [path.name for path in adapters]
    model = PeftModel.from_pretrained(load_model(base, config.dtype), str(adapters[0]), adapter_name=names[0])
    for path in adapters[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    model.base_model.set_adapter(names)
    return _logits(model, batch)


def _adds(adapter: Path) -> bool:
    """Whether a stage only adds to the weights, whatever they are."""
    return not (adapter / FULL_WEIGHTS).is_file() and not read_json(adapter / "adapter_config.json")["use_dora"]


def _compare(merged: Any, unmerged: Any) -> tuple[float, float, float]:
    difference = float((merged - unmerged).abs().max())
    agreement = float((merged.argmax(-1) == unmerged.argmax(-1)).double().mean())
    return difference, float(unmerged.abs().max()), agreement
