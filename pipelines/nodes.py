"""The pods of a stage that several machines train: a Kubeflow TrainJob, but for its name and command.

https://www.kubeflow.org/docs/components/trainer/ (v2.2 and later: `runtimePatches`)
"""

from __future__ import annotations

import json
from typing import Any

from medforge.config import RunConfig
from pipelines.cluster import ClusterConfig, StepConfig

CONTAINER = "node"  # of the training pods, in Kubeflow's runtimes
MANAGER = "medforge.io/pipeline"


def train_nodes(config: RunConfig, cluster: ClusterConfig) -> str:
    """The TrainJob's spec without its command, and the bucket by which inputs and outputs pass, as JSON."""
    assert cluster.nodes is not None, "check_run refuses it"
    step = cluster.step("train")
    limits = {"cpu": step.cpu, "memory": step.memory} | ({step.gpu.type: str(step.gpu.count)} if step.gpu else {})
    sizes = {name: size for name, size in limits.items() if size}
    spec = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": cluster.nodes.runtime,
        },
        "trainer": {
            "image": cluster.images.train,
            "numNodes": config.parallel.nodes,
            "numProcPerNode": config.parallel.processes,
            "env": _environment(cluster),
            "resourcesPerNode": {"requests": sizes, "limits": sizes},
        },
        "runtimePatches": [
            {
                "manager": MANAGER,
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [_job(cluster, step)]}}},
            }
        ],
    }
    return json.dumps({"bucket": cluster.nodes.bucket, "spec": spec}, sort_keys=True)


def _job(cluster: ClusterConfig, step: StepConfig) -> dict[str, Any]:
    return {"name": CONTAINER, "template": {"spec": {"template": {"spec": _pod(cluster, step)}}}}


def _environment(cluster: ClusterConfig) -> list[dict[str, Any]]:
    keys = cluster.store.keys
    secrets = {"MEDFORGE_S3_ACCESS_KEY": keys.access_key, "MEDFORGE_S3_SECRET_KEY": keys.secret_key}
    return [
        *({"name": name, "value": value} for name, value in cluster.environment().items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": keys.secret, "key": key}}}
            for name, key in secrets.items()
        ),
    ]


def _pod(cluster: ClusterConfig, step: StepConfig) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": step.scratch} if step.scratch else {}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108  the pod's own volume
    if step.shared_memory:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": step.shared_memory}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    pod: dict[str, Any] = {
        "volumes": volumes,
        "securityContext": {
            "runAsUser": cluster.user,
            "runAsGroup": cluster.user,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "volumeMounts": mounts,
                "securityContext": {
                    "readOnlyRootFilesystem": True,
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
    }
    if step.node_selector:
        pod["nodeSelector"] = step.node_selector
    if step.tolerations:
        pod["tolerations"] = [
            {name: value for name, value in toleration.model_dump().items() if value} for toleration in step.tolerations
        ]
    if cluster.images.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in cluster.images.pull_secrets]
    return pod
