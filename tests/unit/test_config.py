from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from medforge.cli import main
from medforge.config import RunConfig, load_config, load_policy, parse_config

POLICY = {"name": "strict", "rules": [{"name": "exact", "metric": "exact_match", "bound": 0.5}]}
STAGE: dict[str, Any] = {"name": "align", "tune": ["vision_merger"], "steps": 10}
RUN: dict[str, Any] = {
    "name": "demo",
    "stages": [STAGE],
    "policy": POLICY,
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def make(tree: Any, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), "utf-8")
        return path

    return make


def test_defaults_and_the_way_through_json(write: Any) -> None:
    config = load_config(write(RUN))
    assert (config.seed, config.data.source, config.model.base) == (0, "phantom", "tiny:qwen3-vl")
    assert config.stage("align").steps == 10
    assert parse_config(config.to_json()) == config
    assert "\n" not in config.to_json()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": {"source": "somewhere", "phantom": {"images": 20}}}, "data.phantom"),
        ({"model": {"base": "org/model", "tiny": {"steps": 3}}}, "model.tiny"),
        ({"model": {"revision": "v2"}}, "model.revision"),
        ({"stages": [STAGE | {"batch_tokens": 64, "batch_size": 4}]}, "stages.0.batch_size"),
        ({"stages": [STAGE, STAGE | {"name": "b", "method": "full", "lora": {"r": 4}}]}, "stages.1.lora"),
        ({"stages": [STAGE | {"generate_samples": 0, "max_new_tokens": 9}]}, "stages.0.max_new_tokens"),
    ],
)
def test_a_setting_that_can_take_no_effect_is_refused(write: Any, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"run\.yaml: {re.escape(field)}: has no effect, as .*; leave it out"):
        load_config(write(RUN | change))


def test_policy_in_a_file_beside(write: Any) -> None:
    write(POLICY, "policy.yaml")
    config = load_config(write(RUN | {"policy": "policy.yaml"}))
    assert config.policy == load_policy(write(POLICY))
    with pytest.raises(ValueError, match=r"gone\.yaml: no such file"):
        load_config(write(RUN | {"policy": "gone.yaml"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, "sede: is not a setting; `medforge config schema` lists them"),
        ({"data": {"splitt": "source"}}, "data.splitt: is not a setting"),
        ({"data": {"test_share": 0.9}}, "data.test_share: Input should be less than 0.5"),
        ({"name": "My Run"}, "name: String should match pattern"),
        ({"model": {"base": "tiny:gpt"}}, "model.base: a tiny base is one of"),
        ({"model": {"min_pixels": 9, "max_pixels": 4}}, "model: min_pixels 9 is more than max_pixels 4"),
        ({"stages": []}, "stages: List should have at least 1 item"),
        ({"stages": [{"name": "a", "tune": ["vision_merger"]}]}, "stage 'a': give exactly one of steps and epochs"),
        ({"stages": RUN["stages"] * 2}, "two stages have the same name"),
        ({"stages": [STAGE | {"tune": ["vision"]}]}, "stages.0.tune: 'vision' is not one of vision_merger, "),
        ({"stages": [STAGE | {"preset": "x"}]}, "stages.0: preset 'x' is not one of concept-alignment, "),
        ({"stages": [STAGE | {"heads": {"match": 1}, "speeed": {}}]}, "stages.0.speeed: is not a setting"),
        ({"parallel": {"offload": "cpu"}}, "parallel: parallel.offload: has no effect with strategy ddp"),
        ({"parallel": {"processes": 0}}, "parallel.processes: Input should be greater than or equal to 1"),
        ({"checkpoints": {"url": "file:///x"}}, "checkpoints.url: String should match pattern"),
        ({"checkpoints": {"keep": 0}}, "checkpoints.keep: Input should be greater than or equal to 1"),
        ({"policy": {"name": "p", "rules": [{"name": "r", "metric": "m"}]}}, "rule 'r': give a bound, a margin"),
    ],
)
def test_a_mistake_names_the_file_and_the_field(write: Any, change: dict[str, Any], message: str) -> None:
    path = write(RUN | change)
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("- a", "is not a mapping"), ("a: [", "is not valid YAML"), ("a: \x00", "is not valid YAML")],
)
def test_broken_files(write: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"run.yaml: {message}"):
        load_config(write(text))


def test_all_mistakes_are_told_at_once(write: Any) -> None:
    with pytest.raises(ValueError) as error:
        load_config(write(RUN | {"sede": 1, "seed": -1}))
    assert len(str(error.value).splitlines()) == 2


def test_overrides(write: Any) -> None:
    path = write(RUN)
    config = load_config(path, ["data.split=by-study", "stages.0.steps=20", "seed=7", "data.languages=[en, zh]"])
    assert (config.data.split, config.stages[0].steps, config.seed) == ("by-study", 20, 7)
    assert config.data.languages == ["en", "zh"]
    for override, message in {
        "seed": "is not of the form section.field=value",
        "stages.3.steps=1": "'3' is not an index below 1",
        "name.x=1": "name is a single value and has no fields",
        "data.splitt=x": "data.splitt: is not a setting",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config(path, [override])


def test_parallel_and_checkpoints(write: Any) -> None:
    change = {
        "parallel": {"processes": 4, "strategy": "zero3", "offload": "cpu"},
        "checkpoints": {"url": "s3://bucket/prefix", "keep": 3},
    }
    config = load_config(write(RUN | change))
    assert (config.parallel.strategy, config.parallel.offload, config.checkpoints.keep) == ("zero3", "cpu", 3)
    plain = load_config(write(RUN))
    assert (plain.parallel.processes, plain.checkpoints.url) == (1, "")


def test_heads_are_kept_by_the_stages_after(write: Any) -> None:
    """A later stage moves the states that the heads read: it has to train them along."""
    plain, heads = STAGE | {"name": "plain"}, STAGE | {"name": "heads", "heads": {}}
    region = STAGE | {"name": "region", "heads": {"match": False}}
    for first, second in ((heads, plain), (heads, region)):
        with pytest.raises(ValueError, match=f"stage {second['name']!r}: heads: stage 'heads' before it has heads"):
            load_config(write(RUN | {"stages": [first, second]}))
    for stages in ([plain, heads], [plain, heads, heads | {"name": "again"}]):
        assert len(load_config(write(RUN | {"stages": stages})).stages) == len(stages)


def test_no_stage_of_that_name(write: Any) -> None:
    with pytest.raises(ValueError, match=r"no stage is named 'x'; the configuration has \['align'\]"):
        load_config(write(RUN)).stage("x")


def test_the_schema_describes_every_field_and_fits(write: Any) -> None:
    schema = RunConfig.model_json_schema()
    jsonschema.validate(RUN, schema)
    for part in [schema, *schema["$defs"].values()]:
        for name, field in part.get("properties", {}).items():
            assert field.get("description"), name


def test_command(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(RUN))
    assert main(["config", "check", path, "--set", "seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    assert main(["config", "check", path, "--set", "seed=x"]) == 1
    assert "seed: Input should be a valid integer" in capsys.readouterr().err
