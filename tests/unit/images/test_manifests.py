"""The chart's containers as podman's options, on the chart itself and on pods made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from images import build, manifests

OWNER = (0, 0)
SECRETS = {"secret-key": "s" * 32, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


def pod(**spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "i:1", "command": ["go"], "args": [1]} | spec.pop("container", {})
    return {"kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]} | spec}


def only(objects: list[dict[str, Any]], folder: Path) -> manifests.Workload:
    (work,) = manifests.workloads(objects, SECRETS, folder, OWNER)
    return work


def test_the_charts_gateway_and_jobs_are_found_with_what_they_run(tmp_path: Path) -> None:
    values = {
        "images": {"registry": "localhost"},
        "networkPolicy": {"enabled": False},
        "gateway": {"environment": "development"},
        "objectStore": {"endpoint": "127.0.0.1:9000", "secure": False},
    }
    objects = manifests.render(values, "medforge", "med")
    manifests.lead_to(objects, "http://127.0.0.1:1/openai/v1")
    found = {work.name: work for work in manifests.workloads(objects, SECRETS, tmp_path, OWNER)}
    gateway = found["Deployment medforge-gateway"]
    assert gateway.image == f"localhost/medforge/gateway:{build.version()}"
    assert gateway.command == ["python", "-m", "serving.gateway"]
    assert f"--env=MEDFORGE_GATEWAY_SECRET_KEY={SECRETS['secret-key']}" in gateway.options
    routing = tmp_path / "Deployment-medforge-gateway/routing/routing.json"
    assert f"{routing.parent}:/etc/medforge/routing:ro" in gateway.options
    assert json.loads(routing.read_text())["stable"]["url"] == "http://127.0.0.1:1/openai/v1"
    assert found["Job medforge-store-check"].command[:2] == ["medforge", "store-check"]
    assert "ServingRuntime medforge-predictor" in found


def test_volumes_of_each_kind_become_folders_and_files(tmp_path: Path) -> None:
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("tmp", "shm", "data", "files", "token")]
    volumes = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "d"}},
        {"name": "files", "configMap": {"name": "m"}},
        {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
    ]
    map_ = {"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a.txt": "words"}}
    work = only([map_, pod(container={"volumeMounts": mounts}, volumes=volumes)], tmp_path)
    place = tmp_path / "Pod-p"
    assert work.options == [
        "--tmpfs", "/shm:mode=1777", "--volume", f"{place}/data:/data", "--volume", f"{place}/files:/files",
        "--volume", f"{place}/token:/token",
    ]  # fmt: skip
    assert (place / "files/a.txt").read_text() == "words"
    assert (place / "token/t").is_file()
    assert work.command == ["go", "1"]


@pytest.mark.parametrize(
    ("container", "volumes", "told"),
    [
        ({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, [{"name": "v", "hostPath": {}}], "is a hostPath"),
        ({"env": [{"name": "NODE", "valueFrom": {"fieldRef": {}}}]}, [], "NODE comes from fieldRef"),
    ],
)
def test_what_has_no_stand_in_is_refused(
    container: dict[str, Any], volumes: list[dict[str, Any]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"Pod p: .*{told}"):
        only([pod(container=container, volumes=volumes)], tmp_path)
