"""The vision tower, apart from the language model: what it says of an image, before or after its merger.

*Before* is the tower's last hidden state (and, in Qwen3-VL, those that DeepStack taps), one tensor of [patches, tower
width] each: what a stage that tunes only the merger may keep. *After* is what the language model reads, [image
tokens, language width] each. Both are in the image's own order, whatever windows the tower works in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Levels = list["torch.Tensor"]  # the image's embedding first, then one for each DeepStack layer


class Tower:
    """The vision tower of a loaded Qwen-VL."""

    def __init__(self, model: Any) -> None:
        self.visual = model.model.visual
        self.mergers = [self.visual.merger, *getattr(self.visual, "deepstack_merger_list", [])]
        self.unit = self.visual.spatial_merge_size**2
        config = self.visual.config
        channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
        self.patch_width = channels * config.temporal_patch_size * config.patch_size**2

    def before(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> list[Levels]:
        """For each image its levels before the mergers. The mergers run along; their output is dropped."""
        inputs: list[torch.Tensor] = []
        hooks = [merger.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for merger in self.mergers]
        import torch

        # a dropout in the mergers must not draw: what is drawn later would depend on which images are kept already
        devices = [pixel_values.device] if pixel_values.is_cuda else []
        try:
            with torch.random.fork_rng(devices):
                self._run(pixel_values, grid)
        finally:
            for hook in hooks:
                hook.remove()
        # the last merger to run is the embedding's; DeepStack's have run before it, in their order
        levels = [self._in_order(level, grid) for level in (inputs[-1], *inputs[:-1])]
        return _by_image(levels, grid.prod(-1).tolist())

    def after(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> list[Levels]:
        """For each image its levels after the mergers."""
        output = self._run(pixel_values, grid)
        levels = [output.pooler_output, *getattr(output, "deepstack_features", [])]
        return _by_image(levels, (grid.prod(-1) // self.unit).tolist())

    def merge(self, before: Sequence[Levels]) -> list[Levels]:
        """What `after` gives, from what `before` gave."""
        import torch

        counts = [len(levels[0]) // self.unit for levels in before]
        merged = [
            merger(torch.cat([levels[number] for levels in before])) for number, merger in enumerate(self.mergers)
        ]
        return _by_image(merged, counts)

    def _run(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> Any:
        return self.visual(pixel_values.to(self.visual.dtype), grid_thw=grid, return_dict=True)

    def _in_order(self, hidden: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Qwen2.5-VL's tower works in windows and puts the order right only after its merger: here before it."""
        if not hasattr(self.visual, "window_size"):
            return hidden
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        window, _ = get_vision_window_index(
            grid,
            spatial_merge_size=self.visual.spatial_merge_size,
            window_size=self.visual.window_size,
            patch_size=self.visual.patch_size,
        )
        groups = hidden.view(len(hidden) // self.unit, self.unit, -1)
        return groups[window.argsort()].view(len(hidden), -1)


def _by_image(levels: Sequence[torch.Tensor], counts: Sequence[int]) -> list[Levels]:
    return [list(parts) for parts in zip(*(level.split(list(counts)) for level in levels), strict=True)]
