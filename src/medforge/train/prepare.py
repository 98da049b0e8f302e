"""From a job to what is trained: samples, their order, the means to be fast, the model with its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforge.dataset import Dataset
from medforge.models.encode import Encoder
from medforge.models.families import family_of, lora_targets
from medforge.models.load import load_model
from medforge.train.adapters import attach, kinds
from medforge.train.data import Samples, select
from medforge.train.features import FeatureCache, Features, tower_digest
from medforge.train.job import Job
from medforge.train.plan import Plan
from medforge.train.speed import (
    Facts,
    Speed,
    activation_bytes,
    checkpoint_language,
    decide,
    free_disk,
    free_memory,
    fuse,
    use_flex,
)


@dataclass(frozen=True)
class Material:
    """The samples of a job and the order in which they are taken."""

    data_digest: str
    encoder: Encoder
    train: Samples
    held_out: Samples
    plan: Plan


def read(job: Job) -> Material:
    """Open the data set and choose the stage's samples.

    Raises ValueError when there are none, a view holds none, or no validation sample bears the figure of `best_by`.
    """
    from medforge.train.validation import figures

    dataset = Dataset.open(job.dataset)
    encoder = Encoder(job.base, job.model.min_pixels, job.max_pixels)
    chosen, weights = select(dataset, "train", job.stage, job.seed)
    held_out, _ = select(dataset, "validation", job.stage, job.seed)
    given = figures(job.stage, held_out, job.seed)
    if held_out and job.stage.best_by not in given:
        raise ValueError(
            f"stage {job.stage.name!r}: best_by is {job.stage.best_by}, which its {len(held_out)} validation samples "
            f"do not bear; they give {', '.join(given)}: choose one of these, or raise validation_samples or "
            "generate_samples"
        )
    train = Samples(dataset, chosen, encoder)
    groups = [train.images(index) or (sample.id,) for index, sample in enumerate(chosen)]
    plan = Plan(job.stage, groups, weights, job.seed, lambda index: train.item(index).encoded.length)
    return Material(dataset.digest, encoder, train, Samples(dataset, held_out, encoder), plan)


def decisions(job: Job, material: Material, model: Any, device: Any) -> Speed:
    """The means to be fast, for a model whose weights may be anywhere (or on no device at all)."""
    targets = lora_targets(model, family_of(job.base), job.stage.tune)
    visual = [name for name in targets if ".visual." in f".{name}"]
    config, plan = model.config, material.plan
    merge = material.encoder.image_processor.merge_size
    merger_tuned = any("merger" in name for name in visual)
    refs = {ref.sha256: ref for sample in material.train.samples for ref in sample.images}
    some = list(refs.values())[:: max(1, len(refs) // 256)]  # sizes of a sample of the images
    patches = material.encoder.measure(some).grid.prod(axis=1).mean() if some else 0.0
    levels = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or [])
    width = _tower_width(config.vision_config) if merger_tuned else config.text_config.hidden_size / merge**2
    itemsize = 2 if job.model.dtype == "bfloat16" else 4
    rows = plan.rows_in_epoch() if job.stage.speed.share_prefix else plan.epoch_size
    facts = Facts(
        device=device.type,
        dtype=job.model.dtype,
        tower_tuned=any("merger" not in name for name in visual),
        merger_tuned=merger_tuned,
        images=len(refs),
        visits=plan.taken / plan.epoch_size * rows / max(1, len(refs)),
        feature_bytes=int(len(refs) * patches * width * levels * itemsize),
        activation_bytes=activation_bytes(config.text_config, job.stage.micro_tokens, itemsize),
        memory_bytes=free_memory(device),
        disk_bytes=free_disk(job.features),
        in_step=job.parallel.strategy == "zero3" and job.parallel.world > 1,
        questions_per_row=plan.epoch_size / max(1, rows),
    )
    return decide(job.stage, facts)


def _tower_width(vision: Any) -> int:
    """Qwen2-VL calls the width of its tower embed_dim, and the language model's hidden_size."""
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)


def explain(job: Job) -> str:
    """What `--explain` prints: the stage's size, and each decision with its reason. No weights are read."""
    import torch
    import transformers

    material = read(job)
    family = family_of(job.base)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(str(job.base))
        model = getattr(transformers, family.model_class)(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = decisions(job, material, model, device)
    targets = lora_targets(model, family, job.stage.tune)
    plan = material.plan
    head = (
        f"stage {job.stage.name}: {len(material.train)} training and {len(material.held_out)} validation samples, "
        f"{plan.steps} steps of {plan.taken / plan.steps:.1f} samples ({plan.taken / plan.epoch_size:.2f} epochs), "
        f"{job.stage.method} on {len(targets)} layers, {job.parallel.world} x {device.type}"
    )
    return f"{head}\n{speed.explain()}"


def build(job: Job, material: Material, device: Any) -> tuple[Any, dict[str, str], Speed]:
    """The trainee on the CPU or wherever the model was loaded, its tuned layers, and the decisions.

    Random weights (adapters, heads) come from the seed that the caller has set.
    """
    from medforge.models.tower import Tower
    from medforge.train.trainee import Trainee

    family, stage = family_of(job.base), job.stage
    # ZeRO-3 takes the weights to the device a shard at a time: the whole may not fit
    sharded = job.parallel.strategy == "zero3" and job.parallel.world > 1
    model = load_model(job.base, job.model.dtype, job.before, device="cpu" if sharded else None)
    speed = decisions(job, material, model, device)
    if speed.fused:
        fuse(model, family.name)
    if speed.flex:
        use_flex(model)
    # before the adapters, which would be part of the digest
    digest = tower_digest(model, speed.features) if speed.cache and speed.features else ""
    model, targets = attach(model, family, stage)
    stock = model.base_model.model if stage.method == "lora" else model
    layers = stock.model.language_model.layers
    if speed.checkpoint:
        checkpoint_language(layers)
    if speed.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    cache = FeatureCache(job.features, digest) if speed.cache else None
    features = Features(Tower(stock), speed.features, cache)
    heads = _heads(job, stock.config.text_config.hidden_size)
    dtype = job.model.dtype
    trainee = Trainee(model, heads, features, stage.heads, dtype, device, speed.answer_logits, speed.flex)
    trainee.in_step = sharded
    trainee.train()
    return trainee, targets, speed


def _heads(job: Job, hidden: int) -> Any:
    """The stage's heads: those of the stages before, where there are any, else new ones."""
    config = job.stage.heads
    if config is None:
        return None
    from medforge.models.heads import TaskHeads, load_heads

    for folder in reversed(job.before):
        if (earlier := load_heads(folder)) is not None:
            if kinds(earlier) != (config.region, config.match):
                raise ValueError(
                    f"stage {job.stage.name!r}: heads: {folder} has (region, match) = {kinds(earlier)}; a later stage "
                    "goes on with the same heads"
                )
            return earlier
    return TaskHeads(hidden, config.region, config.match)


def feature_folder(work: Path) -> Path:
    """Where features are kept: with the finished steps, where there is a workspace, so that later runs find them."""
    import os

    workspace = os.environ.get("MEDFORGE_WORKSPACE")
    return Path(workspace) / "features" if workspace else work / "features"
