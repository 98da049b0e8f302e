"""ClusterConfig: one YAML file describes the cluster that the pipelines run on; pipelines/clusters/ has examples.

A run's configuration says what is made, this one where: images, sizes of pods, secrets, retries. The same run goes to
any cluster, and any number of runs to the same one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from medforge.config import RunConfig, load_section
from medforge.stages import Section

DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
CPU = r"^([1-9][0-9]*(\.[0-9]+)?|0\.[0-9]+|[1-9][0-9]*m)$"
QUANTITY = r"^[1-9][0-9]*([KMGT]i?)?$"
TIME = r"^[1-9][0-9]*[smhd]$"
NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
KEY = r"^[-._a-zA-Z0-9]+$"

WITH_MODEL = ("base", "train", "merge", "predict", "validate")  # steps of the train image
ON_GPU = ("base", "train", "merge", "predict")
OF_RETRAIN = (*WITH_MODEL, "sources", "settings", "convert", "evaluate", "gate", "report", "publish")
OF_RELEASE = ("approved", "promote", "deploy", "watch", "complete", "rollback")
STEPS = (*OF_RETRAIN, *OF_RELEASE)
# what these read or write stands outside, so that what they did last time says nothing about this time
NEVER_CACHED = ("sources", "publish", *OF_RELEASE)


class ImagesConfig(Section):
    """The images of the steps."""

    data: str = Field(min_length=1, description="Image of the steps without a model, by digest: name@sha256:…")
    train: str = Field(min_length=1, description="Image of base, validate, train, merge and predict, by digest.")
    allow_tags: bool = Field(
        False, description="Take tags instead of digests, for a trial: what a tag means may change between two steps."
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="imagePullPolicy.")
    pull_secrets: list[str] = Field([], description="Secrets of the registry.")

    @model_validator(mode="after")
    def _by_digest(self) -> ImagesConfig:
        for name in ("data", "train"):
            image = getattr(self, name)
            if not DIGEST.fullmatch(image) and not self.allow_tags:
                raise ValueError(
                    f"{name}: {image} is no digest (name@sha256:…); a tag may change under a run. "
                    "allow_tags: true takes it for a trial"
                )
        return self

    @property
    def pinned(self) -> bool:
        """Whether both images are named by digest."""
        return all(DIGEST.fullmatch(image) for image in (self.data, self.train))


class GpuConfig(Section):
    """The accelerators of a pod."""

    type: str = Field("nvidia.com/gpu", description="Resource name, such as nvidia.com/gpu or nvidia.com/mig-3g.40gb.")
    count: int = Field(ge=1, description="How many.")


class Toleration(Section):
    """A taint of nodes that a step's pod may stand on."""

    key: str = Field("", description="Empty with operator Exists: all taints.")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="How `value` is compared.")
    value: str = Field("", description="With Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="None: all effects."
    )

    @model_validator(mode="after")
    def _value_counts(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError("value: has no effect with operator Exists; leave it out")
        if self.operator == "Equal" and not self.key:
            raise ValueError("key: is needed with operator Equal")
        return self


class RetryConfig(Section):
    """A failed step is tried again: after `wait`, then `factor` times that, at most `longest`."""

    count: int = Field(ge=1, description="How often.")
    wait: str = Field("30s", pattern=TIME, description="Before the first retry.")
    factor: float = Field(2.0, ge=1, description="What a wait is multiplied by for the next.")
    longest: str = Field("1h", pattern=TIME, description="Longest wait.")


class StepConfig(Section):
    """The pod of a step. What is not said is the `defaults`'; memory and CPU are both request and limit."""

    cpu: str | None = Field(None, pattern=CPU, description='Cores, such as "4" or 500m.')
    memory: str | None = Field(None, pattern=QUANTITY, description="Such as 16Gi.")
    gpu: GpuConfig | None = Field(None, description="For base, train, merge and predict.")
    shared_memory: str | None = Field(
        None, pattern=QUANTITY, description="Size of the shared memory (dev/shm), counted as memory."
    )
    scratch: str | None = Field(
        None, pattern=QUANTITY, description="Size of the only folder that a step writes to (tmp)."
    )
    node_selector: dict[str, str] | None = Field(None, description="Labels of the nodes.")
    tolerations: list[Toleration] | None = Field(None, description="Taints of the nodes.")
    timeout: str | None = Field(None, pattern=TIME, description="Longest time of one attempt, such as 24h.")
    retries: RetryConfig | None = Field(None, description="None: a failed step fails the run.")


class SecretKeys(Section):
    """A Secret with the keys of the object store."""

    secret: str = Field(pattern=NAME, description="Its name.")
    access_key: str = Field("AWS_ACCESS_KEY_ID", pattern=KEY, description="The key in it.")
    secret_key: str = Field("AWS_SECRET_ACCESS_KEY", pattern=KEY, description="The key in it.")


class StoreConfig(Section):
    """The object store of sources, checkpoints and releases."""

    endpoint: str = Field(pattern=r"^[^/\s]+$", description="host or host:port, without https://.")
    secure: bool = Field(True, description="https.")
    region: str = Field("us-east-1", min_length=1, description="Region.")
    keys: SecretKeys = Field(description="Who we are to it.")


class ConfigMapKey(Section):
    """A key of a ConfigMap."""

    config_map: str = Field(pattern=NAME, description="Its name.")
    key: str = Field(pattern=KEY, description="The key in it.")


class SecretKey(Section):
    """A key of a Secret."""

    secret: str = Field(pattern=NAME, description="Its name.")
    key: str = Field(pattern=KEY, description="The key in it.")


class NodesConfig(Section):
    """How a stage is trained on several machines: a TrainJob of Kubeflow's trainer (v2)."""

    runtime: str = Field("torch-distributed", pattern=NAME, description="The ClusterTrainingRuntime, with torch.")
    bucket: str = Field("medforge", pattern=NAME, description="Where inputs and outputs pass: trainjobs/ in it.")


class ClusterConfig(Section):
    """One cluster, as the pipelines see it."""

    images: ImagesConfig = Field(description="The images of the steps.")
    store: StoreConfig = Field(description="The object store.")
    trusted_keys: ConfigMapKey | None = Field(
        None, description="Reviewers' public keys (PEM); without them nothing can be released."
    )
    hub_token: SecretKey | None = Field(None, description="HF_TOKEN for the step `base`.")
    env: dict[str, str] = Field({}, description="Further variables of all steps, such as HTTPS_PROXY; no secrets.")
    defaults: StepConfig = Field(default_factory=StepConfig, description="The pod of a step of which nothing is said.")
    steps: dict[str, StepConfig] = Field({}, description="By the step's name.")
    nodes: NodesConfig | None = Field(None, description="For runs with parallel.nodes above 1.")
    user: int = Field(10001, ge=1, description="User and group of the images.")
    service_account: str = Field("", description="ServiceAccount of the runs' pods; empty: Kubeflow's own.")
    pipeline_root: str = Field("", pattern=r"^([a-z0-9]+://.+)?$", description="Where artifacts go; empty: Kubeflow's.")
    cache: bool = Field(True, description="Reuse steps of earlier runs with the same inputs, settings and image.")
    keep: str | None = Field(None, pattern=TIME, description="How long a finished run's pods and records stay.")
    deadline: str | None = Field(None, pattern=TIME, description="Longest time of a whole run.")

    @model_validator(mode="after")
    def _takes_effect(self) -> ClusterConfig:
        if unknown := sorted(set(self.steps) - set(STEPS)):
            raise ValueError(f"steps.{unknown[0]}: is no step; there are {', '.join(STEPS)}")
        if self.defaults.gpu:
            raise ValueError(f"defaults.gpu: most steps have no use for one; give it to {', '.join(ON_GPU)} in steps")
        for name, step in self.steps.items():
            if step.gpu and name not in ON_GPU:
                raise ValueError(f"steps.{name}.gpu: the step computes on no GPU; leave it out")
        if self.cache and not self.images.pinned:
            raise ValueError(
                "cache: a step would be reused although its tag means another image by now; name images by digest, "
                "or set cache: false"
            )
        for name in self.env:
            if name.startswith(_OWN) or name in QUIET:
                raise ValueError(f"env.{name}: is set by other fields of this file or by MedForge; leave it out")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"env.{name}: is no name of a variable")
        return self

    def step(self, name: str) -> StepConfig:
        """The pod of a step: what is said of it, else the defaults."""
        own = self.steps.get(name, StepConfig())
        return self.defaults.model_copy(update={field: getattr(own, field) for field in own.model_fields_set})

    def environment(self) -> dict[str, str]:
        """The variables of all steps that are no secrets."""
        return {
            "MEDFORGE_S3_ENDPOINT": self.store.endpoint,
            "MEDFORGE_S3_SECURE": str(self.store.secure).lower(),
            "MEDFORGE_S3_REGION": self.store.region,
            **QUIET,
            **self.env,
        }


_OWN = ("MEDFORGE_S3_", "MEDFORGE_TRUSTED_KEYS", "MEDFORGE_RUN", "MEDFORGE_WORKSPACE", "HF_TOKEN")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}


def load_cluster(path: Path | str) -> ClusterConfig:
    """The cluster that a YAML file describes. ValueError names the file and the field that is wrong."""
    found = load_section(ClusterConfig, Path(path))
    assert isinstance(found, ClusterConfig)
    return found


def check_run(config: RunConfig, cluster: ClusterConfig) -> None:
    """ValueError for what the cluster cannot do for this run."""
    for field, value, fine in (
        ("data.source", config.data.source, config.data.source == "phantom"),
        ("model.base", config.model.base, not Path(config.model.base).is_absolute()),
    ):
        if not fine and not value.startswith("s3://") and (field == "data.source" or Path(value).is_dir()):
            raise ValueError(f"{field}: {value} is on this machine, where the cluster's pods cannot read; use s3://…")
    train = cluster.step("train")
    if config.parallel.nodes > 1 and cluster.nodes is None:
        raise ValueError(f"parallel.nodes: {config.parallel.nodes} machines take the section `nodes` of the cluster")
    if train.gpu and train.gpu.count != config.parallel.processes:
        raise ValueError(
            f"steps.train.gpu.count: {train.gpu.count} GPUs for {config.parallel.processes} processes "
            "(parallel.processes of the run); one process uses one GPU"
        )
    if train.retries and not config.checkpoints.url:
        raise ValueError(
            "steps.train.retries: a training that is tried again would begin anew, as its disk is gone with its pod; "
            "give the run checkpoints.url (s3://…), or leave the retries out"
        )


def seconds(time: str) -> int:
    """The seconds of a time such as 90s, 30m, 24h or 7d."""
    return int(time[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[time[-1]]
