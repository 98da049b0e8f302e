"""StageConfig: what one stage of fine-tuning tunes, on which samples, how fast, and how it is watched."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

NAME = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
PARTS = ("vision_merger", "vision_tower", "language_attention", "language_mlp")
REGEX = "re:"
HEADS = "heads"
# YAML reads a bare on and off as true and false
Switch = Annotated[
    Literal["auto", "on", "off"], BeforeValidator(lambda v: {True: "on", False: "off"}[v] if isinstance(v, bool) else v)
]
Metric = Literal["loss", "accuracy", "closed_accuracy", "open_accuracy", "region_iou", "match_auroc"]

# What a preset sets where the stage says nothing. Rates follow LLaVA's two stages (Liu et al. 2023, arXiv 2304.08485).
PRESETS: dict[str, dict[str, Any]] = {
    "concept-alignment": {"tune": ["vision_merger"], "learning_rate": 1e-3, "epochs": 1, "batch_size": 64},
    "instruction": {"tune": ["language_attention", "language_mlp"], "learning_rate": 1e-4, "epochs": 3},
    "grounding": {
        "tune": ["vision_merger", "language_attention", "language_mlp"],
        "learning_rate": 1e-4,
        "epochs": 3,
        "mix": [{"boxes": True}],
        "heads": {},
    },
    "reasoning": {
        "tune": ["language_attention", "language_mlp"],
        "learning_rate": 5e-5,
        "epochs": 2,
        "lora": {"r": 64, "alpha": 64, "rslora": True},
        "mix": [{"answer_types": ["open"]}, {"answer_types": ["closed"], "weight": 0.25}],
    },
    "refusal-aware": {
        "tune": ["language_attention", "language_mlp"],
        "learning_rate": 5e-5,
        "epochs": 1,
        "refusals": {"share": 0.2},
    },
    "report": {
        "tune": ["language_attention", "language_mlp"],
        "learning_rate": 1e-4,
        "epochs": 3,
        "batch_size": 16,
        "max_pixels": 1024 * 1024,
        "mix": [{"min_answer_words": 20}],
    },
}


class Section(BaseModel):
    """A part of the configuration: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is B A alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).")
    dora: bool = Field(False, description="Magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).")


class ViewConfig(Section):
    """A view of the training samples: those that meet every condition that is given."""

    answer_types: list[Literal["open", "closed"]] = Field([], description="Only these answer types.")
    question_types: list[str] = Field([], description="Only these question types.")
    languages: list[str] = Field([], description="Only these languages.")
    boxes: bool | None = Field(None, description="Only samples with boxes, or only those without.")
    min_answer_words: int = Field(0, ge=0, description="Only answers of at least so many words, such as reports.")
    weight: float = Field(1.0, gt=0, description="How often an epoch takes each sample; 0.25 draws a quarter anew.")


class RefusalConfig(Section):
    """Questions asked of an image that shows nothing: the model learns to say so instead of guessing."""

    share: float = Field(0.2, gt=0, lt=1, description="Added samples, as a share of the view's.")
    answer: str = Field("This cannot be told from the image.", min_length=1, description="What it should answer.")
    answer_zh: str = Field("无法从图像中判断。", min_length=1, description="The same for questions in Chinese.")


class VerificationConfig(Section):
    """Questions whether a proposed answer fits the image: a model without a match head learns to verify in words."""

    share: float = Field(0.25, gt=0, le=2, description="Added questions, as a share of the view's samples; half fit.")


class HeadsConfig(Section):
    """The multi-task model: a region head and a match head beside the language loss."""

    region: bool = Field(True, description="Find the box of samples that have one (locate).")
    match: bool = Field(True, description="Judge whether a proposed answer fits the image (verify).")
    weighting: Literal["uncertainty", "fixed"] = Field(
        "uncertainty", description="Learned weights (Kendall, Gal, Cipolla 2018, arXiv 1705.07115), or the fixed ones."
    )
    weights: dict[Literal["language", "region", "match"], Annotated[float, Field(ge=0)]] = Field(
        {}, description="Of `fixed`; 1 if not named."
    )
    missed_weight: float = Field(10.0, ge=1, description="Weight of a missed match over a false alarm.")
    gamma: float = Field(2.0, ge=0, description="Focusing parameter of the focal loss (arXiv 1708.02002).")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of the heads and of the weights.")

    @model_validator(mode="after")
    def _does_something(self) -> HeadsConfig:
        if not (self.region or self.match):
            raise ValueError("heads: neither region nor match is on; leave the section out")
        if self.weights and self.weighting != "fixed":
            raise ValueError("heads.weights: has no effect with learned weights; set weighting: fixed, or leave it out")
        return self


class SpeedConfig(Section):
    """What makes training fast. Each can be switched off; none changes loss or gradients beyond rounding."""

    share_prefix: bool = Field(True, description="Questions of one image share one run of it.")
    questions_per_image: int = Field(
        8, ge=1, description="An epoch takes at most so many questions of an image in a row; 1 shuffles plainly."
    )
    cache_features: Switch = Field("auto", description="Keep what the frozen vision tower says of each image.")
    cache_gigabytes: float = Field(20.0, gt=0, description="`auto` caches no more than this on disk.")
    answer_logits: bool = Field(True, description="Logits at answer positions only.")
    length_buckets: bool = Field(True, description="Rows of like length together, so that little is padding.")
    packing: Switch = Field("auto", description="All rows in one sequence without padding; `auto` on a GPU.")
    flex_attention: Switch = Field("auto", description="FlexAttention for the block mask; `auto` on a GPU.")
    checkpoint_activations: Switch = Field("auto", description="Compute activations twice to save memory.")
    fused_kernels: Switch = Field("auto", description="liger-kernel's norms and loss; `auto` on a GPU that has it.")
    compile: Switch = Field("auto", description="torch.compile of the decoder layers; `auto` for long runs on a GPU.")
    workers: int = Field(2, ge=0, description="Threads that decode and encode ahead of the training step.")

    @model_validator(mode="after")
    def _flex_needs_packing(self) -> SpeedConfig:
        if self.flex_attention == "on" and self.packing == "off":
            raise ValueError("speed.flex_attention: has no effect with packing: off")
        return self


class StageConfig(Section):
    """One stage of fine-tuning. It starts from the base plus the adapters of the stages before it."""

    name: str = Field(pattern=NAME, description="Lower-case name of the stage and of its adapter's folder.")
    preset: str | None = Field(None, description=f"Sets what the stage leaves out: {', '.join(PRESETS)}.")
    tune: list[str] = Field(
        min_length=1, description=f"What is tuned: {', '.join(PARTS)}, or re:<regular expression of layer names>."
    )
    method: Literal["lora", "full"] = Field("lora", description="Adapters, or the layers' own weights.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Rank, scale and dropout.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Another peak learning rate for an entry of `tune`."
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training samples; give this or `steps`.")
    samples: int | None = Field(None, ge=1, description="Use only this many training samples, chosen by the seed.")
    mix: list[ViewConfig] = Field([], description="Views of the training samples, each with its weight; empty: all.")
    refusals: RefusalConfig | None = Field(None, description="Adds questions that the image cannot answer.")
    verifications: VerificationConfig | None = Field(
        None, description="Adds questions whether an answer fits, with right and with wrong answers."
    )
    max_pixels: int | None = Field(None, ge=1, description="Other than the model's `max_pixels` in this stage.")
    batch_size: int = Field(32, ge=1, description="Samples in an optimizer step, over all devices.")
    batch_tokens: int | None = Field(None, ge=16, description="Tokens in an optimizer step instead of samples.")
    micro_tokens: int = Field(8192, ge=16, description="Tokens a device holds at once; lower it to save memory.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    heads: HeadsConfig | None = Field(None, description="Region and match heads; without it only language is learned.")
    evaluate_every: int = Field(50, ge=1, description="Steps between validations.")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; as `evaluate_every`.")
    validation_samples: int = Field(128, ge=1, description="At most so many validation samples are scored.")
    generate_samples: int = Field(32, ge=0, description="Of these, so many are answered by generation.")
    max_new_tokens: int = Field(32, ge=1, description="Longest answer in validation, in tokens.")
    best_by: Metric = Field("loss", description="The validation figure that names the best checkpoint.")
    patience: int | None = Field(None, ge=1, description="Stop after so many validations without a better figure.")
    speed: SpeedConfig = Field(default_factory=SpeedConfig, description="What makes training fast.")

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        if values["preset"] not in PRESETS:
            raise ValueError(f"preset {values['preset']!r} is not one of {', '.join(PRESETS)}")
        preset = dict(PRESETS[values["preset"]])
        if values.get("steps") is not None:
            preset.pop("epochs", None)
        if values.get("batch_tokens") is not None:
            preset.pop("batch_size", None)
        return preset | values

    @field_validator("tune")
    @classmethod
    def _known_parts(cls, parts: list[str]) -> list[str]:
        for part in parts:
            if part.startswith(REGEX):
                try:
                    re.compile(part.removeprefix(REGEX))
                except re.error as error:
                    raise ValueError(f"{part!r} is no regular expression: {error}") from None
            elif part not in PARTS:
                raise ValueError(f"{part!r} is not one of {', '.join(PARTS)}, nor re:<regular expression>")
        if len(set(parts)) != len(parts):
            raise ValueError(f"names a part twice: {parts}")
        return parts

    @model_validator(mode="after")
    def _settings_fit(self) -> StageConfig:
        where = f"stage {self.name!r}"
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"{where}: give exactly one of steps and epochs")
        unknown = sorted(set(self.learning_rates) - set(self.tune))
        if unknown:
            raise ValueError(f"{where}: learning_rates names {unknown}, which tune does not: {self.tune}")
        if self.best_by in ("accuracy", "closed_accuracy", "open_accuracy") and not self.generate_samples:
            raise ValueError(f"{where}: best_by {self.best_by} needs generate_samples")
        if self.best_by in ("region_iou", "match_auroc"):
            head = self.best_by.partition("_")[0]
            if self.heads is None or not getattr(self.heads, head):
                raise ValueError(f"{where}: best_by {self.best_by} needs the {head} head")
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result: all but those of memory and speed, which change it by rounding only."""
        speed = {"questions_per_image": self.speed.questions_per_image}  # decides on the samples' order
        return self.model_dump(exclude={"micro_tokens", "speed"}) | {"speed": speed}


def idle_setting(tree: dict[str, Any]) -> tuple[str, str] | None:
    """A setting that a stage's YAML gives and another of its settings makes idle, with the reason; None for none."""
    speed = tree.get("speed") or {}
    if "cache_gigabytes" in speed and speed.get("cache_features") in ("on", "off", True, False):
        return "speed.cache_gigabytes", "it bounds cache_features: auto alone"
    idle = (
        ("batch_size", tree.get("batch_tokens") is not None, "batch_tokens says how large a step is"),
        ("lora", tree.get("method") == "full", "method is full"),
        ("max_new_tokens", tree.get("generate_samples") == 0, "generate_samples is 0"),
    )
    return next(((name, why) for name, is_idle, why in idle if is_idle and name in tree), None)
