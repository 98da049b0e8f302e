"""Models from folders: the base from wherever it is, and the base with the adapters of its stages.

The adapters of a run are a stack: one folder that holds `01-<stage>`, `02-<stage>`, …, each a peft adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medforge.config import ModelConfig
from medforge.files import link_tree
from medforge.models.families import family_of

FULL_WEIGHTS = "weights.safetensors"  # of a stage that tuned layers themselves
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.pt")


def import_base(config: ModelConfig, out: Path, download: Callable[[str, Path], None]) -> None:
    """Put the base model in the folder `out`: built, linked, fetched by `download(url, out)`, or from the hub.

    Raises ValueError when it cannot be found, or is no Qwen-VL.
    """
    if config.base.startswith("tiny:"):
        from medforge.models.tiny import build

        build(out, config.base.removeprefix("tiny:"), config.tiny)
    elif config.base.startswith("s3://"):
        download(config.base, out)
    elif (folder := Path(config.base).expanduser()).is_dir():
        family_of(folder)
        link_tree(folder, out)
    elif config.base.startswith((".", "/", "~")):
        raise ValueError(f"model.base: no folder is at {config.base}")
    else:
        _from_hub(config, out)
    family_of(out)


def _from_hub(config: ModelConfig, out: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from medforge.files import new_folder

    try:
        with new_folder(out) as work:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
            snapshot_download(config.base, revision=config.revision, local_dir=work, allow_patterns=patterns)
            shutil.rmtree(work / ".cache", ignore_errors=True)  # the hub's notes hold times: the digest would differ
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.base: {config.base!r} is no local folder, and the hub did not give it (revision "
            f"{config.revision!r}): {reason}. Check the name, log in with `hf auth login` for a gated model, or name a "
            "folder or an s3:// prefix"
        ) from None


def stack(folder: Path | None) -> list[Path]:
    """The adapters of a stack in the order in which they were trained; none for None.

    Raises ValueError when there is no such folder.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a stack of adapters, as `medforge train` writes it, is expected")
    return sorted(path.parent for name in ("adapter_config.json", FULL_WEIGHTS) for path in folder.glob(f"*/{name}"))


def load_model(folder: Path, dtype: str, adapters: Sequence[Path] = (), device: str | None = None) -> Any:
    """The model of `folder` in `dtype` with `adapters` merged into its weights in their order.

    It is put on `device`: on the GPU where there is one, if none is named.

    Raises ValueError when the folder is no Qwen-VL model or its weights are broken.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    family = family_of(folder)
    try:
        model, found = getattr(transformers, family.model_class).from_pretrained(
            str(folder), dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model cannot be loaded: {str(error).splitlines()[0]}") from None
    if found["missing_keys"]:  # transformers would go on with random weights in their place
        lost = sorted(found["missing_keys"])
        raise ValueError(f"{folder}: the model cannot be loaded: {len(lost)} weights are missing; first: {lost[0]}")
    for adapter in adapters:
        model = _apply(model, adapter)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _apply(model: Any, adapter: Path) -> Any:
    """The model with one stage's adapter merged, or with the layers that the stage tuned put in place."""
    if not (adapter / FULL_WEIGHTS).is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / FULL_WEIGHTS
    try:
        weights = {name: tensor.to(model.dtype) for name, tensor in load_file(path).items()}
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: the weights cannot be loaded: {' '.join(str(error).split())}") from None
    if unknown:
        raise ValueError(f"{path}: holds {unknown[0]}, which the model does not have")
    return model
