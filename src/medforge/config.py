"""RunConfig: one YAML file describes a run. `medforge config schema` prints its JSON schema, which is its manual."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from medforge.stages import NAME, LoraConfig, StageConfig, idle_setting
from medforge.stages import Section as _Section

__all__ = ["LoraConfig", "RunConfig", "StageConfig", "load_config", "load_policy", "parse_config"]

FamilyName = Literal["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


class PhantomConfig(_Section):
    """The generated data set: drawn images that look like scans and are none."""

    images: int = Field(600, ge=12, description="How many images are drawn, over all splits.")
    size: int = Field(96, ge=56, le=1024, description="Width and height of an image in pixels.")
    seed: int = Field(0, ge=0, description="The same seed draws the same images and asks the same questions.")


class DataConfig(_Section):
    """Where the samples come from and what is refused."""

    source: str = Field("phantom", description="A folder, `s3://bucket/prefix`, or `phantom` for the generated set.")
    format: Literal["auto", "phantom", "vqa-rad", "slake", "conversations"] = Field(
        "auto", description="The source's format; `auto` finds it and says what it found."
    )
    licence: str = Field("", description="Licence of a source whose format does not tell it, such as conversations.")
    languages: list[str] = Field([], description="Keep only these languages (`en`, `zh`); empty keeps all.")
    split: Literal["source", "by-study"] = Field(
        "source",
        description="`source` keeps the source's splits; `by-study` deals whole studies anew, so that no image or "
        "study stands in two splits.",
    )
    validation_share: float = Field(
        0.1, ge=0, lt=0.5, description="Share of the studies for validation where the source has no such split."
    )
    test_share: float = Field(0.15, gt=0, lt=0.5, description="Share of the studies for test with `split: by-study`.")
    shared_images: Literal["report", "reject"] = Field(
        "report", description="Training samples whose image or study is also in the test split: report or reject them."
    )
    max_rejected: float = Field(
        0.05, ge=0, le=1, description="Share of rejected samples that stops the run; repeats and shared images apart."
    )
    shards: int = Field(
        1, ge=1, le=256, description="Converting and validating is shared by this many tasks; the result is the same."
    )
    phantom: PhantomConfig = Field(default_factory=PhantomConfig, description="Used when the source is `phantom`.")


class TinyConfig(_Section):
    """The tiny model that is built on the spot, for demos and tests."""

    steps: int = Field(400, ge=0, description="Pre-training steps on non-medical drawings.")
    batch_size: int = Field(32, ge=1, description="Drawings a step.")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW learning rate of the pre-training.")
    seed: int = Field(0, ge=0, description="Seed of the initialisation, the drawings and their order.")


class ModelConfig(_Section):
    """The base model and how it sees a sample."""

    base: str = Field(
        "tiny:qwen3-vl", description="`tiny:<family>`, a local folder, `s3://bucket/prefix`, or a Hugging Face hub id."
    )
    revision: str = Field("main", description="Branch, tag or commit of a hub id.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of frozen weights and merge.")
    min_pixels: int = Field(56 * 56, ge=1, description="Smaller images are enlarged to this many pixels.")
    max_pixels: int = Field(512 * 512, ge=1, description="Larger images are reduced to this many pixels.")
    max_length: int = Field(2048, ge=16, description="Samples with more tokens, image tokens counted, are rejected.")
    tiny: TinyConfig = Field(default_factory=TinyConfig, description="Used when the base is `tiny:…`.")

    @field_validator("base")
    @classmethod
    def _known_tiny(cls, value: str) -> str:
        if value.startswith("tiny") and value not in ("tiny:qwen2-vl", "tiny:qwen2.5-vl", "tiny:qwen3-vl"):
            raise ValueError("a tiny base is one of tiny:qwen2-vl, tiny:qwen2.5-vl, tiny:qwen3-vl")
        return value

    @model_validator(mode="after")
    def _pixels_in_order(self) -> ModelConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self


class EvaluateConfig(_Section):
    """What is predicted and scored."""

    split: Literal["validation", "test"] = Field("test", description="The split that is answered and scored.")
    limit: int | None = Field(None, ge=1, description="Score only this many samples, chosen by the run's seed.")
    batch_size: int = Field(16, ge=1, description="Samples generated at once.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer in tokens.")
    report_samples: int = Field(24, ge=0, description="How many sample cases the report shows.")


class RuleConfig(_Section):
    """One rule of acceptance: it holds when the tuned model's figure meets every bound that is given."""

    name: str = Field(pattern=NAME, description="What the verdict calls the rule.")
    metric: str = Field(description="A metric of results.json, such as `exact_match`.")
    slice: str = Field("all", description="A slice of results.json, such as `all` or `answer_type=closed`.")
    direction: Literal["higher", "lower"] = Field("higher", description="Which way is better.")
    bound: float | None = Field(None, description="The figure's floor (direction higher) or ceiling (lower).")
    margin: float | None = Field(None, description="How much better than the base's it must be; may be negative.")
    min_n: int = Field(30, ge=1, description="With fewer samples the evidence is not enough: no pass.")

    @model_validator(mode="after")
    def _measures_something(self) -> RuleConfig:
        if self.bound is None and self.margin is None:
            raise ValueError(f"rule {self.name!r}: give a bound, a margin, or both; else it measures nothing")
        return self


class PolicyConfig(_Section):
    """The rules that a candidate must meet, all of them."""

    name: str = Field(pattern=NAME, description="What the verdict calls the policy.")
    rules: list[RuleConfig] = Field(min_length=1, description="Every rule must pass.")

    @model_validator(mode="after")
    def _names_differ(self) -> PolicyConfig:
        names = [rule.name for rule in self.rules]
        if len(set(names)) != len(names):
            raise ValueError(f"policy {self.name!r}: two rules have the same name: {names}")
        return self


class PublishConfig(_Section):
    """Where a candidate that passed goes."""

    bucket: str = Field(
        "medforge", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="Bucket of the object store."
    )
    channel: str = Field("candidate", pattern=NAME, description="The channel that then names the release.")


class ParallelConfig(_Section):
    """Several devices. The result is that of one process within rounding."""

    processes: int = Field(1, ge=1, description="Processes on each machine or pod, one a device (torchrun).")
    nodes: int = Field(
        1, ge=1, description="Machines, each with so many processes; more than one takes a cluster (a TrainJob)."
    )
    strategy: Literal["ddp", "zero2", "zero3"] = Field(
        "ddp", description="Whole weights on each device, or DeepSpeed ZeRO that shards them (arXiv 1910.02054)."
    )
    offload: Literal["none", "cpu"] = Field("none", description="Where ZeRO keeps the optimizer's state.")

    @property
    def world(self) -> int:
        """Processes on all machines together."""
        return self.processes * self.nodes

    @model_validator(mode="after")
    def _offload_is_zeros(self) -> ParallelConfig:
        if self.offload != "none" and self.strategy == "ddp":
            raise ValueError("parallel.offload: has no effect with strategy ddp; choose zero2 or zero3")
        return self


class CheckpointConfig(_Section):
    """Where checkpoints of the training go besides the step's own folder."""

    url: str = Field(
        "",
        pattern=r"^(s3://.+)?$",
        description="s3://bucket/prefix for copies of them and of answers, made in the background; empty: none.",
    )
    keep: int = Field(2, ge=1, description="How many of the newest are kept, besides the best one.")


class RunConfig(_Section):
    """One run, from source files to a candidate."""

    name: str = Field(pattern=NAME, description="Name of the run and of the model that it makes.")
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn or shuffled.")
    data: DataConfig = Field(default_factory=DataConfig, description="Source, format and splits.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Base model and image sizes.")
    stages: list[StageConfig] = Field(min_length=1, description="The stages, in the order in which they run.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Devices and how they share work.")
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Copies of checkpoints.")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="Split and generation.")
    policy: PolicyConfig = Field(description="Rules of acceptance, in place or in a YAML file named from here.")
    publish: PublishConfig = Field(default_factory=PublishConfig, description="Bucket and channel.")

    @model_validator(mode="after")
    def _stage_names_differ(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {names}")
        return self

    @model_validator(mode="after")
    def _heads_stay(self) -> RunConfig:
        for before, stage in itertools.pairwise(self.stages):
            if before.heads is None:
                continue
            if stage.heads is None or (before.heads.region, before.heads.match) != (
                stage.heads.region,
                stage.heads.match,
            ):
                raise ValueError(
                    f"stage {stage.name!r}: heads: stage {before.name!r} before it has heads, which would no longer "
                    "fit the model; give this stage the same heads, or put it first"
                )
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage of that name; ValueError lists the names there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage is named {name!r}; the configuration has {[stage.name for stage in self.stages]}")

    def to_json(self) -> str:
        """The configuration as one line of JSON, as the pipeline carries it."""
        return self.model_dump_json()


def load_config(path: Path | str, overrides: Annotated[list[str], "section.field=value"] | None = None) -> RunConfig:
    """The run that a YAML file describes, with `overrides` such as ``data.split=by-study`` or ``stages.0.steps=20``.

    Raises ValueError that names the file and the field for a missing file, broken YAML, an unknown or a wrong field.
    """
    path = Path(path)
    tree = _read_yaml(path)
    for override in overrides or []:
        _set(tree, override)
    policy = tree.get("policy")
    if isinstance(policy, str):
        tree["policy"] = _read_yaml(path.parent / policy)
    config: RunConfig = _check(RunConfig, tree, str(path))
    _refuse_ignored(tree, config, path)
    return config


def load_section(section: type[_Section], path: Path) -> _Section:
    """Another configuration file of the same manner: `section` as the YAML file says. ValueError as `load_config`."""
    found = _check(section, _read_yaml(path), str(path))
    assert isinstance(found, section)
    return found


def _refuse_ignored(tree: dict[str, Any], config: RunConfig, path: Path) -> None:
    """Raise ValueError for a setting that is given, but can take no effect beside the others."""
    data, model = tree.get("data") or {}, tree.get("model") or {}
    local = config.model.base.startswith(("tiny:", "s3://")) or Path(config.model.base).is_dir()
    for field, given, idle, why in (
        ("data.phantom", "phantom" in data, config.data.source != "phantom", f"the source is {config.data.source}"),
        ("model.tiny", "tiny" in model, not config.model.base.startswith("tiny:"), f"the base is {config.model.base}"),
        ("model.revision", "revision" in model, local, f"the base {config.model.base} is no hub id"),
    ):
        if given and idle:
            raise ValueError(f"{path}: {field}: has no effect, as {why}; leave it out")
    for number, stage in enumerate(tree["stages"]):
        if found := idle_setting(stage):
            raise ValueError(f"{path}: stages.{number}.{found[0]}: has no effect, as {found[1]}; leave it out")


def parse_config(text: str) -> RunConfig:
    """The configuration that `RunConfig.to_json` wrote."""
    return RunConfig.model_validate_json(text)


def load_policy(path: Path | str) -> PolicyConfig:
    """The policy in a YAML file."""
    return _check(PolicyConfig, _read_yaml(Path(path)), str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as YAML text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: is {'empty' if tree is None else 'not a mapping'}; `name: value` lines are expected")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_.]+", key):
        raise ValueError(f"override {override!r} is not of the form section.field=value")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _item(node, name, override) if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {name} is a single value and has no fields")
    value = yaml.safe_load(text)
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _item(items: list[Any], name: str, override: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(f"override {override!r}: {name!r} is not an index below {len(items)}")
    return items[int(name)]


def _check(model: type[Any], tree: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"]) or "(top)"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = "is not a setting" + ("; `medforge config schema` lists them" if model is RunConfig else "")
            lines.append(f"{where}: {field}: {message}")
        raise ValueError("\n".join(lines)) from None
