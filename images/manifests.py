"""What the chart starts, turned into podman's options: command, environment, mounted files.

It is rendered by Helm's own library. The cluster's parts are stood in for: a Secret's values and the addresses of
other Services are given, a volume is a folder here, a service account's token is a file with any word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.build import ROOT

Object = dict[str, Any]
_CHART = ROOT / "charts/medforge"
_OF_PODS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod", "ServingRuntime")


@dataclass(frozen=True)
class Workload:
    """One container: `name` is "<kind> <name>" of its object, `options` are podman's."""

    name: str
    image: str
    command: list[str]
    options: list[str]


def render(values: Mapping[str, Any], name: str, namespace: str) -> list[Object]:
    """The chart's objects. Raises helm's errors for values that do not fit."""
    import helm_python
    import yaml

    with helm_python.Chart.load(_CHART) as chart:
        chart.validate_schema(dict(values))
        texts = chart.render(dict(values), name=name, namespace=namespace)
    return [
        document
        for template, text in texts.items()
        if template.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def workloads(
    objects: Sequence[Object], secrets: Mapping[str, str], folder: Path, owner: tuple[int, int]
) -> Iterator[Workload]:
    """Each container of the objects. `secrets` has the values of Secrets by key; volumes lie in `folder`.

    A claimed volume belongs to `owner` (user, group), as fsGroup makes it. Raises ValueError for a volume or a
    variable that is of no known kind.
    """
    configuration = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    for o in objects:
        if o["kind"] not in _OF_PODS:
            continue
        name = f"{o['kind']} {o['metadata']['name']}"
        spec = o["spec"]
        while "template" in spec or "jobTemplate" in spec:
            spec = (spec.get("template") or spec["jobTemplate"])["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            options = []
            for variable in container.get("env", ()):
                options.append(f"--env={variable['name']}={_value(name, variable, secrets)}")
            for mount in container.get("volumeMounts", ()):
                volume = volumes[mount["name"]]
                options += _mounted(name, mount, volume, configuration, folder, owner)
            command = [*container.get("command", ()), *container.get("args", ())]
            yield Workload(name, container["image"], [str(word) for word in command], options)


def _value(where: str, variable: Mapping[str, Any], secrets: Mapping[str, str]) -> str:
    if "value" in variable:
        return str(variable["value"])
    source = variable["valueFrom"]
    if "secretKeyRef" not in source:
        raise ValueError(f"{where}: {variable['name']} comes from {', '.join(source)}, which has no stand-in here")
    return secrets[source["secretKeyRef"]["key"]]


def _mounted(
    where: str,
    mount: Mapping[str, Any],
    volume: Mapping[str, Any],
    configuration: Mapping[str, Mapping[str, str]],
    folder: Path,
    owner: tuple[int, int],
) -> list[str]:
    place = str(mount["mountPath"])
    (kind,) = volume.keys() - {"name"}
    source = folder / where.replace(" ", "-") / str(mount["name"])
    if kind == "emptyDir":  # /tmp is every container's
        return [] if place == "/tmp" else ["--tmpfs", f"{place}:mode=1777"]  # noqa: S108
    source.mkdir(parents=True, exist_ok=True)
    if kind == "configMap":
        files = dict(configuration[volume["configMap"]["name"]])
    elif kind == "projected":
        files = {part["serviceAccountToken"]["path"]: "token" for part in volume["projected"]["sources"]}
    elif kind == "persistentVolumeClaim":
        os.chown(source, *owner)
        files = {}
    else:
        raise ValueError(f"{where}: the volume {volume['name']} is a {kind}, which has no stand-in here")
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8")
    return ["--volume", f"{source}:{place}{':ro' if mount.get('readOnly') else ''}"]


def lead_to(objects: Sequence[Object], url: str) -> None:
    """Let the gateway's routing name `url` instead of the cluster's address of the stable predictor."""
    (routing,) = [o for o in objects if o["kind"] == "ConfigMap" and "routing.json" in o["data"]]
    table = json.loads(routing["data"]["routing.json"])
    table["stable"]["url"] = url
    routing["data"]["routing.json"] = json.dumps(table)
