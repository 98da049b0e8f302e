"""A pipeline for a cluster: the same steps in the same order, each with its image, size, secrets and retries."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.cluster import NEVER_CACHED, STEPS, WITH_MODEL, ClusterConfig, StepConfig, seconds

CONTAINER_TMP = "/tmp"  # noqa: S108  the pod's own volume


def for_cluster(pipeline: Any, cluster: ClusterConfig) -> Any:
    """The pipeline (of `@dsl.pipeline`) with the cluster's settings on each of its tasks."""
    from kfp import dsl
    from kfp.dsl.pipeline_context import Pipeline

    @functools.wraps(pipeline.pipeline_func)
    def settled(*given: Any, **named: Any) -> Any:
        outputs = pipeline.pipeline_func(*given, **named)
        for task in Pipeline.get_default_pipeline().tasks.values():
            settle(task, cluster)
        return outputs

    spec = pipeline.component_spec
    limits = {"ttl_seconds_after_finished": cluster.keep, "active_deadline_seconds": cluster.deadline}
    given = dsl.PipelineConfig(**{name: seconds(time) for name, time in limits.items() if time})
    build = dsl.pipeline(name=spec.name, description=spec.description, pipeline_config=given)
    # kfp looks up the module of every frame on the stack each time that a task is set: half a minute in all, where the
    # stack is deep and much is loaded (a notebook, the tests); a thread begins with an empty one
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(build, settled).result()


def step_of(task: Any) -> str:
    """The step that a task belongs to: its component's name up to the first dash (train-first is train)."""
    return str(task.component_spec.name).partition("-")[0]


def settle(task: Any, cluster: ClusterConfig) -> None:
    """Put the cluster's settings on a task."""
    name = step_of(task)
    assert name in STEPS, f"{name} is missing in pipelines/cluster.py: is it cached, and what image has it?"
    step = cluster.step(name)
    with_model = name in WITH_MODEL
    if task.component_spec.name.startswith("train-nodes"):  # it follows a TrainJob, whose pods are those that train
        step = cluster.defaults.model_copy(update={"retries": step.retries, "timeout": step.timeout})
        with_model = False
    task.set_container_image(cluster.images.train if with_model else cluster.images.data)
    task.set_caching_options(cluster.cache and name not in NEVER_CACHED)
    _size(task, step)
    _place(task, step)
    _environment(task, name, cluster)
    if step.retries:
        task.set_retry(
            step.retries.count,
            f"{seconds(step.retries.wait)}s",
            step.retries.factor,
            f"{seconds(step.retries.longest)}s",
        )


def _size(task: Any, step: StepConfig) -> None:
    from kfp import kubernetes

    if step.cpu:
        task.set_cpu_request(step.cpu).set_cpu_limit(step.cpu)
    if step.memory:
        task.set_memory_request(step.memory).set_memory_limit(step.memory)
    if step.gpu:
        task.set_accelerator_type(step.gpu.type).set_accelerator_limit(step.gpu.count)
    if step.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=step.shared_memory)  # noqa: S108
    # the images' root file system is read-only
    kubernetes.empty_dir_mount(task, "tmp", CONTAINER_TMP, size_limit=step.scratch)
    if step.timeout:
        kubernetes.set_timeout(task, seconds(step.timeout))


def _place(task: Any, step: StepConfig) -> None:
    from kfp import kubernetes

    for label, value in (step.node_selector or {}).items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in step.tolerations or []:
        kubernetes.add_toleration(
            task,
            key=toleration.key or None,
            operator=toleration.operator,
            value=toleration.value or None,
            effect=toleration.effect,
        )


def _environment(task: Any, name: str, cluster: ClusterConfig) -> None:
    from kfp import kubernetes

    for variable, value in cluster.environment().items():
        task.set_env_variable(variable, value)
    keys = cluster.store.keys
    store = {keys.access_key: "MEDFORGE_S3_ACCESS_KEY", keys.secret_key: "MEDFORGE_S3_SECRET_KEY"}
    kubernetes.use_secret_as_env(task, keys.secret, store)
    if cluster.trusted_keys and name in NEVER_CACHED:
        kubernetes.use_config_map_as_env(
            task, cluster.trusted_keys.config_map, {cluster.trusted_keys.key: "MEDFORGE_TRUSTED_KEYS"}
        )
    if cluster.hub_token and name == "base":
        kubernetes.use_secret_as_env(task, cluster.hub_token.secret, {cluster.hub_token.key: "HF_TOKEN"})
    kubernetes.set_image_pull_policy(task, cluster.images.pull_policy)
    if cluster.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.images.pull_secrets)
    kubernetes.set_security_context(task, run_as_user=cluster.user, run_as_group=cluster.user, run_as_non_root=True)
