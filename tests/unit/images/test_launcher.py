"""The stand-in for Kubeflow's launcher, on pipelines that kfp itself has compiled."""
# No `from __future__ import annotations` here: kfp reads the annotations as types.

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl
from kfp.pipeline_spec import pipeline_spec_pb2

from images.launcher import Launcher, Step, holds, local_path


@dsl.component(base_image="image/a:1", install_kfp_package=False)
def make(config: str, data: dsl.Output[dsl.Dataset], count: int = 3) -> int:
    """Make."""
    return count


@dsl.component(base_image="image/b:1", install_kfp_package=False)
def use(config: str, number: int, data: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]):  # type: ignore[no-untyped-def]
    """Use."""


def compiled(pipeline: Any, folder: Path) -> dict[str, Any]:
    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    spec: dict[str, Any] = yaml.safe_load((folder / "pipeline.yaml").read_text())
    return spec


def told(step: Step) -> dict[str, Any]:
    """The executor's input, which Kubeflow's own message has to be able to hold."""
    value: dict[str, Any] = json.loads(step.command[step.command.index("--executor_input") + 1])
    json_format.ParseDict(value, pipeline_spec_pb2.ExecutorInput())
    return value


def test_steps_run_in_order_with_what_those_before_put_out(tmp_path: Path) -> None:
    @dsl.pipeline(name="two")
    def two(config: str = "c"):  # type: ignore[no-untyped-def]
        made = make(config=config)
        with dsl.If(made.outputs["Output"] == 3):
            use(config=config, number=made.outputs["Output"], data=made.outputs["data"])

    steps = []
    volume = tmp_path / "s3"
    volume.mkdir()

    def run(step: Step) -> None:
        steps.append(step)
        output = told(step)["outputs"]
        place = volume / Path(output["outputFile"]).relative_to("/s3")
        assert place.parent.is_dir() or not output.get("parameters")
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps({"parameterValues": {"Output": 3} if step.name == "make" else {}}))

    outputs = Launcher(compiled(two, tmp_path), volume, run).pipeline()
    first, second = steps
    assert [(step.name, step.image) for step in steps] == [("make", "image/a:1"), ("use", "image/b:1")]
    assert first.command[0] == "sh"
    assert told(first)["inputs"]["parameterValues"] == {"config": "c", "count": 3}
    assert told(second)["inputs"]["parameterValues"] == {"config": "c", "number": 3}
    (given,) = told(second)["inputs"]["artifacts"]["data"]["artifacts"]
    (made,) = told(first)["outputs"]["artifacts"]["data"]["artifacts"]
    assert given == made
    assert made["type"]["schemaTitle"] == "system.Dataset"
    folder = volume / Path(local_path(made["uri"])).relative_to("/s3").parent
    assert folder.is_dir() and folder.stat().st_mode & 0o777 == 0o777, "another user is to write there"
    assert outputs["make"]["parameters"] == {"Output": 3}
    assert dsl.Dataset(uri=made["uri"]).path == local_path(made["uri"]), "kfp's own path of it in a pod"


def test_a_loop_is_refused(tmp_path: Path) -> None:
    @dsl.pipeline(name="loop")
    def loop(config: str = "c"):  # type: ignore[no-untyped-def]
        with dsl.ParallelFor([1, 2]) as number:
            make(config=config, count=number)

    with pytest.raises(ValueError, match="parameterIterator is not followed here"):
        Launcher(compiled(loop, tmp_path), tmp_path, lambda step: None).pipeline()


def test_only_what_its_condition_lets_pass_is_run(tmp_path: Path) -> None:
    @dsl.pipeline(name="choose")
    def choose(count: int = 0):  # type: ignore[no-untyped-def]
        with dsl.If(count == 0):
            make(config="none")
        with dsl.Else():
            make(config="some", count=count)

    volume = tmp_path / "s3"
    volume.mkdir()
    launched: list[dict[str, Any]] = []

    def run(step: Step) -> None:
        value = told(step)
        launched.append(value["inputs"]["parameterValues"])
        place = volume / Path(value["outputs"]["outputFile"]).relative_to("/s3")
        place.write_text(json.dumps({"parameterValues": {"Output": 1}}))

    launcher = Launcher(compiled(choose, tmp_path), volume, run)
    launcher.pipeline()
    launcher.pipeline(count=5)
    assert launched == [{"config": "none", "count": 3}, {"config": "some", "count": 5}]


def test_conditions_are_those_that_kfp_writes() -> None:
    assert holds("inputs.parameter_values['gate-Output'] == true", {"gate-Output": True})
    assert not holds("!(int(inputs.parameter_values['n']) == 0)", {"n": 0.0})
    assert holds("inputs.parameter_values['name'] == 'x'", {"name": "x"})
    with pytest.raises(ValueError, match="is of a form that is not followed here"):
        holds("inputs.parameter_values['n'] > 0 && true", {"n": 1})


@dsl.component(base_image="image/c:1", install_kfp_package=False)
def tidy(status: dsl.PipelineTaskFinalStatus, count: int = 0):  # type: ignore[no-untyped-def]
    """Tidy."""


def test_what_runs_at_the_end_is_told_that_all_went_well(tmp_path: Path) -> None:
    @dsl.pipeline(name="ends")
    def ends():  # type: ignore[no-untyped-def]
        with dsl.ExitHandler(tidy()):
            make(config="c")

    volume = tmp_path / "s3"
    volume.mkdir()
    steps = []

    def run(step: Step) -> None:
        steps.append(step)
        place = volume / Path(told(step)["outputs"]["outputFile"]).relative_to("/s3")
        place.parent.mkdir(exist_ok=True)
        place.write_text("{}")

    Launcher(compiled(ends, tmp_path), volume, run).pipeline()
    assert [step.name for step in steps] == ["make", "tidy"]
    status = told(steps[1])["inputs"]["parameterValues"]["status"]
    assert (status["state"], status["pipelineTaskName"]) == ("SUCCEEDED", "exit-handler-1")
