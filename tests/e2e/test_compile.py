"""The compiled pipeline against Kubeflow's own definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from medforge.config import RunConfig, load_config, parse_config
from pipelines.compile import main, pipeline_of, write

CONFIGS = sorted(Path(__file__).resolve().parents[2].glob("pipelines/configs/*.yaml"))


def compiled(config: RunConfig, folder: Path) -> dict[str, Any]:
    write(pipeline_of("retrain", config, None), folder / "pipeline.yaml")
    spec: dict[str, Any] = yaml.safe_load((folder / "pipeline.yaml").read_text())
    return spec


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_compiles_to_a_sound_spec(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    spec = compiled(config, tmp_path)
    message = pipeline_spec_pb2.PipelineSpec()
    json_format.ParseDict(spec, message)  # an unknown or misspelt key raises
    default = spec["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
    assert parse_config(default) == config
    tasks = spec["root"]["dag"]["tasks"]
    names = ["train-first", *(f"train-next{'' if n == 2 else f'-{n - 1}'}" for n in range(2, len(config.stages) + 1))]
    assert [name for name in tasks if name.startswith("train")] == names
    assert tasks["train-next"]["inputs"]["artifacts"]["before"]["taskOutputArtifact"]["producerTask"] == "train-first"


def test_publishing_hangs_on_the_gates_verdict_and_nothing_else_does(tmp_path: Path) -> None:
    spec = compiled(load_config(CONFIGS[0]), tmp_path)
    tasks = spec["root"]["dag"]["tasks"]
    conditional = {name: task for name, task in tasks.items() if "triggerPolicy" in task}
    (condition,) = conditional.values()
    assert condition["triggerPolicy"]["condition"].endswith("== true")
    inner = spec["components"][condition["componentRef"]["name"]]["dag"]["tasks"]
    assert list(inner) == ["publish"]
    assert "publish" not in tasks


def test_three_stages_make_three_tasks_in_a_row(tmp_path: Path) -> None:
    config = load_config(CONFIGS[0])
    first, second, *_ = config.stages
    third = second.model_copy(update={"name": "report"})
    spec = compiled(config.model_copy(update={"stages": [first, second, third]}), tmp_path)
    tasks = spec["root"]["dag"]["tasks"]
    merged = tasks["merge"]["inputs"]["artifacts"]["adapters"]["taskOutputArtifact"]["producerTask"]
    before = tasks[merged]["inputs"]["artifacts"]["before"]["taskOutputArtifact"]["producerTask"]
    assert [before, merged] == ["train-next", "train-next-2"]


def test_a_failed_compilation_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pipeline.yaml"
    out.write_text("old")
    monkeypatch.setattr("sys.argv", ["compile", "--config", str(tmp_path / "none.yaml"), "--out", str(out)])
    assert main() == 1
    assert capsys.readouterr().err == f"pipeline-compile: {tmp_path / 'none.yaml'}: no such file\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]
    assert out.read_text() == "old"
