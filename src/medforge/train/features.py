"""What the frozen part of the vision tower says of an image, computed once and kept on disk.

A file a image, named by what decides its content: the tower's weights, the image, its grid and the precision. Files
are written under a temporary name and renamed, so that several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medforge.models.rows import Batch
from medforge.models.tower import Levels, Tower
from medforge.train.data import Recent

if TYPE_CHECKING:
    import torch

if TYPE_CHECKING:
    pass

Kind = Literal["before", "after"]
_MEMORY_BYTES = 2 << 30


def tower_digest(model: Any, kind: Kind) -> str:
    """The SHA-256 of the weights that decide the features: the tower's, and its mergers' for features after them."""
    import torch

    digest = hashlib.sha256(kind.encode())
    for name, tensor in sorted(model.model.visual.state_dict().items()):
        if kind == "after" or "merger" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Levels of images by content, in memory for recent ones and on disk for all."""

    def __init__(self, folder: Path, tower: str) -> None:
        self.folder = folder / tower[:24]
        self._recent: Recent[str, Levels] = Recent(_MEMORY_BYTES, lambda levels: sum(t.nbytes for t in levels))
        self.full = False

    def get(self, image: str, grid: Sequence[int]) -> Levels | None:
        """The levels of an image on the CPU, or None where they are not kept."""
        key = _key(image, grid)
        if (held := self._recent.peek(key)) is not None:
            return held
        path = self._path(key)
        if not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)  # damaged: computed again
            return None
        levels = [found[name] for name in sorted(found)]
        self._recent.put(key, levels)
        return levels

    def put(self, image: str, grid: Sequence[int], levels: Levels) -> None:
        """Keep the levels of an image. A full disk only ends the writing: what is missing is computed each time."""
        from safetensors.torch import save_file

        key = _key(image, grid)
        kept = [level.detach().to("cpu", copy=True).contiguous() for level in levels]
        self._recent.put(key, kept)
        if self.full:
            return
        path = self._path(key)
        work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({f"{number:02d}": level for number, level in enumerate(kept)}, work)
            os.replace(work, path)
        except Exception as error:  # safetensors wraps the operating system's error
            work.unlink(missing_ok=True)
            if "space" not in str(error).lower() and "quota" not in str(error).lower():
                raise
            self.full = True
            print(f"{self.folder}: no space for more features; the tower runs for images that are not kept", flush=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _key(image: str, grid: Sequence[int]) -> str:
    return f"{image}-{'x'.join(str(int(value)) for value in grid)}"


@dataclass(frozen=True)
class Ready:
    """What a batch needs of its images, made ahead of the step: levels that are kept, pixels of the others."""

    levels: dict[str, Levels]
    pixels: dict[str, np.ndarray]


class Features:
    """Image features for batches, however much of the tower is tuned.

    `kind` is what is frozen and may be kept: nothing (None: the whole tower takes part in training), all before the
    mergers, or all of it.
    """

    def __init__(self, tower: Tower, kind: Kind | None, cache: FeatureCache | None) -> None:
        assert cache is None or kind is not None
        self.tower, self.kind, self.cache = tower, kind, cache

    def nothing(self, device: Any) -> torch.Tensor:
        """Zero (a scalar), by a run of the tower over a black image: with ZeRO-3, where another process's batch has
        images and this one's has none, both have to run the same modules, forward and backward."""
        import torch

        side = self.tower.visual.spatial_merge_size
        grid = torch.tensor([[1, side, side]], device=device)
        values = torch.zeros(side * side, self.tower.patch_width, device=device)
        with torch.set_grad_enabled(self.kind is None and torch.is_grad_enabled()):
            made = (self.tower.before if self.kind == "before" else self.tower.after)(values, grid)
        levels = self.tower.merge(made) if self.kind == "before" else made
        return sum((level.sum() * 0.0 for parts in levels for level in parts), start=torch.zeros((), device=device))

    def ready(self, batch: Batch, pixels: Callable[[str], np.ndarray]) -> Ready:
        """What can be done ahead, in another thread: reading what is kept, decoding what is not."""
        levels, seen = {}, {}
        for image, grid in zip(batch.images, batch.grid.tolist(), strict=True):
            held = self.cache.get(image, grid) if self.cache else None
            if held is None:
                seen[image] = pixels(image)
            else:
                levels[image] = held
        return Ready(levels, seen)

    def levels(self, batch: Batch, ready: Ready, device: Any) -> list[Levels]:
        """The levels after the merger, for each image of the batch. Gradients flow as far as the tower is tuned."""
        import torch

        if not batch.images:
            return []
        grids = dict(zip(batch.images, batch.grid, strict=True))
        if self.cache is None:
            # no cache: the tower sees each row's images, as the stock models do
            order, grid = list(batch.images), batch.grid
        else:
            order = [image for image in grids if image not in ready.levels]
            grid = torch.stack([grids[image] for image in order]) if order else batch.grid[:0]
        found = {image: [level.to(device) for level in held] for image, held in ready.levels.items()}
        made: list[Levels] = []
        if order:
            values = torch.from_numpy(np.concatenate([ready.pixels[image] for image in order])).to(device)
            with torch.set_grad_enabled(self.kind is None and torch.is_grad_enabled()):
                made = (self.tower.before if self.kind == "before" else self.tower.after)(values, grid.to(device))
        if self.cache is not None:
            for image, levels in zip(order, made, strict=True):
                found[image] = levels
                self.cache.put(image, grids[image].tolist(), levels)
            made = [found[image] for image in batch.images]
        return self.tower.merge(made) if self.kind == "before" else made
