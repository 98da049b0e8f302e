"""The command line: quick help, one line for a mistake, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from medforge.cli import main, parser
from medforge.commands import GROUPS

CONFIGS = sorted(Path(__file__).resolve().parents[2].glob("pipelines/configs/*.yaml"))


def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "medforge", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_every_group_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parser().parse_args(["--help"])
    assert ending.value.code == 0
    shown = capsys.readouterr().out
    for command in (
        "convert",
        "validate",
        "models",
        "train",
        "merge",
        "evaluate",
        "gate",
        "approve",
        "releases",
        "store",
    ):
        assert f"    {command} " in shown or f"    {command}\n" in shown
    assert len(GROUPS) == len(set(GROUPS))


@pytest.mark.parametrize(
    "words",
    [
        ["config", "check", "nowhere.yaml"],
        ["convert", "nowhere", "out"],
        ["validate", "nowhere", "model", "out"],
        ["merge", "nowhere", "nowhere", "nowhere", "out"],
        ["models", "import", "./nowhere", "out"],
        ["evaluate", "predict", "nowhere", "nowhere", "out.jsonl"],
        ["gate", "nowhere.json", "nowhere.yaml", "out.json"],
        ["store", "get", "s3://bucket/none", "out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_wrong_path_is_one_clear_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MEDFORGE_S3_ENDPOINT", "MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"medforge {words[0]}: ") and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_describes_the_configurations(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    tree = yaml.safe_load(path.read_text())
    tree["policy"] = yaml.safe_load((path.parent / tree["policy"]).read_text())
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree | {"stage": []}, schema)


def test_every_setting_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "schema"])
    schema = json.loads(capsys.readouterr().out)
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name}"


def test_check_fills_in_defaults_and_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(CONFIGS[0]), "--set", "data.split=by-study"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["split"] == "by-study"
    assert shown["publish"]["channel"] == "candidate"


SWITCHES = (
    "share_prefix",
    "cache_features",
    "answer_logits",
    "length_buckets",
    "packing",
    "flex_attention",
    "checkpoint_activations",
    "bfloat16",
    "fused_kernels",
    "compile",
)


@pytest.fixture
def training(tmp_path: Path, base: Path, phantoms: Path) -> list[str]:
    """The words of a `train` command, with OUT at the end."""
    stage = {"name": "see", "tune": ["vision_merger"], "steps": 2, "batch_size": 4, "generate_samples": 0}
    policy = min(CONFIGS[0].parent.parent.glob("policies/*.yaml"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "unit", "stages": [stage], "policy": str(policy)}))
    return ["train", "--config", str(path), "--stage", "see", str(base), str(phantoms), str(tmp_path / "out")]


def test_explain_tells_every_switch_and_trains_nothing(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medforge.stages import SpeedConfig

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("medforge.train.prepare.load_model", no_weights)
    assert main([*training[:5], "--explain", "--set", "stages.0.speed.answer_logits=false", *training[5:]]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("stage see: ") and " 2 steps of 4.0 samples " in head and "lora on 4 layers, 1 x " in head
    told = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert tuple(told) == SWITCHES
    assert set(SpeedConfig.model_fields) - set(told) == {"questions_per_image", "cache_gigabytes", "workers"}
    assert all(state in ("on", "off") and len(why) > 5 for state, why in told.values())
    assert (told["share_prefix"][0], told["answer_logits"][0], told["bfloat16"][0]) == ("on", "off", "off")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_explain_says_what_cannot_take_effect(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--explain", "--set", "stages.0.tune=[vision_tower]", "--set", "stages.0.speed.cache_features=on"]
    assert main([*training[:5], *words, *training[5:]]) == 1
    assert "speed.cache_features: on, but the stage tunes the vision tower" in capsys.readouterr().err


def test_train_writes_a_stack_and_says_what_it_found(
    training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(training) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.logs", "out.work", "run.yaml"]
    about = json.loads((tmp_path / "out" / "01-see" / "stage.json").read_text())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'}: 2 steps, best at 2, loss {about['eval_loss']:.4g}, perplexity ")
    assert last.endswith(f"checkpoints in {tmp_path / 'out.work'}")
    assert main(training) == 1
    assert "out: is there already" in capsys.readouterr().err


def test_nproc_is_the_number_of_processes(
    training: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medforge.train import launch, stage

    asked: list[int] = []

    def in_this_process(job: Any) -> None:
        asked.append(job.parallel.processes)
        stage.train(job)

    monkeypatch.setattr(launch, "launch", in_this_process)
    assert main([*training[:5], "--nproc", "3", *training[5:]]) == 0
    assert asked == [3]
    assert main([*training[:5], "--explain", "--nproc", "2", *training[5:]]) == 0
    assert ", 2 x " in capsys.readouterr().out
    assert main([*training[:5], "--nproc", "0", *training[5:-1], f"{training[-1]}-2"]) == 1
    assert "parallel.processes" in capsys.readouterr().err
