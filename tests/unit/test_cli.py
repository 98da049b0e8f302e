"""The command line: quick help, one line for a mistake, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

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
