"""What a step reads of the configuration is what a change of it is for, and nothing else can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.settings.component import settings, settings_stage
from medforge.config import RunConfig, load_config
from medforge.steps.settings import READS, part, read
from pipelines.retrain import ONCE

CONFIG = load_config(Path(__file__).resolve().parents[3] / "pipelines/configs/phantom.yaml")
STAGE = CONFIG.stages[1].name
TRAIN = {"train", "merge", "predict"}  # what reads how a model sees, and in which precision


def changed(field: str, value: Any) -> str:
    tree: Any = CONFIG.model_dump(mode="json")
    *parents, last = field.split(".")
    node = tree
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    assert node[last] != value
    node[last] = value
    return RunConfig.model_validate(tree).to_json()


def parts(config: str) -> dict[str, str]:
    return {step: part(config, step, STAGE) for step in READS}


@pytest.mark.parametrize(
    ("field", "value", "steps"),
    [
        ("name", "other", {"train", "predict", "evaluate"}),
        ("seed", 7, {"convert", "train", "predict"}),
        ("data.source", "s3://bucket/data", {"sources", "convert"}),
        ("data.phantom.images", 700, {"convert"}),
        ("data.shards", 2, {"convert", "validate"}),
        ("data.max_rejected", 0.5, {"convert", "validate"}),
        ("model.base", "tiny:qwen2-vl", {"sources", "base", "evaluate"}),
        ("model.tiny.steps", 3, {"base"}),
        ("model.dtype", "bfloat16", TRAIN),
        ("model.max_pixels", 9217, {"validate", *TRAIN}),
        ("stages.1.learning_rate", 0.5, {"train"}),
        ("stages.1.speed.questions_per_image", 3, {"train"}),
        ("stages.0.learning_rate", 0.5, set()),  # of another stage
        ("parallel.processes", 2, {"train"}),
        ("checkpoints.keep", 5, {"train", "predict"}),
        ("evaluate.max_new_tokens", 5, {"predict"}),
        ("evaluate.report_samples", 5, {"report"}),
        ("policy.rules.0.min_n", 77, {"gate"}),
        ("publish.channel", "other", set()),  # publish takes the whole, and is never cached
    ],
)
def test_a_change_is_told_to_the_steps_that_read_it(field: str, value: Any, steps: set[str]) -> None:
    before, after = parts(CONFIG.to_json()), parts(changed(field, value))
    assert {step for step in READS if before[step] != after[step]} == steps


@pytest.mark.parametrize("step", READS)
def test_a_part_is_as_good_as_the_whole(step: str) -> None:
    stage = STAGE if step == "train" else ""
    whole = CONFIG.to_json()
    found = read(part(whole, step, stage), step, stage)
    assert found == read(whole, step, stage)
    told = found.model_dump()
    for section, value in told.items():
        given = getattr(CONFIG, section)
        if section == "stages":
            assert [row["name"] for row in value] == [STAGE]
            assert found.stage(STAGE) == CONFIG.stage(STAGE)
        elif isinstance(value, dict):
            assert value.items() <= given.model_dump().items()
        else:
            assert value == given


def test_what_a_step_does_not_read_is_not_there() -> None:
    found = read(CONFIG.to_json(), "validate")
    assert found.data.max_rejected == CONFIG.data.max_rejected
    with pytest.raises(AttributeError, match="seed"):
        print(found.seed)
    with pytest.raises(AttributeError, match="source"):
        print(found.data.source)


def test_the_part_of_another_step_or_stage_is_refused() -> None:
    given = part(CONFIG.to_json(), "convert")
    with pytest.raises(ValueError, match="the step validate was given the configuration of the step convert"):
        read(given, "validate")
    other = CONFIG.stages[0].name
    with pytest.raises(ValueError, match=f"no stage is named '{STAGE}'; the configuration has .*{other}"):
        read(part(CONFIG.to_json(), "train", other), "train", STAGE)
    with pytest.raises(ValueError, match="no stage is named 'none'"):
        part(CONFIG.to_json(), "train", "none")


def test_the_component_tells_each_step_its_own_part() -> None:
    whole = CONFIG.to_json()
    told = settings.python_func(whole)
    assert tuple(settings.component_spec.outputs) == ONCE
    assert dict(zip(ONCE, told, strict=True)) == {step: part(whole, step) for step in ONCE}
    assert settings_stage.python_func(whole, STAGE) == part(whole, "train", STAGE)
