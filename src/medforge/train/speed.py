"""Which of the means to be fast are on for a stage, and why: what `medforge train --explain` prints."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforge.stages import StageConfig, Switch
from medforge.train.features import Kind

_GIGABYTE = 1e9
_FREE_SHARE = 0.5  # of the disk that is free: a cache must leave room for checkpoints
_MEMORY_SHARE = 0.6  # of the device's memory that activations may take before they are computed twice


@dataclass(frozen=True)
class Facts:
    """What the decisions rest on.

    `tuned` are the parts of the model with trainable layers (visual tower, visual merger, language). `visits` is how
    often the stage runs an image, `feature_bytes` what all its images' features take on disk, `activation_bytes` what
    a micro-batch's activations take, `memory_bytes` what the device has left for them.
    `in_step` tells that all processes have to run the same modules at the same time (ZeRO-3).
    """

    device: str
    dtype: str
    tower_tuned: bool
    merger_tuned: bool
    images: int
    visits: float
    feature_bytes: int
    activation_bytes: int
    memory_bytes: int
    disk_bytes: int
    questions_per_row: float
    in_step: bool = False


@dataclass(frozen=True)
class Decision:
    """One of them: its name in the configuration, whether it is on, and why."""

    name: str
    on: bool
    why: str


@dataclass(frozen=True)
class Speed:
    """The decisions in the form that training uses. `features` is what of the tower is frozen and run without
    gradients; `cache` whether it is kept."""

    share_prefix: bool
    features: Kind | None
    cache: bool
    answer_logits: bool
    length_buckets: bool
    packed: bool
    flex: bool
    checkpoint: bool
    fused: bool
    compile: bool
    decisions: tuple[Decision, ...]

    def explain(self) -> str:
        """A line a decision."""
        wide = max(len(decision.name) for decision in self.decisions)
        lines = (f"{d.name:<{wide}}  {'on ' if d.on else 'off'}  {d.why}" for d in self.decisions)
        return "\n".join(lines)


def decide(stage: StageConfig, facts: Facts) -> Speed:
    """The decisions for a stage. Raises ValueError for a switch that is `on` and cannot take effect."""
    speed, gpu = stage.speed, facts.device == "cuda"
    features: Kind | None = None if facts.tower_tuned else ("before" if facts.merger_tuned else "after")
    where = f"stage {stage.name!r}: speed"
    cache = _cache(stage, facts, features)
    packed = _switch(
        "packing", speed.packing, gpu, "rows end to end on a GPU", "no gain on a CPU, where masks are dense"
    )
    flex = _switch(
        "flex_attention",
        speed.flex_attention,
        gpu and packed.on,
        "blocks that nothing sees are skipped",
        "a dense mask: FlexAttention has no backward on a CPU, and serves packed rows",
    )
    if flex.on and not gpu:
        raise ValueError(f"{where}.flex_attention: on needs a GPU; set auto or off")
    if flex.on and not packed.on:
        raise ValueError(f"{where}.flex_attention: on needs packing; switch that on, or this off")
    liger = importlib.util.find_spec("liger_kernel") is not None
    fused = _switch(
        "fused_kernels",
        speed.fused_kernels,
        gpu and liger,
        "liger-kernel's norms and activations",
        _no_liger(gpu, liger),
    )
    if fused.on and not (gpu and liger):
        raise ValueError(f"{where}.fused_kernels: on, but {_no_liger(gpu, liger)}; set auto or off")
    heavy = facts.activation_bytes > _MEMORY_SHARE * facts.memory_bytes
    need = (
        f"activations of {stage.micro_tokens} tokens take {facts.activation_bytes / _GIGABYTE:.2f} GB of "
        f"{facts.memory_bytes / _GIGABYTE:.1f} GB"
    )
    checkpoint = _switch(
        "checkpoint_activations", speed.checkpoint_activations, heavy, f"{need}; never through the tower", need
    )
    compiled = _switch(
        "compile", speed.compile, gpu and (stage.steps or 0) > 500, "a long run on a GPU", "as configured"
    )
    plain = (
        Decision("share_prefix", speed.share_prefix, f"{facts.questions_per_row:.1f} samples share an image's row"),
        Decision("answer_logits", speed.answer_logits, "logits at answer positions only"),
        Decision("length_buckets", speed.length_buckets, "rows of like length stand together"),
        Decision("bfloat16", facts.dtype == "bfloat16", f"model.dtype is {facts.dtype}"),
    )
    return Speed(
        speed.share_prefix,
        features,
        cache.on,
        speed.answer_logits,
        speed.length_buckets,
        packed.on,
        flex.on,
        checkpoint.on,
        fused.on,
        compiled.on,
        (plain[0], cache, *plain[1:3], packed, flex, checkpoint, plain[3], fused, compiled),
    )


def _no_liger(gpu: bool, liger: bool) -> str:
    return "they are kernels for GPUs" if not gpu else "liger-kernel is not installed" if not liger else "installed"


def _switch(name: str, setting: Switch, auto: bool, why_on: str, why_off: str) -> Decision:
    on = auto if setting == "auto" else setting == "on"
    forced = "" if setting == "auto" else f"set to {setting}; "
    return Decision(name, on, forced + (why_on if on else why_off))


def _cache(stage: StageConfig, facts: Facts, features: Kind | None) -> Decision:
    name, setting = "cache_features", stage.speed.cache_features
    if features is None:
        if setting == "on":
            raise ValueError(
                f"stage {stage.name!r}: speed.cache_features: on, but the stage tunes the vision tower, whose features "
                "then change with every step; set auto or off"
            )
        return Decision(name, False, "the stage tunes the vision tower")
    if facts.in_step:
        if setting == "on":
            raise ValueError(
                f"stage {stage.name!r}: speed.cache_features: on, but with strategy zero3 every process has to run the "
                "tower whenever one does; set auto or off, or choose zero2"
            )
        return Decision(name, False, "with ZeRO-3 every process runs the tower whenever one does")
    limit = min(stage.speed.cache_gigabytes * _GIGABYTE, _FREE_SHARE * facts.disk_bytes)
    size = (
        f"{facts.images} images, each run {facts.visits:.1f} times; {facts.feature_bytes / _GIGABYTE:.3g} GB "
        f"{features} the merger, {limit / _GIGABYTE:.3g} GB allowed"
    )
    if setting != "auto":
        return Decision(name, setting == "on", f"set to {setting}; {size}")
    if facts.visits < 2:
        return Decision(name, False, f"{size}: too seldom to pay for the writing")
    if facts.feature_bytes > limit:
        return Decision(name, False, f"{size}: too large")
    return Decision(name, bool(facts.images), size)


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory(device: Any) -> int:
    """Bytes of memory that are free on the device, or on this machine."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def activation_bytes(text: Any, tokens: int, itemsize: int) -> int:
    """What the decoder layers keep of `tokens` for the backward pass, in bytes.

    A layer keeps about ten tensors of its width (norms, queries, keys, values, attention, residuals) and four of the
    MLP's inner width, a token.
    """
    return int(text.num_hidden_layers * tokens * itemsize * (10 * text.hidden_size + 4 * text.intermediate_size))


def checkpoint_language(layers: Iterable[Any]) -> None:
    """Let the decoder layers compute their activations twice. The tower is left alone: it is frozen or small."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def use_flex(model: Any) -> None:
    """Set the language model to FlexAttention; the tower, whose attention is dense, stays as it is."""
    # transformers 5.23 marks the text models of Qwen-VL as unable, though they attend by the common interface
    model.model.language_model._supports_flex_attn = True
    model.set_attn_implementation({"text_config": "flex_attention", "vision_config": "sdpa"})


def fuse(model: Any, family: str) -> None:
    """Put liger-kernel's norms and activations in place of the model's own."""
    from liger_kernel import transformers as liger

    names = {"qwen2-vl": "qwen2_vl", "qwen2.5-vl": "qwen2_5_vl", "qwen3-vl": "qwen3_vl"}
    apply = getattr(liger, f"apply_liger_kernel_to_{names[family]}")
    # the loss is ours already (answers only); M-RoPE stays the model's own
    apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
