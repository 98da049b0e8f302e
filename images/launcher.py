"""Runs a compiled pipeline's steps one by one, each as Kubeflow's launcher would: its image, its command, its input.

An artifact's URI s3://… is the path /s3/… in a pod, a volume that the launcher fills and empties; here it is a folder
of this machine, mounted into each container.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOUNT = "/s3"
_BUCKET = "s3://mlpipeline/v2/artifacts"
_CONDITION = re.compile(r"(?:int\()?inputs\.parameter_values\[.(?P<name>[^]]+).\]\)? == (?P<value>\S+)")

Values = dict[str, dict[str, Any]]  # {"parameters": {name: value}, "artifacts": {name: runtime artifact}}


@dataclass(frozen=True)
class Step:
    """One container of the pipeline: `command` is all of its words, the executor's input among them."""

    name: str
    image: str
    command: list[str]


@dataclass(frozen=True)
class Launcher:
    """Runs the steps of the pipeline `spec` (the IR as a dict) by `run`, on the folder that is mounted at /s3."""

    spec: Mapping[str, Any]
    folder: Path
    run: Callable[[Step], None]

    def pipeline(self, **given: Any) -> dict[str, Values]:
        """Run the steps with the parameters `given`, else the defaults. Returns what each put out, by the task's name.

        What stands under a condition that does not hold is not run. Raises ValueError if the pipeline has a part that
        is not known here, such as a loop.
        """
        defined = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        defaults = {name: entry["defaultValue"] for name, entry in defined.items() if "defaultValue" in entry}
        done: dict[str, Values] = {}
        self._graph(self.spec["root"]["dag"], {"parameters": defaults | given, "artifacts": {}}, done)
        return done

    def _graph(self, graph: Mapping[str, Any], given: Values, done: dict[str, Values]) -> None:
        for name, task in _in_order(graph["tasks"]):
            if known := [key for key in ("parameterIterator", "artifactIterator") if key in task]:
                raise ValueError(f"{name}: {known[0]} is not followed here; compile a pipeline without loops")
            component = self.spec["components"][task["componentRef"]["name"]]
            inputs = _inputs(task, given, done)
            condition = task.get("triggerPolicy", {}).get("condition", "")
            if condition and not holds(condition, inputs["parameters"]):
                continue
            if "dag" in component:
                self._graph(component["dag"], inputs, done)
            else:
                done[name] = self._step(name, component, inputs)

    def _step(self, name: str, component: Mapping[str, Any], inputs: Values) -> Values:
        defined = component.get("inputDefinitions", {}).get("parameters", {})
        defaults = {key: entry["defaultValue"] for key, entry in defined.items() if "defaultValue" in entry}
        outputs = component.get("outputDefinitions", {})
        kinds = {key: entry["artifactType"] for key, entry in outputs.get("artifacts", {}).items()}
        artifacts = {
            key: {"name": key, "type": kind, "uri": f"{_BUCKET}/{name}/{key}", "metadata": {}}
            for key, kind in kinds.items()
        }
        files = {key: f"{MOUNT}/{name}/{key}" for key in outputs.get("parameters", {})}
        told = {
            "inputs": {
                "parameterValues": defaults | inputs["parameters"],
                "artifacts": {key: {"artifacts": [value]} for key, value in inputs["artifacts"].items()},
            },
            "outputs": {
                "artifacts": {key: {"artifacts": [value]} for key, value in artifacts.items()},
                "parameters": {key: {"outputFile": path} for key, path in files.items()},
                "outputFile": f"{MOUNT}/{name}/output.json",
            },
        }
        for place in [*files.values(), *(local_path(entry["uri"]) for entry in artifacts.values())]:
            self._make_parent(place)
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        words = [*container["command"], *container.get("args", [])]
        words = [word.replace("{{$}}", json.dumps(told)) for word in words]
        self.run(Step(name, container["image"], words))
        values = json.loads((self.folder / name / "output.json").read_text(encoding="utf-8"))
        return {"parameters": values.get("parameterValues", {}), "artifacts": artifacts}

    def _make_parent(self, place: str) -> None:
        parent = (self.folder / Path(place).relative_to(MOUNT)).parent
        for folder in [*reversed(parent.relative_to(self.folder).parents), parent.relative_to(self.folder)]:
            (self.folder / folder).mkdir(exist_ok=True)
            (self.folder / folder).chmod(0o777)  # the container's user is another one


def holds(condition: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a task's condition is met: `parameter == value`, as kfp writes it, or the contrary.

    Raises ValueError for one of another form.
    """
    if condition.startswith("!(") and condition.endswith(")"):
        return not holds(condition[2:-1], parameters)
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"the condition {condition} is of a form that is not followed here")
    return bool(parameters[match["name"]] == json.loads(match["value"].replace("'", '"')))


def local_path(uri: str) -> str:
    """Where a pod has the artifact."""
    return f"{MOUNT}/{uri.removeprefix('s3://')}"


def _in_order(tasks: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    left = dict(tasks)
    while left:
        ready = [name for name, task in left.items() if not set(task.get("dependentTasks", ())) & left.keys()]
        assert ready, "the compiler lets no circle pass"
        for name in ready:
            yield name, left.pop(name)


def _inputs(task: Mapping[str, Any], given: Values, done: Mapping[str, Values]) -> Values:
    found: Values = {"parameters": {}, "artifacts": {}}
    for kind, producer, key in (
        ("parameters", "taskOutputParameter", "outputParameterKey"),
        ("artifacts", "taskOutputArtifact", "outputArtifactKey"),
    ):
        for name, source in task.get("inputs", {}).get(kind, {}).items():
            if producer in source:
                found[kind][name] = done[source[producer]["producerTask"]][kind][source[producer][key]]
            elif "runtimeValue" in source:
                found[kind][name] = source["runtimeValue"]["constant"]
            elif "taskFinalStatus" in source:  # a failure would not have come this far
                ended = source["taskFinalStatus"]["producerTask"]
                error = {"code": 0, "message": ""}
                found[kind][name] = {"state": "SUCCEEDED", "pipelineTaskName": ended, "error": error}
            else:
                (inner,) = source.values()  # componentInputParameter or componentInputArtifact
                found[kind][name] = given[kind][inner]
    return found
