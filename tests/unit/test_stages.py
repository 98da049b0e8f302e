"""A stage's settings: presets, what does not fit together, and what would be ignored."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from medforge.stages import PARTS, PRESETS, HeadsConfig, SpeedConfig, StageConfig, idle_setting

STAGE: dict[str, Any] = {"name": "say", "tune": ["language_attention"], "steps": 10}


def stage(**changes: Any) -> StageConfig:
    return StageConfig.model_validate(STAGE | changes)


def test_defaults() -> None:
    found = stage()
    assert (found.method, found.lora.r, found.lora.alpha, found.batch_size) == ("lora", 16, 32, 32)
    assert (found.heads, found.mix, found.refusals, found.preset) == (None, [], None, None)
    assert found.speed == SpeedConfig()


def test_a_stage_does_not_change() -> None:
    found = stage()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(found, "steps", 3)  # noqa: B010 - mypy knows that it cannot be set


# --- presets


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_is_a_whole_stage(preset: str) -> None:
    """It sets what it says, and a name is all that is missing."""
    found = StageConfig.model_validate({"name": "x", "preset": preset})
    assert found.preset == preset
    for name, value in PRESETS[preset].items():
        given = getattr(found, name)
        if name == "mix":
            given = [view.model_dump(exclude_unset=True) for view in given]
        elif hasattr(given, "model_dump"):
            given = given.model_dump(exclude_unset=True)
        assert given == value, name


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_comes_back_from_json(preset: str) -> None:
    """As the pipeline carries it: with every field, those of the preset too."""
    for changes in ({}, {"steps": 7}, {"batch_tokens": 512}, {"epochs": 0.5, "mix": [], "heads": None}):
        found = StageConfig.model_validate({"name": "x", "preset": preset, **changes})
        assert StageConfig.model_validate_json(found.model_dump_json()) == found
        assert StageConfig.model_validate(json.loads(found.model_dump_json())) == found


def test_the_stage_goes_before_its_preset() -> None:
    found = stage(preset="report", tune=["vision_tower"], max_pixels=500, mix=[], learning_rate=3e-4)
    assert (found.tune, found.max_pixels, found.mix, found.learning_rate) == (["vision_tower"], 500, [], 3e-4)
    assert (found.steps, found.epochs) == (10, None)  # a preset's epochs give way to steps
    assert found.batch_size == PRESETS["report"]["batch_size"]
    assert stage(preset="report", batch_tokens=64).batch_tokens == 64


def test_presets_stay_as_they_are() -> None:
    before = json.dumps(PRESETS)
    for preset in PRESETS:
        stage(preset=preset)
    assert json.dumps(PRESETS) == before


def test_the_presets_do_what_their_names_say() -> None:
    made = {preset: StageConfig.model_validate({"name": "x", "preset": preset}) for preset in PRESETS}
    assert made["concept-alignment"].tune == ["vision_merger"]
    grounding, refusal = made["grounding"], made["refusal-aware"]
    assert grounding.heads is not None
    assert grounding.heads.region
    assert [view.boxes for view in grounding.mix] == [True]
    assert refusal.refusals is not None
    assert all(view.min_answer_words > 0 for view in made["report"].mix)
    assert all(preset == "grounding" or config.heads is None for preset, config in made.items())


# --- what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "nothing"}, "preset 'nothing' is not one of concept-alignment, instruction, "),
        ({"tune": ["language"]}, f"'language' is not one of {', '.join(PARTS)}, nor re:<regular expression>"),
        ({"tune": ["re:(q_proj"]}, "'re:(q_proj' is no regular expression: "),
        ({"tune": ["vision_merger", "vision_merger"]}, "names a part twice"),
        ({"tune": []}, "at least 1 item"),
        ({"steps": None}, "stage 'say': give exactly one of steps and epochs"),
        ({"epochs": 2}, "stage 'say': give exactly one of steps and epochs"),
        ({"learning_rates": {"vision_merger": 1e-3}}, "learning_rates names ['vision_merger'], which tune does not"),
        ({"learning_rates": {"language_attention": 0}}, "greater than 0"),
        ({"best_by": "accuracy", "generate_samples": 0}, "stage 'say': best_by accuracy needs generate_samples"),
        ({"best_by": "open_accuracy", "generate_samples": 0}, "best_by open_accuracy needs generate_samples"),
        ({"best_by": "region_iou"}, "stage 'say': best_by region_iou needs the region head"),
        ({"best_by": "match_auroc", "heads": {"match": False}}, "best_by match_auroc needs the match head"),
        ({"heads": {"region": False, "match": False}}, "heads: neither region nor match is on; leave the section out"),
        ({"heads": {"weights": {"match": 2}}}, "heads.weights: has no effect with learned weights; set weighting: "),
        ({"heads": {"weights": {"match": -1}, "weighting": "fixed"}}, "greater than or equal to 0"),
        (
            {"speed": {"flex_attention": "on", "packing": "off"}},
            "speed.flex_attention: has no effect with packing: off",
        ),
        ({"speed": {"packing": "sometimes"}}, "'auto', 'on' or 'off'"),
        ({"lora": {"rank": 3}}, "Extra inputs are not permitted"),
        ({"mix": [{"weight": 0}]}, "greater than 0"),
        ({"refusals": {"share": 1}}, "less than 1"),
        ({"name": "Say"}, "should match pattern"),
        ({"warmup": 1}, "less than 1"),
    ],
    ids=str,
)
def test_a_mistake_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        stage(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": [*PARTS, r"re:.*layers\.\d+\.self_attn\.q_proj"]},
        {"learning_rates": {"language_attention": 1e-3}},
        {"tune": ["re:a.*"], "learning_rates": {"re:a.*": 1e-3}},
        {"best_by": "match_auroc", "heads": {"region": False}},
        {"best_by": "region_iou", "heads": {}, "generate_samples": 0},
        {"heads": {"weighting": "fixed", "weights": {"match": 2}}},
        {"steps": None, "epochs": 0.25},
        {"speed": {"flex_attention": "on", "packing": "on"}},
    ],
    ids=str,
)
def test_what_fits_together_is_taken(changes: dict[str, Any]) -> None:
    found = stage(**changes)
    assert found.model_dump(exclude_unset=True) == STAGE | changes


def test_the_heads_default_to_both() -> None:
    heads = HeadsConfig()
    assert (heads.region, heads.match, heads.weighting) == (True, True, "uncertainty")


# --- what would be ignored


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"batch_tokens": 100, "batch_size": 8}, "batch_size"),
        ({"method": "full", "lora": {}}, "lora"),
        ({"generate_samples": 0, "max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_an_idle_setting_is_found(tree: dict[str, Any], field: str) -> None:
    found = idle_setting(STAGE | tree)
    assert found is not None
    assert found[0] == field
    assert found[1]


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"batch_tokens": 100},
        {"batch_tokens": None, "batch_size": 8},
        {"method": "lora", "lora": {}},
        {"method": "full"},
        {"generate_samples": 4, "max_new_tokens": 3},
        {"generate_samples": 0},
    ],
)
def test_nothing_is_idle(tree: dict[str, Any]) -> None:
    assert idle_setting(STAGE | tree) is None


def test_yaml_words_for_true_and_false_are_switches() -> None:
    """YAML 1.1 reads a bare `on` and `off` as true and false."""
    assert SpeedConfig.model_validate({"packing": True, "compile": False}).model_dump(
        include={"packing", "compile"}
    ) == {
        "packing": "on",
        "compile": "off",
    }


def test_memory_and_speed_do_not_decide_the_result_but_the_order_does() -> None:
    plain = stage()
    assert stage(micro_tokens=64, speed={"share_prefix": False}).decisive() == plain.decisive()
    assert stage(speed={"questions_per_image": 1}).decisive() != plain.decisive()
    assert stage(learning_rate=3e-4).decisive() != plain.decisive()
