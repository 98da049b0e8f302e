"""How fast a stage goes: samples, tokens and floating-point operations a second, memory, and the time that is left."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medforge.models.rows import PADDING, Batch

# dense peak in FLOP/s by words of the device's name: (bfloat16, float32); from the makers' data sheets
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("B200", 2250e12, 75e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("A10", 125e12, 31.2e12),
)


@dataclass(frozen=True)
class Size:
    """What decides a model's arithmetic: parameters of each part, and the shape of attention."""

    language: int
    tower: int
    head: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: Any) -> Size:
        """The size of a stock Qwen-VL. Embedding tables do no arithmetic and are left out."""
        count = {"language": 0, "tower": 0}
        for name, parameter in model.named_parameters():
            if "lora_" in name or "embed_tokens" in name or name.startswith("lm_head"):
                continue
            count["tower" if ".visual." in f".{name}" else "language"] += _elements(parameter)
        text = model.config.text_config
        head = text.hidden_size * text.vocab_size
        return cls(count["language"], count["tower"], head, text.num_hidden_layers, text.hidden_size)


def _elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves empty shells


def flops(size: Size, batch: Batch, tower_patches: int, full: bool) -> float:
    """Floating-point operations that a micro-batch needs, forward and backward.

    2 a parameter and token forward and 2 backward through frozen weights, 2 more where the weights themselves are
    tuned (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); attention 4 · pairs · width a layer forward and twice
    that backward; logits at answers only; the frozen tower forward only. What is recomputed or masked is not counted.
    """
    tokens, answers = batch.real_tokens, len(batch.targets)
    each = 6 if full else 4
    return float(
        each * size.language * tokens
        + 12 * size.layers * size.width * _pairs(batch)
        + 4 * size.head * answers
        + 2 * size.tower * tower_patches
    )


def _pairs(batch: Batch) -> int:
    """Pairs of a token and a token that it sees."""
    import numpy as np

    lines = np.broadcast_to(np.arange(len(batch.rows))[:, None], batch.rows.shape)
    names = np.stack([lines, batch.rows.cpu().numpy(), batch.segments.cpu().numpy()], axis=-1).reshape(-1, 3)
    found, counts = np.unique(names[names[:, 2] != PADDING], axis=0, return_counts=True)
    prefix = {
        (line, row): int(n) for (line, row, segment), n in zip(found.tolist(), counts, strict=True) if not segment
    }
    branches = sum(
        int(n) * prefix.get((line, row), 0) for (line, row, s), n in zip(found.tolist(), counts, strict=True) if s
    )
    return int((counts * (counts + 1) // 2).sum()) + branches


def device_peak(device: Any, dtype: str) -> float:
    """The device's peak in FLOP/s: from the maker's table, or measured by a matrix product (CPU, unknown cards)."""
    import torch

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bfloat16, float32 in _PEAKS:
            if re.search(rf"\b{part}\b", name):  # an L40 is no L4
                return bfloat16 if dtype == "bfloat16" else float32
    side = 8192 if device.type == "cuda" else 1024
    one = torch.ones(side, side, dtype=kind, device=device)
    best = 0.0
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        _ = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def peak_memory(device: Any) -> int:
    """The most memory held so far, in bytes: of the device, or resident memory of this process on a CPU."""
    import resource
    import sys

    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class Meter:
    """Counts work and time since the last reading; `read` gives rates and starts anew."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.seconds = 0.0
        self._counts: dict[str, float] = {}
        self._started = time.perf_counter()
        self._idle = 0.0

    def add(self, counts: Mapping[str, float]) -> None:
        """Count work that is done."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training, such as validation."""
        self._idle += seconds

    def read(self, devices: int) -> dict[str, float]:
        """Rates since the last reading. `mfu` is the share of the peak of all devices, 0–1."""
        now = time.perf_counter()
        spent = max(1e-9, now - self._started - self._idle)
        self.seconds += spent
        rates = {f"{name}_per_second": value / spent for name, value in self._counts.items() if name != "flops"}
        rates["mfu"] = self._counts.get("flops", 0.0) / spent / (self.peak * devices)
        self._counts, self._started, self._idle = {}, now, 0.0
        return rates


def counts_of(batches: Iterable[Batch]) -> dict[str, float]:
    """Image and text tokens that were run, and the tokens that the same samples would have taken alone."""
    found = {"image_tokens": 0.0, "text_tokens": 0.0, "sample_tokens": 0.0}
    for batch in batches:
        images = float(batch.image_mask.sum())
        found["image_tokens"] += images
        found["text_tokens"] += batch.real_tokens - images
        found["sample_tokens"] += sum(item.encoded.length for item in batch.items)
    return found
