"""Starts a peer inside its own environment, where MedForge is not installed: python launch.py PEER SETTINGS.json.

The settings are the peer's own, as its command line takes them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path


def main() -> None:
    """Train as the settings say."""
    peer, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    mend_torch_companions()
    if peer == "llamafactory":
        from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]

        run_exp(settings)
    else:
        from swift.pipelines import sft_main  # type: ignore[import-not-found]

        tell_ids(Path(settings["model"]))
        sft_main([part for name, value in settings.items() for part in (f"--{name}", *as_text(value))])


def as_text(value: object) -> list[str]:
    """A setting as arguments of a command line."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def tell_ids(model: Path) -> None:
    """Give ms-swift, which has the ids of Qwen's own vocabulary in its source, those of the model in the folder."""
    from swift.template.templates.qwen import Qwen2VLTemplate  # type: ignore[import-not-found]

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    Qwen2VLTemplate.image_token_id = config["image_token_id"]
    Qwen2VLTemplate.video_token_id = config["video_token_id"]


def mend_torch_companions() -> None:
    """Let torchvision and torchaudio be imported beside a torch without CUDA, for which PyPI has no build of them.

    What is trained here uses neither's compiled part: torchvision describes operators that are then missing, and
    torchaudio is imported for audio, of which there is none.
    """
    if broken("torchvision", "_C.so"):
        name = "torchvision._meta_registrations"
        sys.modules[name] = types.ModuleType(name)
    if broken("torchaudio", "lib/_torchaudio.abi3.so"):
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.util.find_spec("torchaudio")
        sys.modules["torchaudio"] = module


def broken(package: str, library: str) -> bool:
    """Whether a package's compiled part is there but cannot be loaded."""
    import torch

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    path = Path(spec.submodule_search_locations[0]) / library
    try:
        torch.ops.load_library(str(path))
    except OSError:
        return path.exists()
    return False


if __name__ == "__main__":
    main()
